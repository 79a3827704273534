// SPDX-License-Identifier: MIT OR GPL-2.0
/*
 * Lets a channel of the DMA engine framework copy from one dma-buf to another: attach, map, one transfer for each range
 * that is contiguous for the device on both sides. The kernel's own driver of the channel does the work.
 *
 * The parameter `device` says whose channel an open file gets (`30200000.dma-controller`); empty for anybody's.
 */
#include <linux/completion.h>
#include <linux/dma-buf.h>
#include <linux/dma-mapping.h>
#include <linux/dmaengine.h>
#include <linux/fs.h>
#include <linux/minmax.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/scatterlist.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "heapcopy.h"

/* How long a transfer may take. */
#define LIMIT_MS 2000
/* What a transfer moves at most: a driver may keep its length in a field of registers. */
#define LARGEST (1u << 20)

static char device[64];
module_param_string(device, device, sizeof(device), 0644);
MODULE_PARM_DESC(device, "whose channel to use, by the device's name; empty: any");

/* Of one open file. */
struct session {
	struct mutex lock;
	struct dma_chan *channel;
};

/* A dma-buf as the channel sees it. */
struct import {
	struct dma_buf *buffer;
	struct dma_buf_attachment *attachment;
	struct sg_table *table;
	enum dma_data_direction direction;
};

static void transfer_done(void *done)
{
	complete(done);
}

static int transfer(struct dma_chan *channel, dma_addr_t dst, dma_addr_t src, size_t bytes)
{
	DECLARE_COMPLETION_ONSTACK(done);
	struct dma_async_tx_descriptor *tx;
	dma_cookie_t cookie;

	tx = dmaengine_prep_dma_memcpy(channel, dst, src, bytes, DMA_PREP_INTERRUPT | DMA_CTRL_ACK);
	if (!tx)
		return -EIO;
	tx->callback = transfer_done;
	tx->callback_param = &done;
	cookie = dmaengine_submit(tx);
	if (dma_submit_error(cookie))
		return -EIO;
	dma_async_issue_pending(channel);
	if (!wait_for_completion_timeout(&done, msecs_to_jiffies(LIMIT_MS))) {
		/* No callback comes after this. */
		dmaengine_terminate_sync(channel);
		return -ETIMEDOUT;
	}
	return dma_async_is_tx_complete(channel, cookie, NULL, NULL) == DMA_ERROR ? -EIO : 0;
}

static int import(struct import *i, int fd, u64 bytes, struct device *dev)
{
	int error;

	i->buffer = dma_buf_get(fd);
	if (IS_ERR(i->buffer))
		return PTR_ERR(i->buffer);
	error = -EINVAL;
	if (bytes > i->buffer->size)
		goto put;
	i->attachment = dma_buf_attach(i->buffer, dev);
	error = PTR_ERR_OR_ZERO(i->attachment);
	if (error)
		goto put;
	i->table = dma_buf_map_attachment_unlocked(i->attachment, i->direction);
	error = PTR_ERR_OR_ZERO(i->table);
	if (!error)
		return 0;
	dma_buf_detach(i->buffer, i->attachment);
put:
	dma_buf_put(i->buffer);
	return error;
}

static void release(struct import *i)
{
	dma_buf_unmap_attachment_unlocked(i->attachment, i->table, i->direction);
	dma_buf_detach(i->buffer, i->attachment);
	dma_buf_put(i->buffer);
}

/* Where the next byte of a list is. */
struct place {
	struct scatterlist *at;
	size_t offset;
};

static size_t room(const struct place *p)
{
	return p->at ? sg_dma_len(p->at) - p->offset : 0;
}

static void advance(struct place *p, size_t bytes)
{
	p->offset += bytes;
	if (p->offset == sg_dma_len(p->at)) {
		p->at = sg_next(p->at);
		p->offset = 0;
	}
}

