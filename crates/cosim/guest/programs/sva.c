/*
 * sva [-f] [-s] [-b bytes] <function, such as 0000:00:02.0>
 *
 * A process's own addresses as DMA addresses (shared virtual addressing), with the PCIe test device and its driver
 * portcullis_testdev: each process that binds itself has a PASID, and the device walks the page table of the CPU.
 *
 * With -f the function can wait for pages (its node has dma-can-stall): memory that nobody touched is there when the
 * device comes. Without, a copy to such memory must be stopped, and leave it untouched. -s leaves out what has nothing to
 * do with processes: the kernel's own mappings.
 *
 * Every step prints a line that ends with `pass` or `FAIL`; ends with 0 if all passed.
 */
#include "testdev.h"
#include <signal.h>
#include <sys/wait.h>

static int waits;
static uint64_t bytes = 64 << 10;
static int failures;

static void step(int good, const char *name, const char *detail)
{
	printf("sva: %s: %s: %s\n", name, detail, good ? "pass" : "FAIL");
	fflush(stdout);
	failures += !good;
}

static uint8_t *memory_at(void *where)
{
	int flags = MAP_PRIVATE | MAP_ANONYMOUS | (where ? MAP_FIXED_NOREPLACE : 0);
	void *at = mmap(where, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);

	if (at == MAP_FAILED || (where && at != where))
		fail("memory");
	/* Pages of 4 KiB, so that every one is a fault of its own. */
	madvise(at, bytes, MADV_NOHUGEPAGE);
	return at;
}

static uint8_t *memory(void)
{
	return memory_at(NULL);
}

/* Pages of a buffer that the process has. */
static uint64_t present(uint8_t *at)
{
	long page = sysconf(_SC_PAGESIZE);
	uint64_t pages = (bytes + (uint64_t)page - 1) / (uint64_t)page, n = 0;
	unsigned char *vector = calloc(pages, 1);

	if (!vector || mincore(at, bytes, vector))
		fail("mincore");
	for (uint64_t i = 0; i < pages; i++)
		n += vector[i] & 1;
	free(vector);
	return n;
}

static uint32_t bind_process(int device)
{
	uint32_t pasid = 0;

	if (ioctl(device, TESTDEV_BIND_SVA, &pasid))
		fail("binding the process to the device (is this kernel built for SVA, has the function PASIDs?)");
	return pasid;
}

static struct outcome copy(int device, void *to, const void *from)
{
	return transfer(device, (uintptr_t)to, (uintptr_t)from, (uint32_t)bytes, TESTDEV_OWN_PASID, 0);
}

static char detail[300];
#define DETAIL(...) (snprintf(detail, sizeof detail, __VA_ARGS__), detail)

/* A pipe end as a word between two processes. */
static void say(int pipe, uint32_t word)
{
	if (write(pipe, &word, sizeof word) != sizeof word)
		fail("a pipe");
}

static uint32_t hear(int pipe)
{
	uint32_t word;

	if (read(pipe, &word, sizeof word) != sizeof word) {
		fprintf(stderr, "the other process is gone\n");
		exit(1);
	}
	return word;
}

static void present_pages(int device)
{
	uint8_t *source = memory(), *target = memory();

	fill(source, bytes, 1);
	memset(target, 0, bytes);
	struct outcome o = copy(device, target, source);
	int same = !memcmp(source, target, bytes);
	step(is_good(o) && same, "present", DETAIL("%p to %p, %s, data %s", (void *)source, (void *)target, told(o),
						   same ? "same" : "different"));
	munmap(source, bytes);
	munmap(target, bytes);
}

static void untouched_pages(int device)
{
	uint8_t *source = memory(), *target = memory();

	fill(source, bytes, 2);
	uint64_t before = present(target);
	struct outcome o = copy(device, target, source);
	uint64_t after = present(target);
	if (waits) {
		int same = !memcmp(source, target, bytes);
		step(is_good(o) && same && !before && after == present(source), "untouched",
		     DETAIL("%llu pages there before, %llu after, %s, data %s", (unsigned long long)before,
			    (unsigned long long)after, told(o), same ? "same" : "different"));
	} else {
		step(is_stopped(o) && !before && !after, "untouched",
		     DETAIL("the device cannot wait: %s, %llu pages there after", told(o), (unsigned long long)after));
	}
	munmap(source, bytes);
	munmap(target, bytes);
}

