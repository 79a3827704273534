/*
 * regs { r <physical> <size> | w <physical> <size> <value> }...
 *
 * Reads and writes registers, in order; size 1, 2, 4 or 8. A line per access: `regs: r 0x30100000 4 0x0`.
 * Ranges that a driver claims need iomem=relaxed on the kernel's command line.
 */
#include "common.h"

static int usage(void)
{
	fprintf(stderr, "usage: regs { r <physical> <size> | w <physical> <size> <value> }...   size 1, 2, 4 or 8\n");
	return 2;
}

int main(int argc, char **argv)
{
	uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
	int at = 1;

	if (argc == 1)
		return usage();
	while (at < argc) {
		int writing = !strcmp(argv[at], "w");
		if ((!writing && strcmp(argv[at], "r")) || at + 3 + writing > argc)
			return usage();
		uint64_t address = number(argv[at + 1]);
		uint64_t size = number(argv[at + 2]);
		if ((size != 1 && size != 2 && size != 4 && size != 8) || address % size)
			return usage();
		uint64_t first = address & ~(page - 1);
		volatile uint8_t *mapped = map_physical(first, page);
		uint64_t value;
		if (writing) {
			value = number(argv[at + 3]);
			store(mapped + (address - first), (unsigned)size, value);
		} else {
			value = load(mapped + (address - first), (unsigned)size);
		}
		printf("regs: %c 0x%llx %llu 0x%llx\n", writing ? 'w' : 'r', (unsigned long long)address,
		       (unsigned long long)size, (unsigned long long)value);
		munmap((void *)mapped, page);
		at += 3 + writing;
	}
	return 0;
}