static int copy(struct session *s, struct heapcopy __user *argument)
{
	struct import src = { .direction = DMA_TO_DEVICE }, dst = { .direction = DMA_FROM_DEVICE };
	struct device *dev = s->channel->device->dev;
	struct place from, to;
	struct heapcopy c;
	u64 left;
	int error;

	if (copy_from_user(&c, argument, sizeof(c)))
		return -EFAULT;
	if (!c.bytes)
		return -EINVAL;
	error = import(&src, c.src_fd, c.bytes, dev);
	if (error)
		return error;
	error = import(&dst, c.dst_fd, c.bytes, dev);
	if (error)
		goto release_src;
	c.src_segments = src.table->nents;
	c.dst_segments = dst.table->nents;
	c.src_iova = sg_dma_address(src.table->sgl);
	c.dst_iova = sg_dma_address(dst.table->sgl);
	c.transfers = 0;
	from = (struct place){ .at = src.table->sgl };
	to = (struct place){ .at = dst.table->sgl };
	for (left = c.bytes; left && !error; c.transfers++) {
		size_t n = min3(room(&from), room(&to), (size_t)min(left, (u64)LARGEST));

		error = -EINVAL;
		if (!n)
			break;
		error = transfer(s->channel, sg_dma_address(to.at) + to.offset, sg_dma_address(from.at) + from.offset, n);
		advance(&from, n);
		advance(&to, n);
		left -= n;
	}
	release(&dst);
	if (!error && copy_to_user(argument, &c, sizeof(c)))
		error = -EFAULT;
release_src:
	release(&src);
	return error;
}

static int stray(struct session *s, struct heapcopy_stray __user *argument)
{
	struct heapcopy_stray c;
	int error;

	if (copy_from_user(&c, argument, sizeof(c)))
		return -EFAULT;
	if (!c.bytes || c.bytes > LARGEST)
		return -EINVAL;
	error = transfer(s->channel, c.dst, c.src, c.bytes);
	if (error && error != -ETIMEDOUT)
		return error;
	c.timed_out = error == -ETIMEDOUT;
	return copy_to_user(argument, &c, sizeof(c)) ? -EFAULT : 0;
}

static long heapcopy_ioctl(struct file *file, unsigned int command, unsigned long argument)
{
	struct session *s = file->private_data;
	long error;

	if (mutex_lock_interruptible(&s->lock))
		return -ERESTARTSYS;
	switch (command) {
	case HEAPCOPY_COPY:
		error = copy(s, (void __user *)argument);
		break;
	case HEAPCOPY_STRAY:
		error = stray(s, (void __user *)argument);
		break;
	default:
		error = -ENOTTY;
	}
	mutex_unlock(&s->lock);
	return error;
}

static bool is_wanted(struct dma_chan *channel, void *wanted)
{
	const char *name = wanted;

	return !*name || !strcmp(dev_name(channel->device->dev), name);
}

static int heapcopy_open(struct inode *inode, struct file *file)
{
	struct session *s = kzalloc(sizeof(*s), GFP_KERNEL);
	char wanted[sizeof(device)];
	dma_cap_mask_t mask;

	if (!s)
		return -ENOMEM;
	kernel_param_lock(THIS_MODULE);
	strscpy(wanted, device);
	kernel_param_unlock(THIS_MODULE);
	/* A shell's echo ends with a new line. */
	wanted[strcspn(wanted, "\n")] = 0;
	dma_cap_zero(mask);
	dma_cap_set(DMA_MEMCPY, mask);
	s->channel = dma_request_channel(mask, is_wanted, wanted);
	if (!s->channel) {
		kfree(s);
		return -ENODEV;
	}
	mutex_init(&s->lock);
	file->private_data = s;
	return 0;
}

static int heapcopy_release(struct inode *inode, struct file *file)
{
	struct session *s = file->private_data;

	dma_release_channel(s->channel);
	kfree(s);
	return 0;
}

static const struct file_operations heapcopy_operations = {
	.owner = THIS_MODULE,
	.open = heapcopy_open,
	.release = heapcopy_release,
	.unlocked_ioctl = heapcopy_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
};

static struct miscdevice heapcopy_misc = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "portcullis-heapcopy",
	.fops = &heapcopy_operations,
};
module_misc_device(heapcopy_misc);

MODULE_DESCRIPTION("Copies between dma-bufs by a DMA engine channel");
MODULE_LICENSE("Dual MIT/GPL");
MODULE_IMPORT_NS("DMA_BUF");
