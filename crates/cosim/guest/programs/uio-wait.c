/*
 * uio-wait <interrupts> <seconds> [device, default /dev/uio0]
 *
 * Enables the interrupt of a UIO device, waits until it came so many times, and prints each count. Fails when the time
 * is over first.
 */
#include "common.h"
#include <poll.h>

int main(int argc, char **argv)
{
	if (argc != 3 && argc != 4) {
		fprintf(stderr, "usage: uio-wait <interrupts> <seconds> [device, default /dev/uio0]\n");
		return 2;
	}
	uint64_t wanted = number(argv[1]);
	double end = seconds() + (double)number(argv[2]);
	const char *device = argc == 4 ? argv[3] : "/dev/uio0";
	int file = open(device, O_RDWR | O_CLOEXEC);

	if (file < 0) {
		perror(device);
		return 1;
	}
	for (uint64_t seen = 0; seen < wanted; seen++) {
		uint32_t enable = 1, count;
		/* A device whose interrupt cannot be switched is always enabled. */
		if (write(file, &enable, sizeof enable) < 0 && errno != ENOSYS && errno != EIO) {
			perror("enabling the interrupt");
			return 1;
		}
		double left = end - seconds();
		struct pollfd wait = { .fd = file, .events = POLLIN };
		if (left <= 0 || poll(&wait, 1, (int)(left * 1000)) <= 0) {
			printf("uio-wait: %llu of %llu interrupts\n", (unsigned long long)seen, (unsigned long long)wanted);
			return 1;
		}
		if (read(file, &count, sizeof count) != sizeof count) {
			perror(device);
			return 1;
		}
		printf("uio-wait: interrupt %llu, count %u\n", (unsigned long long)(seen + 1), count);
		fflush(stdout);
	}
	return 0;
}
