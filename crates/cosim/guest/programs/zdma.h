/*
 * One ZynqMP DMA channel driven from user space through a vfio device, whoever opened it; and the test that every
 * such program makes. Registers: Zynq UltraScale+ register reference, ZDMA.
 */
#ifndef ZDMA_H
#define ZDMA_H

#include "common.h"
#include <linux/vfio.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>

enum {
	ISR = 0x100, IMR = 0x104, IEN = 0x108, IDS = 0x10c, CTRL0 = 0x110, STATUS = 0x11c,
	SRC_WORD0 = 0x128, DST_WORD0 = 0x138, TOTAL_BYTE = 0x188, CTRL2 = 0x200,
};
#define POINT_TYPE_MEMORY 0x40u
#define ALL_INTERRUPTS 0xfffu
#define DMA_DONE 0x400u
#define AXI_ERRORS 0x3c0u

/* Where a program puts the buffer if that is its choice, and where nothing is. */
#define IOVA 0x70000000ull
#define NOT_MAPPED 0x7f000000ull
/* Source in the first half of the buffer, destination in the second. */
#define HALF_BYTES (2ull << 20)
#define BUFFER_BYTES (2 * HALF_BYTES)

struct channel {
	int device;
	int interrupt; /* an eventfd; -1: there is none, ISR is polled */
	volatile uint32_t *registers; /* mapped, or NULL: then through the file, at `offset` */
	uint64_t offset;
	uint64_t iova; /* of the buffer */
};

static inline void fail(const char *what)
{
	fprintf(stderr, "%s: %s\n", what, strerror(errno));
	exit(1);
}

static inline uint32_t get(struct channel *ch, unsigned reg)
{
	uint32_t value;

	if (ch->registers)
		return ch->registers[reg / 4];
	if (pread(ch->device, &value, 4, (off_t)(ch->offset + reg)) != 4)
		fail("reading a register");
	return value;
}

static inline void set(struct channel *ch, unsigned reg, uint32_t value)
{
	if (ch->registers)
		ch->registers[reg / 4] = value;
	else if (pwrite(ch->device, &value, 4, (off_t)(ch->offset + reg)) != 4)
		fail("writing a register");
}

static inline void describe(struct channel *ch, unsigned word0, uint64_t address, uint32_t bytes)
{
	set(ch, word0, (uint32_t)address);
	set(ch, word0 + 4, (uint32_t)(address >> 32));
	set(ch, word0 + 8, bytes);
	set(ch, word0 + 12, 0);
}

/* Waits for the interrupt and takes its bits; 0 if none comes for five seconds. */
static inline uint32_t next_interrupt(struct channel *ch)
{
	if (ch->interrupt < 0) {
		double end = seconds() + 5;
		uint32_t now;
		while (!(now = get(ch, ISR)) && seconds() < end)
			;
		set(ch, ISR, now);
		return now;
	}
	struct pollfd wait = { .fd = ch->interrupt, .events = POLLIN };
	uint64_t count;
	if (poll(&wait, 1, 5000) <= 0)
		return 0;
	if (read(ch->interrupt, &count, sizeof count) != sizeof count)
		fail("reading the interrupt");
	uint32_t now = get(ch, ISR);
	set(ch, ISR, now);
	/* A level interrupt was masked when it came. */
	struct vfio_irq_set unmask = {
		.argsz = sizeof unmask, .flags = VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_UNMASK, .count = 1,
	};
	if (ioctl(ch->device, VFIO_DEVICE_SET_IRQS, &unmask))
		fail("unmasking the interrupt");
	return now;
}