/* Two processes, the same addresses, different data, both bound. */
static void two_processes(int device, uint32_t pasid, const char *bdf)
{
	enum { ROUNDS = 20 };
	int up[2], down[2];
	uint8_t *const at = (uint8_t *)0x40000000000;
	uint8_t *const target = at + bytes;

	if (pipe(up) || pipe(down))
		fail("pipes");
	pid_t child = fork();
	if (child < 0)
		fail("fork");
	int mine = child ? device : open_testdev(bdf);
	uint32_t seed = child ? 3 : 4;
	uint8_t *source = memory_at(at);
	memory_at(target);
	fill(source, bytes, seed);
	memset(target, 0, bytes);
	/* What the child calls its own is another process: the inherited binding is the parent's. */
	uint32_t own = child ? pasid : bind_process(mine);
	uint32_t other = 0;
	if (child) {
		other = hear(up[0]);
		say(down[1], 0);
	} else {
		say(up[1], own);
		hear(down[0]);
	}
	uint32_t good = 0;
	for (int i = 0; i < ROUNDS; i++) {
		memset(target, 0, bytes);
		/* The device does one transfer at a time; the processes take turns as it comes. */
		good += is_good(copy(mine, target, source)) && !memcmp(source, target, bytes);
	}
	if (!child) {
		say(up[1], good);
		_exit(good == ROUNDS ? 0 : 1);
	}
	uint32_t theirs = hear(up[0]);
	int status;
	waitpid(child, &status, 0);
	step(good == ROUNDS && theirs == ROUNDS && own != other, "two-processes",
	     DETAIL("PASIDs %u and %u, both at %p: %u and %u of %d copies verified", own, other, (void *)source, good,
		    theirs, ROUNDS));
	munmap(source, bytes);
	munmap(target, bytes);
	close(up[0]), close(up[1]), close(down[0]), close(down[1]);
}

static void unmapped(int device)
{
	uint8_t *source = memory(), *target = memory();

	fill(source, bytes, 5);
	memset(target, 0, bytes);
	struct outcome o = copy(device, target, source);
	int good = is_good(o) && !memcmp(source, target, bytes);
	/* Translations that the device and the SMMU kept go with the pages. */
	munmap(target, bytes);
	o = copy(device, target, source);
	step(good && is_stopped(o) && o.result & TESTDEV_DESTINATION, "unmapped", told(o));

	target = memory();
	memset(target, 0, bytes);
	o = copy(device, target, source);
	step(is_good(o) && !memcmp(source, target, bytes), "after-it", told(o));

	memset(target, 0x5a, bytes);
	mprotect(target, bytes, PROT_READ);
	o = copy(device, target, source);
	uint64_t changed = differing(target, bytes, 0x5a);
	step(is_stopped(o) && o.result & TESTDEV_DESTINATION && !changed, "read-only",
	     DETAIL("%s, %llu bytes changed", told(o), (unsigned long long)changed));
	munmap(source, bytes);
	munmap(target, bytes);
}

/* After a fork both processes have the page until one writes. The writer here is the device. */
static void copy_on_write(int device)
{
	uint8_t *source = memory(), *target = memory();
	int up[2], down[2];

	if (pipe(up) || pipe(down))
		fail("pipes");
	fill(source, bytes, 6);
	memset(target, 0x5a, bytes);
	/* Translations that allow writes are cached now. */
	struct outcome o = copy(device, target, source);
	int before = is_good(o);
	memset(target, 0x5a, bytes);
	pid_t child = fork();
	if (child < 0)
		fail("fork");
	if (!child) {
		say(up[1], 0);
		hear(down[0]);
		say(up[1], (uint32_t)differing(target, bytes, 0x5a));
		_exit(0);
	}
	hear(up[0]);
	o = copy(device, target, source);
	say(down[1], 0);
	uint32_t leaked = hear(up[0]);
	waitpid(child, NULL, 0);
	uint64_t own = differing(target, bytes, 0x5a);
	int same = !memcmp(source, target, bytes);
	int good = waits ? is_good(o) && same : is_stopped(o) && !own;
	step(before && good && !leaked, "copy-on-write",
	     DETAIL("%s, %llu bytes changed here, %u in the child", told(o), (unsigned long long)own, leaked));
	munmap(source, bytes);
	munmap(target, bytes);
	close(up[0]), close(up[1]), close(down[0]), close(down[1]);
}

