/*
 * vfio-zdma [-n copies] [-b bytes] <group> <device>
 *
 * A user-space driver for one ZynqMP DMA channel, through vfio-platform and a VFIO group: maps a buffer, lets the
 * channel copy inside it and compares; interrupts arrive as an eventfd. Then it asks for copies from and to an address
 * that is not mapped, which must not happen, for a good one after that, and for one more when the buffer is unmapped.
 *
 * Before: the channel is bound to vfio-platform (loaded with reset_required=0), and vfio_iommu_type1 is loaded with
 * allow_unsafe_interrupts=1, as a wired interrupt counts as unsafe.
 */
#include "zdma.h"

static int open_container(const char *group, const char *name, int *device)
{
	char path[64];
	struct vfio_group_status status = { .argsz = sizeof status };

	int container = open("/dev/vfio/vfio", O_RDWR | O_CLOEXEC);
	if (container < 0)
		fail("/dev/vfio/vfio");
	snprintf(path, sizeof path, "/dev/vfio/%s", group);
	int file = open(path, O_RDWR | O_CLOEXEC);
	if (file < 0)
		fail(path);
	if (ioctl(file, VFIO_GROUP_GET_STATUS, &status))
		fail("status of the group");
	if (!(status.flags & VFIO_GROUP_FLAGS_VIABLE)) {
		fprintf(stderr, "group %s is not viable: some device of it has another driver\n", group);
		exit(1);
	}
	if (ioctl(file, VFIO_GROUP_SET_CONTAINER, &container))
		fail("adding the group to a container");
	if (ioctl(container, VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU))
		fail("type 1 IOMMU (vfio_iommu_type1 allow_unsafe_interrupts=1?)");
	*device = ioctl(file, VFIO_GROUP_GET_DEVICE_FD, name);
	if (*device < 0)
		fail(name);
	return container;
}

int main(int argc, char **argv)
{
	struct options o = parse(argc, argv, 2, "vfio-zdma [-n copies] [-b bytes, up to 1 MiB] <group> <device>");
	struct channel ch = { .interrupt = -1, .iova = IOVA };
	int container = open_container(argv[optind], argv[optind + 1], &ch.device);
	uint8_t *buffer = make_buffer();

	struct vfio_iommu_type1_dma_map map = {
		.argsz = sizeof map, .flags = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE,
		.vaddr = (uintptr_t)buffer, .iova = IOVA, .size = BUFFER_BYTES,
	};
	if (ioctl(container, VFIO_IOMMU_MAP_DMA, &map))
		fail("mapping the buffer");
	open_channel(&ch);
	int good = whole_test(&ch, buffer, o.copies, o.bytes);

	struct vfio_iommu_type1_dma_unmap unmap = { .argsz = sizeof unmap, .iova = IOVA, .size = BUFFER_BYTES };
	if (ioctl(container, VFIO_IOMMU_UNMAP_DMA, &unmap) || unmap.size != BUFFER_BYTES)
		fail("unmapping the buffer");
	good &= unmapped_test(&ch, buffer, o.bytes);
	printf("vfio-zdma: %s\n", good ? "pass" : "FAIL");
	return !good;
}
