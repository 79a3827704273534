/* SPDX-License-Identifier: MIT OR GPL-2.0 */
/* What user space asks of the PCIe test device's driver: ioctls on /dev/portcullis-testdevN. */
#ifndef PORTCULLIS_TESTDEV_H
#define PORTCULLIS_TESTDEV_H

#include <linux/ioctl.h>
#include <linux/types.h>

/* What TESTDEV_COPY carries: nothing (addresses are the device's own), the PASID that this file is bound with, or one
 * that the caller names, which may be nobody's. */
#define TESTDEV_NO_PASID 0
#define TESTDEV_OWN_PASID 1
#define TESTDEV_ANY_PASID 2

/* A transfer. The driver touches neither buffer: whether anything arrived is seen by looking. */
struct testdev_copy {
	__u64 src;
	__u64 dst;
	__u32 bytes;
	__u32 mode;       /* in: TESTDEV_..._PASID */
	__u32 pasid;      /* in: for TESTDEV_ANY_PASID */
	__u32 timeout_ms; /* in: 0 for a second; at most ten */
	__u32 result;     /* out: the device's RESULT; 0 is good */
	__u32 done;       /* out: bytes that had arrived when it failed */
};

/* RESULT: how it ended in the low byte, and which side failed. */
#define TESTDEV_TERMINATED 1
#define TESTDEV_DESTINATION 0x100

/* A copy between two buffers of the kernel, mapped with the DMA API: `src` goes in, what came out goes to `dst`. Then
 * the mappings are taken away and the device is asked for the same again. */
struct testdev_mapped {
	__u64 src;
	__u64 dst;
	__u32 bytes;       /* in: at most TESTDEV_MAPPED_BYTES */
	__u32 result;      /* out: of the copy */
	__u32 late_result; /* out: of the one after the unmapping */
	__u32 late_writes; /* out: bytes that the late one changed */
	__u64 src_iova;    /* out: where the device saw them */
	__u64 dst_iova;
};
#define TESTDEV_MAPPED_BYTES (1u << 20)

/* Binds the caller's address space to the device, until TESTDEV_UNBIND or the last close; returns the PASID. */
#define TESTDEV_BIND_SVA _IOR('T', 1, __u32)
#define TESTDEV_UNBIND _IO('T', 2)
#define TESTDEV_COPY _IOWR('T', 3, struct testdev_copy)
#define TESTDEV_COPY_MAPPED _IOWR('T', 4, struct testdev_mapped)

#endif
