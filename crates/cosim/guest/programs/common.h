/* What the guest programs share: numbers from the command line, physical memory, time. */
#ifndef COMMON_H
#define COMMON_H

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

/* A whole number, decimal or with 0x; ends the program if it is none. */
static inline uint64_t number(const char *text)
{
	char *end;

	errno = 0;
	uint64_t value = strtoull(text, &end, 0);
	if (errno || end == text || *end) {
		fprintf(stderr, "`%s' is not a number\n", text);
		exit(2);
	}
	return value;
}

/* Maps `size` bytes of physical memory, both multiples of a page. Registers are mapped as device memory. */
static inline volatile uint8_t *map_physical(uint64_t base, uint64_t size)
{
	int file = open("/dev/mem", O_RDWR | O_SYNC | O_CLOEXEC);

	if (file < 0) {
		perror("/dev/mem");
		exit(1);
	}
	void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, (off_t)base);
	if (at == MAP_FAILED) {
		fprintf(stderr, "/dev/mem at 0x%llx: %s\n", (unsigned long long)base, strerror(errno));
		if (errno == EPERM || errno == EAGAIN)
			fprintf(stderr, "a driver claims this range: unbind it, or boot with iomem=relaxed\n");
		exit(1);
	}
	close(file);
	return at;
}

/* One access of 1, 2, 4 or 8 bytes, as one instruction. */
static inline uint64_t load(const volatile void *at, unsigned size)
{
	switch (size) {
	case 1: return *(const volatile uint8_t *)at;
	case 2: return *(const volatile uint16_t *)at;
	case 4: return *(const volatile uint32_t *)at;
	default: return *(const volatile uint64_t *)at;
	}
}

static inline void store(volatile void *at, unsigned size, uint64_t value)
{
	switch (size) {
	case 1: *(volatile uint8_t *)at = (uint8_t)value; break;
	case 2: *(volatile uint16_t *)at = (uint16_t)value; break;
	case 4: *(volatile uint32_t *)at = (uint32_t)value; break;
	default: *(volatile uint64_t *)at = value; break;
	}
}

static inline double seconds(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

#endif
