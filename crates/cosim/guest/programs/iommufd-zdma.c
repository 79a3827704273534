/*
 * iommufd-zdma [-n copies] [-b bytes] <device>
 *
 * What vfio-zdma does, by the newer interface: the device's own file (/dev/vfio/devices/vfioN) bound to an iommufd
 * context, with an I/O address space that the buffer is mapped into. Needs a kernel with IOMMUFD and VFIO_DEVICE_CDEV.
 *
 * Before: the channel is bound to vfio-platform (reset_required=0), iommufd has allow_unsafe_interrupts=1.
 */
#include "zdma.h"
#include <dirent.h>
#include <linux/iommufd.h>

/* Opens the file of a platform device. */
static int open_device(const char *name)
{
	char path[300];

	snprintf(path, sizeof path, "/sys/bus/platform/devices/%s/vfio-dev", name);
	DIR *directory = opendir(path);
	if (!directory)
		fail(path);
	struct dirent *entry;
	while ((entry = readdir(directory)) && entry->d_name[0] == '.')
		;
	if (!entry) {
		fprintf(stderr, "%s has no file: is it bound to vfio-platform?\n", name);
		exit(1);
	}
	snprintf(path, sizeof path, "/dev/vfio/devices/%s", entry->d_name);
	closedir(directory);
	int file = open(path, O_RDWR | O_CLOEXEC);
	if (file < 0)
		fail(path);
	return file;
}

int main(int argc, char **argv)
{
	struct options o = parse(argc, argv, 1, "iommufd-zdma [-n copies] [-b bytes, up to 1 MiB] <device>");
	struct channel ch = { .interrupt = -1, .iova = IOVA };

	int iommu = open("/dev/iommu", O_RDWR | O_CLOEXEC);
	if (iommu < 0)
		fail("/dev/iommu");
	ch.device = open_device(argv[optind]);
	struct vfio_device_bind_iommufd bind = { .argsz = sizeof bind, .iommufd = iommu };
	if (ioctl(ch.device, VFIO_DEVICE_BIND_IOMMUFD, &bind))
		fail("binding to iommufd (iommufd allow_unsafe_interrupts=1?)");
	struct iommu_ioas_alloc space = { .size = sizeof space };
	if (ioctl(iommu, IOMMU_IOAS_ALLOC, &space))
		fail("an I/O address space");
	struct vfio_device_attach_iommufd_pt attach = { .argsz = sizeof attach, .pt_id = space.out_ioas_id };
	if (ioctl(ch.device, VFIO_DEVICE_ATTACH_IOMMUFD_PT, &attach))
		fail("attaching to the address space");

	uint8_t *buffer = make_buffer();
	struct iommu_ioas_map map = {
		.size = sizeof map, .ioas_id = space.out_ioas_id,
		.flags = IOMMU_IOAS_MAP_FIXED_IOVA | IOMMU_IOAS_MAP_READABLE | IOMMU_IOAS_MAP_WRITEABLE,
		.user_va = (uintptr_t)buffer, .length = BUFFER_BYTES, .iova = IOVA,
	};
	if (ioctl(iommu, IOMMU_IOAS_MAP, &map))
		fail("mapping the buffer");
	open_channel(&ch);
	int good = whole_test(&ch, buffer, o.copies, o.bytes);

	struct iommu_ioas_unmap unmap = {
		.size = sizeof unmap, .ioas_id = space.out_ioas_id, .iova = IOVA, .length = BUFFER_BYTES,
	};
	if (ioctl(iommu, IOMMU_IOAS_UNMAP, &unmap) || unmap.length != BUFFER_BYTES)
		fail("unmapping the buffer");
	good &= unmapped_test(&ch, buffer, o.bytes);
	printf("iommufd-zdma: %s\n", good ? "pass" : "FAIL");
	return !good;
}
