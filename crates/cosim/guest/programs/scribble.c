/*
 * scribble <seconds> <physical base> <size> <seed>
 *
 * Reads and writes a range of physical addresses at random: sizes 1, 2, 4, 8, random offsets (aligned, as device memory
 * demands), random values. What is there must bear it. The same seed makes the same accesses. Half of the values are
 * small, so that enable bits and sizes are hit as well as nonsense. Drivers' ranges need iomem=relaxed.
 */
#include "common.h"
#include <setjmp.h>
#include <signal.h>

static sigjmp_buf after_abort;

static void aborted(int signal)
{
	(void)signal;
	siglongjmp(after_abort, 1);
}

/* xorshift64*: small, and the same everywhere. */
static uint64_t next(uint64_t *state)
{
	*state ^= *state >> 12;
	*state ^= *state << 25;
	*state ^= *state >> 27;
	return *state * 0x2545f4914f6cdd1dULL;
}

int main(int argc, char **argv)
{
	if (argc != 5) {
		fprintf(stderr, "usage: scribble <seconds> <physical base> <size> <seed>\n");
		return 2;
	}
	double length = (double)number(argv[1]);
	uint64_t base = number(argv[2]);
	uint64_t size = number(argv[3]);
	/* A state of zero would stay zero. */
	static uint64_t state;
	state = number(argv[4]) ^ 0x9e3779b97f4a7c15ULL;
	if (!state)
		state = 1;

	long page = sysconf(_SC_PAGESIZE);
	if (size < 8 || base % (uint64_t)page || size % (uint64_t)page) {
		fprintf(stderr, "base and size must be multiples of a page, %ld bytes\n", page);
		return 2;
	}
	volatile uint8_t *window = map_physical(base, size);
	struct sigaction action = { .sa_handler = aborted };
	sigaction(SIGBUS, &action, NULL);

	static uint64_t reads, writes, aborts;
	double start = seconds();
	double end = start + length;
	double report = start + 10;

	if (sigsetjmp(after_abort, 1))
		aborts++;
	for (;;) {
		double now = seconds();
		if (now >= end)
			break;
		if (now >= report) {
			printf("scribble: at %.0f s: %llu reads, %llu writes, %llu aborts\n", now - start,
			       (unsigned long long)reads, (unsigned long long)writes, (unsigned long long)aborts);
			fflush(stdout);
			report = now + 10;
		}
		/* Reads are ten times slower than writes: a batch between two looks at the clock. */
		for (int i = 0; i < 64; i++) {
			uint64_t choice = next(&state);
			unsigned width = 1u << (choice & 3);
			volatile uint8_t *at = window + (next(&state) % size & ~(uint64_t)(width - 1));
			uint64_t value = next(&state);
			if (choice & 8)
				value &= 0xff;
			if (choice & 4) {
				writes++;
				store(at, width, value);
			} else {
				reads++;
				load(at, width);
			}
		}
	}
	printf("scribble: %llu reads, %llu writes, %llu aborts in %.1f s\n", (unsigned long long)reads,
	       (unsigned long long)writes, (unsigned long long)aborts, seconds() - start);
	return 0;
}