/* A process that dies while it is bound: through a file that lives on in its parent. */
static void dead_process(const char *bdf)
{
	int held = open_testdev(bdf), up[2];
	uint8_t *source = memory(), *target = memory();

	if (pipe(up))
		fail("a pipe");
	/* Not `bytes` of it touched by the child only: it has these from its parent. */
	fill(source, bytes, 7);
	memset(target, 0x5a, bytes);
	pid_t child = fork();
	if (child < 0)
		fail("fork");
	if (!child) {
		say(up[1], bind_process(held));
		fill(source, bytes, 8);
		memset(target, 0, bytes);
		say(up[1], is_good(copy(held, target, source)) && !memcmp(source, target, bytes));
		/* No unbinding. */
		_exit(0);
	}
	uint32_t pasid = hear(up[0]);
	int alive = (int)hear(up[0]);
	waitpid(child, NULL, 0);
	struct outcome o = transfer(held, (uintptr_t)target, (uintptr_t)source, (uint32_t)bytes, TESTDEV_ANY_PASID, pasid);
	uint64_t changed = differing(target, bytes, 0x5a);
	step(alive && is_stopped(o) && !changed, "dead-process",
	     DETAIL("PASID %u after its process ended: %s", pasid, told(o)));
	if (ioctl(held, TESTDEV_UNBIND))
		fail("unbinding");
	o = transfer(held, (uintptr_t)target, (uintptr_t)source, (uint32_t)bytes, TESTDEV_ANY_PASID, pasid);
	changed = differing(target, bytes, 0x5a);
	step(is_stopped(o) && !changed, "free-pasid", DETAIL("PASID %u after it was given back: %s", pasid, told(o)));
	close(held);
	munmap(source, bytes);
	munmap(target, bytes);
	close(up[0]), close(up[1]);
}

static void mapped_by_kernel(int device)
{
	uint8_t *source = malloc(bytes), *target = malloc(bytes);

	if (!source || !target)
		fail("memory");
	fill(source, bytes, 9);
	memset(target, 0, bytes);
	struct testdev_mapped m = { .src = (uintptr_t)source, .dst = (uintptr_t)target, .bytes = (uint32_t)bytes };
	int error = ioctl(device, TESTDEV_COPY_MAPPED, &m) ? errno : 0;
	int same = !memcmp(source, target, bytes);
	step(!error && !m.result && same, "dma-api",
	     DETAIL("iova 0x%llx to 0x%llx: %s, result 0x%x, data %s", (unsigned long long)m.src_iova,
		    (unsigned long long)m.dst_iova, strerror(error), m.result, same ? "same" : "different"));
	step(!error && (m.late_result & 0xff) == TESTDEV_TERMINATED && !m.late_writes, "dma-api-late",
	     DETAIL("after unmapping: result 0x%x, %u bytes changed", m.late_result, m.late_writes));
	free(source);
	free(target);
}

int main(int argc, char **argv)
{
	int option, only_processes = 0;

	while ((option = getopt(argc, argv, "fsb:")) != -1) {
		if (option == 'f')
			waits = 1;
		else if (option == 's')
			only_processes = 1;
		else if (option == 'b')
			bytes = number(optarg);
		else
			argc = 0;
	}
	if (argc - optind != 1 || bytes < 1 || bytes > TESTDEV_MAPPED_BYTES) {
		fprintf(stderr, "usage: sva [-f] [-s] [-b bytes, up to 1 MiB] <function, such as 0000:00:02.0>\n");
		return 2;
	}
	long page = sysconf(_SC_PAGESIZE);
	bytes = (bytes + (uint64_t)page - 1) / (uint64_t)page * (uint64_t)page;
	const char *bdf = argv[optind];
	int device = open_testdev(bdf);

	struct abilities a = abilities_of(bdf);
	/* Page requests are nothing that the kernel's driver has a use for: it leaves them off. */
	step(a.pasid && a.pasid_on && a.ats == a.ats_on, "configuration",
	     DETAIL("PASID %s, ATS %s, page requests %s", a.pasid_on ? "on" : "off",
		    !a.ats ? "absent" : a.ats_on ? "on" : "off", !a.pri ? "absent" : a.pri_on ? "on" : "off"));
	if (!only_processes)
		mapped_by_kernel(device);
	uint32_t pasid = bind_process(device);
	step(pasid > 0, "bound", DETAIL("PASID %u", pasid));
	present_pages(device);
	untouched_pages(device);
	two_processes(device, pasid, bdf);
	unmapped(device);
	copy_on_write(device);
	dead_process(bdf);
	/* What others did to each other has not touched this one. */
	present_pages(device);
	if (ioctl(device, TESTDEV_UNBIND))
		fail("unbinding");
	uint8_t *source = memory(), *target = memory();
	memset(source, 1, bytes);
	memset(target, 0x5a, bytes);
	struct outcome o = transfer(device, (uintptr_t)target, (uintptr_t)source, (uint32_t)bytes, TESTDEV_ANY_PASID, pasid);
	step(is_stopped(o) && !differing(target, bytes, 0x5a), "unbound", told(o));
	printf("sva: %s\n", failures ? "FAIL" : "pass");
	return failures != 0;
}
