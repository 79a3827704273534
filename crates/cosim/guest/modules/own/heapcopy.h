/* SPDX-License-Identifier: MIT OR GPL-2.0 */
/* What user space asks of portcullis_heapcopy: ioctls on /dev/portcullis-heapcopy. */
#ifndef PORTCULLIS_HEAPCOPY_H
#define PORTCULLIS_HEAPCOPY_H

#include <linux/ioctl.h>
#include <linux/types.h>

/* A copy between two dma-bufs, by a channel of the DMA engine framework. */
struct heapcopy {
	__s32 src_fd;
	__s32 dst_fd;
	__u64 bytes;
	__u32 src_segments; /* out: contiguous ranges for the device */
	__u32 dst_segments;
	__u32 transfers;    /* out: one for each range that is contiguous on both sides */
	__u32 unused;
	__u64 src_iova;     /* out: where each begins for the device */
	__u64 dst_iova;
};

/* A copy between addresses that nobody mapped for the channel. */
struct heapcopy_stray {
	__u64 src;
	__u64 dst;
	__u32 bytes;
	__u32 timed_out; /* out: the channel never said that it is done */
};

#define HEAPCOPY_COPY _IOWR('H', 1, struct heapcopy)
#define HEAPCOPY_STRAY _IOWR('H', 2, struct heapcopy_stray)

#endif
