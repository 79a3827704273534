/*
 * heap-copy [-n copies] [-b bytes] <heap> | heap-copy -s
 *
 * Two buffers of a dma-buf heap (`system`, or a CMA heap of /dev/dma_heap), and a DMA channel that copies from one to
 * the other: portcullis_heapcopy maps them for the channel and the channel's own driver does the work. The parameter
 * `device` of that module says which channel. With -s: a copy between addresses that nobody mapped for the channel.
 */
#include "common.h"
#include "../modules/own/heapcopy.h"
#include <linux/dma-buf.h>
#include <linux/dma-heap.h>
#include <sys/ioctl.h>

static void fail(const char *what)
{
	fprintf(stderr, "%s: %s\n", what, strerror(errno));
	exit(1);
}

struct buffer {
	int fd;
	uint8_t *at;
};

static struct buffer allocate(int heap, uint64_t bytes)
{
	struct dma_heap_allocation_data a = { .len = bytes, .fd_flags = O_RDWR | O_CLOEXEC };

	if (ioctl(heap, DMA_HEAP_IOCTL_ALLOC, &a))
		fail("allocating from the heap");
	struct buffer b = { .fd = (int)a.fd };
	b.at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, b.fd, 0);
	if (b.at == MAP_FAILED)
		fail("mapping the heap's buffer");
	return b;
}

/* Before and after the CPU looks at a buffer. */
static void touch(struct buffer b, uint64_t flags)
{
	struct dma_buf_sync s = { .flags = flags | DMA_BUF_SYNC_RW };

	if (ioctl(b.fd, DMA_BUF_IOCTL_SYNC, &s))
		fail("DMA_BUF_IOCTL_SYNC");
}

static int open_driver(void)
{
	int driver = open("/dev/portcullis-heapcopy", O_RDWR | O_CLOEXEC);

	if (driver < 0)
		fail("/dev/portcullis-heapcopy (is a channel free?)");
	return driver;
}

static int copies(const char *name, uint64_t count, uint64_t bytes)
{
	char path[300];

	snprintf(path, sizeof path, "/dev/dma_heap/%s", name);
	int heap = open(path, O_RDWR | O_CLOEXEC);
	if (heap < 0)
		fail(path);
	int driver = open_driver();
	uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE), size = (bytes + page - 1) / page * page, good = 0, transfers = 0;
	struct heapcopy c = { 0 };
	double start = seconds();

	for (uint64_t n = 0; n < count; n++) {
		/* New buffers each time: what the heap has left may be in pieces. */
		struct buffer from = allocate(heap, size), to = allocate(heap, size);
		touch(from, DMA_BUF_SYNC_START);
		touch(to, DMA_BUF_SYNC_START);
		for (uint64_t i = 0; i < bytes; i++)
			from.at[i] = (uint8_t)(((uint32_t)i * 2654435761u + (uint32_t)n * 40503u) >> 13);
		memset(to.at, 0x5a, size);
		touch(from, DMA_BUF_SYNC_END);
		touch(to, DMA_BUF_SYNC_END);
		c = (struct heapcopy){ .src_fd = from.fd, .dst_fd = to.fd, .bytes = bytes };
		int error = ioctl(driver, HEAPCOPY_COPY, &c) ? errno : 0;
		touch(to, DMA_BUF_SYNC_START);
		uint64_t beyond = 0;
		for (uint64_t i = bytes; i < size; i++)
			beyond += to.at[i] != 0x5a;
		int same = !memcmp(from.at, to.at, bytes);
		touch(to, DMA_BUF_SYNC_END);
		good += !error && same && !beyond;
		transfers += c.transfers;
		if (error || !same || beyond)
			printf("heap-copy: copy %llu: %s, data %s, %llu bytes beyond changed\n", (unsigned long long)n,
			       strerror(error), same ? "same" : "different", (unsigned long long)beyond);
		munmap(from.at, size);
		munmap(to.at, size);
		close(from.fd);
		close(to.fd);
		if (error)
			break;
	}
	printf("heap-copy: %llu of %llu copies of %llu bytes from and to heap %s verified in %.2f s, %llu transfers; the last: "
	       "iova 0x%llx (%u segments) to 0x%llx (%u segments)\n",
	       (unsigned long long)good, (unsigned long long)count, (unsigned long long)bytes, name, seconds() - start,
	       (unsigned long long)transfers, (unsigned long long)c.src_iova, c.src_segments,
	       (unsigned long long)c.dst_iova, c.dst_segments);
	return count && good == count;
}

int main(int argc, char **argv)
{
	uint64_t count = 20, bytes = 1 << 20;
	int option, stray = 0;

	while ((option = getopt(argc, argv, "n:b:s")) != -1) {
		if (option == 'n')
			count = number(optarg);
		else if (option == 'b')
			bytes = number(optarg);
		else if (option == 's')
			stray = 1;
		else
			argc = 0;
	}
	if (argc - optind != !stray || bytes < 1 || bytes > (64 << 20)) {
		fprintf(stderr, "usage: heap-copy [-n copies] [-b bytes, up to 64 MiB] <heap>\n       heap-copy -s\n");
		return 2;
	}
	if (stray) {
		struct heapcopy_stray s = { .src = 0x12345000, .dst = 0x23456000, .bytes = 64 };
		if (ioctl(open_driver(), HEAPCOPY_STRAY, &s))
			fail("the stray copy");
		printf("heap-copy: stray copy from 0x%llx: the channel %s\n", (unsigned long long)s.src,
		       s.timed_out ? "never said that it is done" : "has ended");
		return 0;
	}
	int good = copies(argv[optind], count, bytes);
	printf("heap-copy: %s\n", good ? "pass" : "FAIL");
	return !good;
}
