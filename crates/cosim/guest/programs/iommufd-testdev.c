/*
 * iommufd-testdev [-n copies] [-b bytes] <function, such as 0000:00:02.0>
 *
 * A user-space driver for the PCIe test device, by the device's own file (/dev/vfio/devices/vfioN) and iommufd: binds,
 * makes an I/O address space, maps a buffer, attaches, drives the registers through the mapped BAR and compares. Then it
 * unmaps, and the same copy must be stopped.
 *
 * Before: the function is bound to vfio-pci.
 */
#include "testdev.h"
#include <linux/iommufd.h>
#include <linux/pci_regs.h>
#include <linux/vfio.h>

#define IOVA 0x40000000ull
#define BUFFER (2ull << 20)

enum {
	SRCADDR = 0x00, DSTADDR = 0x08, SIZE = 0x10, DOORBELL = 0x18, IS_BUSY = 0x20,
	RESULT = 0x108, RESULT_DONE = 0x10c, COUNT = 0x110, SRC_HI = 0x128, DST_HI = 0x12c,
};

static volatile uint8_t *bar;

static void set(unsigned reg, uint32_t value)
{
	store(bar + reg, 4, value);
}

static uint32_t get(unsigned reg)
{
	return (uint32_t)load(bar + reg, 4);
}

static struct outcome copy(uint64_t to, uint64_t from, uint32_t bytes)
{
	struct outcome o = { 0 };
	uint32_t before = get(COUNT);

	set(SRCADDR, (uint32_t)from);
	set(SRC_HI, (uint32_t)(from >> 32));
	set(DSTADDR, (uint32_t)to);
	set(DST_HI, (uint32_t)(to >> 32));
	set(SIZE, bytes);
	__sync_synchronize();
	set(DOORBELL, 1);
	double end = seconds() + 5;
	while (get(IS_BUSY)) {
		if (seconds() > end) {
			o.error = ETIMEDOUT;
			return o;
		}
	}
	__sync_synchronize();
	if (get(COUNT) == before)
		o.error = EIO;
	o.result = get(RESULT);
	o.done = get(RESULT_DONE);
	return o;
}

/* Maps BAR 0 and switches bus mastering on, as a driver does. */
static void open_function(int device)
{
	struct vfio_region_info region = { .argsz = sizeof region, .index = VFIO_PCI_BAR0_REGION_INDEX };
	struct vfio_region_info config = { .argsz = sizeof config, .index = VFIO_PCI_CONFIG_REGION_INDEX };

	if (ioctl(device, VFIO_DEVICE_GET_REGION_INFO, &region) || ioctl(device, VFIO_DEVICE_GET_REGION_INFO, &config))
		fail("information on regions");
	printf("iommufd-testdev: BAR 0 of 0x%llx bytes, flags 0x%x\n", (unsigned long long)region.size, region.flags);
	void *at = mmap(NULL, region.size, PROT_READ | PROT_WRITE, MAP_SHARED, device, (off_t)region.offset);
	if (at == MAP_FAILED)
		fail("mapping BAR 0");
	bar = at;
	uint16_t command;
	if (pread(device, &command, 2, (off_t)config.offset + PCI_COMMAND) != 2)
		fail("reading the command register");
	command |= PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER;
	if (pwrite(device, &command, 2, (off_t)config.offset + PCI_COMMAND) != 2)
		fail("writing the command register");
}