/* One copy with the descriptor in registers. Returns the ISR bits that it left, without DMA_DONE if it did not end. */
static inline uint32_t copy(struct channel *ch, uint64_t to, uint64_t from, uint32_t bytes)
{
	set(ch, IDS, ALL_INTERRUPTS);
	set(ch, ISR, ALL_INTERRUPTS);
	set(ch, CTRL0, get(ch, CTRL0) & ~POINT_TYPE_MEMORY);
	describe(ch, SRC_WORD0, from, bytes);
	describe(ch, DST_WORD0, to, bytes);
	set(ch, TOTAL_BYTE, 0);
	set(ch, IEN, DMA_DONE | AXI_ERRORS);
	/* The data is written before the engine is told. */
	__sync_synchronize();
	set(ch, CTRL2, 1);

	uint32_t seen = 0;
	/* An error may raise the line before DMA_DONE, which is last. */
	double end = seconds() + 10;
	while (!(seen & DMA_DONE) && seconds() < end) {
		uint32_t now = next_interrupt(ch);
		if (!now && ch->interrupt >= 0 && !(now = get(ch, ISR)))
			break;
		seen |= now;
	}
	__sync_synchronize();
	return seen;
}

/* Maps the registers of a vfio device and wires its interrupt. */
static inline void open_channel(struct channel *ch)
{
	struct vfio_device_info info = { .argsz = sizeof info };
	struct vfio_region_info region = { .argsz = sizeof region };
	struct vfio_irq_info irq = { .argsz = sizeof irq };

	if (ioctl(ch->device, VFIO_DEVICE_GET_INFO, &info))
		fail("information on the device");
	printf("device flags 0x%x, %u regions, %u interrupts\n", info.flags, info.num_regions, info.num_irqs);
	if (ioctl(ch->device, VFIO_DEVICE_GET_REGION_INFO, &region))
		fail("information on region 0");
	if (ioctl(ch->device, VFIO_DEVICE_GET_IRQ_INFO, &irq))
		fail("information on interrupt 0");
	printf("region 0 of 0x%llx bytes, flags 0x%x; interrupt 0 flags 0x%x\n",
	       (unsigned long long)region.size, region.flags, irq.flags);
	ch->offset = region.offset;
	if (region.flags & VFIO_REGION_INFO_FLAG_MMAP) {
		void *at = mmap(NULL, region.size, PROT_READ | PROT_WRITE, MAP_SHARED, ch->device, (off_t)region.offset);
		if (at == MAP_FAILED)
			fail("mapping the registers");
		ch->registers = at;
	}
	ch->interrupt = eventfd(0, EFD_CLOEXEC);
	uint32_t room[(sizeof(struct vfio_irq_set) + sizeof(int32_t)) / 4];
	struct vfio_irq_set *trigger = (struct vfio_irq_set *)room;
	*trigger = (struct vfio_irq_set){
		.argsz = sizeof room, .flags = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER, .count = 1,
	};
	int32_t file = ch->interrupt;
	memcpy(trigger->data, &file, sizeof file);
	if (ioctl(ch->device, VFIO_DEVICE_SET_IRQS, trigger))
		fail("wiring the interrupt");
}

static inline void fill(uint8_t *at, uint64_t bytes, uint32_t seed)
{
	for (uint64_t i = 0; i < bytes; i++)
		at[i] = (uint8_t)(((uint32_t)i * 2654435761u + seed * 40503u) >> 13);
}