int main(int argc, char **argv)
{
	uint64_t copies = 100, bytes = 64 << 10;
	char name[256], path[300];
	int option;

	while ((option = getopt(argc, argv, "n:b:")) != -1) {
		if (option == 'n')
			copies = number(optarg);
		else if (option == 'b')
			bytes = number(optarg);
		else
			argc = 0;
	}
	if (argc - optind != 1 || !copies || bytes < 1 || bytes > BUFFER / 2 - 4096) {
		fprintf(stderr, "usage: iommufd-testdev [-n copies] [-b bytes, up to 1044480] <function, such as 0000:00:02.0>\n");
		return 2;
	}
	int iommu = open("/dev/iommu", O_RDWR | O_CLOEXEC);
	if (iommu < 0)
		fail("/dev/iommu");
	only_entry(argv[optind], "vfio-dev", name, sizeof name);
	snprintf(path, sizeof path, "/dev/vfio/devices/%s", name);
	int device = open(path, O_RDWR | O_CLOEXEC);
	if (device < 0)
		fail(path);

	struct vfio_device_bind_iommufd bind = { .argsz = sizeof bind, .iommufd = iommu };
	if (ioctl(device, VFIO_DEVICE_BIND_IOMMUFD, &bind))
		fail("binding to iommufd");
	struct iommu_ioas_alloc space = { .size = sizeof space };
	if (ioctl(iommu, IOMMU_IOAS_ALLOC, &space))
		fail("an I/O address space");
	uint8_t *buffer = mmap(NULL, BUFFER, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (buffer == MAP_FAILED)
		fail("memory");
	struct iommu_ioas_map map = {
		.size = sizeof map, .ioas_id = space.out_ioas_id,
		.flags = IOMMU_IOAS_MAP_FIXED_IOVA | IOMMU_IOAS_MAP_READABLE | IOMMU_IOAS_MAP_WRITEABLE,
		.user_va = (uintptr_t)buffer, .length = BUFFER, .iova = IOVA,
	};
	if (ioctl(iommu, IOMMU_IOAS_MAP, &map))
		fail("mapping the buffer");
	struct vfio_device_attach_iommufd_pt attach = { .argsz = sizeof attach, .pt_id = space.out_ioas_id };
	if (ioctl(device, VFIO_DEVICE_ATTACH_IOMMUFD_PT, &attach))
		fail("attaching to the address space");
	printf("iommufd-testdev: %s, device %u in address space %u, domain %u\n", name, bind.out_devid, space.out_ioas_id,
	       attach.pt_id);
	open_function(device);
	struct abilities a = abilities_of(argv[optind]);
	printf("iommufd-testdev: ATS %s\n", !a.ats ? "absent" : a.ats_on ? "on" : "off");

	uint8_t *target = buffer + BUFFER / 2;
	uint64_t good = 0;
	struct outcome o = { 0 };
	double start = seconds();
	for (uint64_t n = 0; n < copies && !o.error; n++) {
		uint64_t from = n * 7 % 4096, to = n * 13 % 4096;
		fill(buffer + from, bytes, (uint32_t)n);
		memset(target, 0, BUFFER / 2);
		o = copy(IOVA + BUFFER / 2 + to, IOVA + from, (uint32_t)bytes);
		int same = !memcmp(buffer + from, target + to, bytes);
		good += is_good(o) && same;
		if (!is_good(o) || !same)
			printf("iommufd-testdev: copy %llu: %s, data %s\n", (unsigned long long)n, told(o),
			       same ? "same" : "different");
	}
	printf("iommufd-testdev: %llu of %llu copies of %llu bytes verified in %.2f s\n", (unsigned long long)good,
	       (unsigned long long)copies, (unsigned long long)bytes, seconds() - start);

	struct iommu_ioas_unmap unmap = {
		.size = sizeof unmap, .ioas_id = space.out_ioas_id, .iova = IOVA, .length = BUFFER,
	};
	if (ioctl(iommu, IOMMU_IOAS_UNMAP, &unmap) || unmap.length != BUFFER)
		fail("unmapping the buffer");
	memset(target, 0x5a, BUFFER / 2);
	o = copy(IOVA + BUFFER / 2, IOVA, (uint32_t)bytes);
	uint64_t changed = differing(target, BUFFER / 2, 0x5a);
	int blocked = is_stopped(o) && !changed;
	printf("iommufd-testdev: after unmap: %s, %llu bytes changed: %s\n", told(o), (unsigned long long)changed,
	       blocked ? "blocked" : "NOT BLOCKED");

	if (ioctl(iommu, IOMMU_IOAS_MAP, &map))
		fail("mapping the buffer again");
	fill(buffer, bytes, 1);
	o = copy(IOVA + BUFFER / 2, IOVA, (uint32_t)bytes);
	int again = is_good(o) && !memcmp(buffer, target, bytes);
	printf("iommufd-testdev: mapped again: %s, %s\n", told(o), again ? "verified" : "NOT VERIFIED");
	int all = good == copies && blocked && again;
	printf("iommufd-testdev: %s\n", all ? "pass" : "FAIL");
	return !all;
}