/* Makes verified copies, with odd addresses as well: the engine takes any. Returns whether all were good. */
static inline int verified_copies(struct channel *ch, uint8_t *buffer, uint64_t copies, uint64_t bytes)
{
	uint64_t good = 0;
	double start = seconds();

	for (uint64_t n = 0; n < copies; n++) {
		uint64_t from = n * 7 % 4096, to = n * 13 % 4096;
		uint8_t *source = buffer + from, *target = buffer + HALF_BYTES + to;
		fill(source, bytes, (uint32_t)n);
		memset(buffer + HALF_BYTES, 0, bytes + 2 * 4096);
		uint32_t seen = copy(ch, ch->iova + HALF_BYTES + to, ch->iova + from, (uint32_t)bytes);
		int same = !memcmp(target, source, bytes);
		int beyond = target[bytes] != 0 || (to && target[-1] != 0);
		if (seen == DMA_DONE && same && !beyond) {
			good++;
			continue;
		}
		printf("copy %llu: ISR 0x%x, STATUS 0x%x, total %u, data %s%s\n", (unsigned long long)n, seen,
		       get(ch, STATUS), get(ch, TOTAL_BYTE), same ? "same" : "different",
		       beyond ? ", and bytes beside it changed" : "");
		if (!(seen & DMA_DONE))
			break;
	}
	printf("%llu of %llu copies of %llu bytes verified in %.2f s\n", (unsigned long long)good,
	       (unsigned long long)copies, (unsigned long long)bytes, seconds() - start);
	return good == copies;
}

/* Asks for a copy that the IOMMU has to stop. Good if the channel says so and `target` stays as it was. */
static inline int blocked(struct channel *ch, const char *what, uint64_t to, uint64_t from, uint64_t bytes,
			  uint8_t *target)
{
	memset(target, 0x5a, bytes);
	uint32_t seen = copy(ch, to, from, (uint32_t)bytes);
	/* An SMMUv2 refuses all of a context bank until its driver has cleared the fault (SCTLR.HUPCF=0). */
	usleep(50 * 1000);
	uint64_t changed = 0;
	for (uint64_t i = 0; i < bytes; i++)
		changed += target[i] != 0x5a;
	int good = (seen & AXI_ERRORS) && !changed;
	printf("%s not mapped: ISR 0x%x, %llu bytes changed: %s\n", what, seen, (unsigned long long)changed,
	       good ? "blocked" : "NOT BLOCKED");
	return good;
}

/* Copies, faults on either side, and a copy after them. */
static inline int whole_test(struct channel *ch, uint8_t *buffer, uint64_t copies, uint64_t bytes)
{
	uint8_t *target = buffer + HALF_BYTES;
	int good = verified_copies(ch, buffer, copies, bytes);

	good &= blocked(ch, "source", ch->iova + HALF_BYTES, NOT_MAPPED, bytes, target);
	good &= blocked(ch, "destination", NOT_MAPPED, ch->iova + HALF_BYTES, bytes, target);
	fill(buffer, bytes, 1);
	int again = copy(ch, ch->iova + HALF_BYTES, ch->iova, (uint32_t)bytes) == DMA_DONE && !memcmp(buffer, target, bytes);
	printf("copy after the faults: %s\n", again ? "verified" : "FAILED");
	return good && again;
}

/* After the buffer was unmapped: the old translation must be gone. */
static inline int unmapped_test(struct channel *ch, uint8_t *buffer, uint64_t bytes)
{
	int good = blocked(ch, "buffer after unmap", ch->iova + HALF_BYTES, ch->iova, bytes, buffer + HALF_BYTES);

	set(ch, IDS, ALL_INTERRUPTS);
	return good;
}

static inline uint8_t *make_buffer(void)
{
	void *at = mmap(NULL, BUFFER_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);

	if (at == MAP_FAILED)
		fail("memory for the buffer");
	return at;
}

struct options {
	uint64_t copies, bytes;
};

/* [-n copies] [-b bytes], then `arguments` more; ends the program with the usage text otherwise. */
static inline struct options parse(int argc, char **argv, int arguments, const char *usage)
{
	struct options o = { .copies = 100, .bytes = 4096 };
	int option;

	while ((option = getopt(argc, argv, "n:b:")) != -1) {
		if (option == 'n')
			o.copies = number(optarg);
		else if (option == 'b')
			o.bytes = number(optarg);
		else
			argc = 0;
	}
	if (argc - optind != arguments || o.bytes < 1 || o.bytes > (1 << 20)) {
		fprintf(stderr, "usage: %s\n", usage);
		exit(2);
	}
	return o;
}

#endif
