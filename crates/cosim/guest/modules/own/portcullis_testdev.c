// SPDX-License-Identifier: MIT OR GPL-2.0
/*
 * Driver of the PCIe test device (1ae0:006b) with its extension block: copies for user programs, at their own addresses
 * (SVA, with a PASID), at addresses of the DMA API, or at any address at all. The last is what an IOMMU is there for.
 *
 * The device has no interrupt that a kernel would know of: STATUS is polled, with a limit.
 */
#include <linux/dma-mapping.h>
#include <linux/fs.h>
#include <linux/gfp.h>
#include <linux/idr.h>
#include <linux/io.h>
#include <linux/iommu.h>
#include <linux/iopoll.h>
#include <linux/kref.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/pci.h>
#include <linux/sched/mm.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "testdev.h"

#define NAME "portcullis_testdev"

enum {
	SRCADDR = 0x00,
	DSTADDR = 0x08,
	SIZE = 0x10,
	DOORBELL = 0x18,
	STATUS = 0x20,
	PASID_CTRL = 0x100,
	RESULT = 0x108,
	RESULT_DONE = 0x10c,
	COUNT = 0x110,
	SRC_HI = 0x128,
	DST_HI = 0x12c,
};

#define PASID_ENABLE BIT(31)
#define PASID_MASK GENMASK(19, 0)
#define LONGEST_MS 10000

/* Lives until the device is gone and every file is closed. */
struct testdev {
	struct kref users;
	struct miscdevice misc;
	char name[32];
	int number;
	/* One transfer at a time; also guards what follows. */
	struct mutex lock;
	struct pci_dev *pci; /* NULL when the device is gone */
	void __iomem *bar;
	struct list_head files;
};

/* Of one open file. */
struct session {
	struct testdev *dev;
	struct list_head entry;
	struct iommu_sva *sva;
};

struct transfer {
	u64 src, dst;
	u32 bytes;
	u32 pasid; /* as PASID_CTRL wants it */
	u32 timeout_ms;
	u32 result, done;
};

static DEFINE_IDA(numbers);

static void testdev_free(struct kref *users)
{
	struct testdev *dev = container_of(users, struct testdev, users);

	ida_free(&numbers, dev->number);
	kfree(dev);
}

/* Needs the lock. The device takes its registers when the transfer begins. */
static int transfer(struct testdev *dev, struct transfer *t)
{
	u32 limit = clamp(t->timeout_ms ?: 1000u, 1u, (u32)LONGEST_MS);
	u32 before, status;
	int error;

	if (readl(dev->bar + STATUS))
		return -EBUSY;
	before = readl(dev->bar + COUNT);
	/* The low halves clear the high ones. */
	writel(lower_32_bits(t->src), dev->bar + SRCADDR);
	writel(upper_32_bits(t->src), dev->bar + SRC_HI);
	writel(lower_32_bits(t->dst), dev->bar + DSTADDR);
	writel(upper_32_bits(t->dst), dev->bar + DST_HI);
	writel(t->bytes, dev->bar + SIZE);
	writel(t->pasid, dev->bar + PASID_CTRL);
	writel(1, dev->bar + DOORBELL);
	error = readl_poll_timeout(dev->bar + STATUS, status, !status, 50, (u64)limit * USEC_PER_MSEC);
	if (error) {
		pci_err(dev->pci, "a transfer of %u bytes from %#llx to %#llx has not ended after %u ms: STATUS %#x\n",
			t->bytes, t->src, t->dst, limit, status);
		return error;
	}
	if (readl(dev->bar + COUNT) == before) {
		pci_err(dev->pci, "the doorbell started no transfer\n");
		return -EIO;
	}
	t->result = readl(dev->bar + RESULT);
	t->done = readl(dev->bar + RESULT_DONE);
	return 0;
}

static int copy(struct session *s, struct testdev_copy __user *argument)
{
	struct testdev_copy c;
	struct transfer t;
	int error;

	if (copy_from_user(&c, argument, sizeof(c)))
		return -EFAULT;
	t = (struct transfer){ .src = c.src, .dst = c.dst, .bytes = c.bytes, .timeout_ms = c.timeout_ms };
	switch (c.mode) {
	case TESTDEV_NO_PASID:
		break;
	case TESTDEV_OWN_PASID:
		if (!s->sva)
			return -ENOTCONN;
		t.pasid = PASID_ENABLE | iommu_sva_get_pasid(s->sva);
		break;
	case TESTDEV_ANY_PASID:
		t.pasid = PASID_ENABLE | (c.pasid & PASID_MASK);
		break;
	default:
		return -EINVAL;
	}
	if (!c.bytes)
		return -EINVAL;
	error = transfer(s->dev, &t);
	if (error)
		return error;
	c.result = t.result;
	c.done = t.done;
	return copy_to_user(argument, &c, sizeof(c)) ? -EFAULT : 0;
}

/* Bytes that are not `value`. */
static u32 others(const u8 *at, u32 bytes, u8 value)
{
	u32 n = 0;

	while (bytes--)
		n += *at++ != value;
	return n;
}

static int copy_mapped(struct testdev *dev, struct testdev_mapped __user *argument)
{
	struct device *d = &dev->pci->dev;
	struct testdev_mapped m;
	struct transfer t = {};
	size_t size;
	u8 *src, *dst;
	int error;

	if (copy_from_user(&m, argument, sizeof(m)))
		return -EFAULT;
	if (!m.bytes || m.bytes > TESTDEV_MAPPED_BYTES)
		return -EINVAL;
	/* Whole pages: an IOMMU maps no less, and nothing else is to lie beside them. */
	size = PAGE_ALIGN(m.bytes);
	src = alloc_pages_exact(size, GFP_KERNEL | __GFP_ZERO);
	dst = alloc_pages_exact(size, GFP_KERNEL | __GFP_ZERO);
	error = -ENOMEM;
	if (!src || !dst)
		goto free;
	error = -EFAULT;
	if (copy_from_user(src, u64_to_user_ptr(m.src), m.bytes))
		goto free;

	m.src_iova = dma_map_single(d, src, size, DMA_TO_DEVICE);
	error = dma_mapping_error(d, m.src_iova);
	if (error)
		goto free;
	m.dst_iova = dma_map_single(d, dst, size, DMA_FROM_DEVICE);
	error = dma_mapping_error(d, m.dst_iova);
	if (error) {
		dma_unmap_single(d, m.src_iova, size, DMA_TO_DEVICE);
		goto free;
	}
	t = (struct transfer){ .src = m.src_iova, .dst = m.dst_iova, .bytes = m.bytes };
	error = transfer(dev, &t);
	dma_unmap_single(d, m.src_iova, size, DMA_TO_DEVICE);
	dma_unmap_single(d, m.dst_iova, size, DMA_FROM_DEVICE);
	if (error)
		goto free;
	m.result = t.result;
	error = -EFAULT;
	if (copy_to_user(u64_to_user_ptr(m.dst), dst, m.bytes))
		goto free;

	memset(dst, 0x5a, size);
	/* Or the device could see what the CPU has not written out yet, if it saw anything. */
	mb();
	error = transfer(dev, &t);
	if (error)
		goto free;
	m.late_result = t.result;
	m.late_writes = others(dst, size, 0x5a);
	error = copy_to_user(argument, &m, sizeof(m)) ? -EFAULT : 0;
free:
	if (src)
		free_pages_exact(src, size);
	if (dst)
		free_pages_exact(dst, size);
	return error;
}

static int bind(struct session *s, u32 __user *argument)
{
	struct iommu_sva *sva;

	if (s->sva)
		return -EBUSY;
	sva = iommu_sva_bind_device(&s->dev->pci->dev, current->mm);
	if (IS_ERR(sva))
		return PTR_ERR(sva);
	if (put_user(iommu_sva_get_pasid(sva), argument)) {
		iommu_sva_unbind_device(sva);
		return -EFAULT;
	}
	s->sva = sva;
	return 0;
}

static void unbind(struct session *s)
{
	if (s->sva)
		iommu_sva_unbind_device(s->sva);
	s->sva = NULL;
}

static long testdev_ioctl(struct file *file, unsigned int command, unsigned long argument)
{
	struct session *s = file->private_data;
	void __user *user = (void __user *)argument;
	long error;

	if (mutex_lock_interruptible(&s->dev->lock))
		return -ERESTARTSYS;
	if (!s->dev->pci) {
		error = -ENODEV;
		goto out;
	}
	switch (command) {
	case TESTDEV_BIND_SVA:
		error = bind(s, user);
		break;
	case TESTDEV_UNBIND:
		unbind(s);
		error = 0;
		break;
	case TESTDEV_COPY:
		error = copy(s, user);
		break;
	case TESTDEV_COPY_MAPPED:
		error = copy_mapped(s->dev, user);
		break;
	default:
		error = -ENOTTY;
	}
out:
	mutex_unlock(&s->dev->lock);
	return error;
}

static int testdev_open(struct inode *inode, struct file *file)
{
	/* The misc layer leaves its device here, and holds it registered while this runs. */
	struct testdev *dev = container_of(file->private_data, struct testdev, misc);
	struct session *s = kzalloc(sizeof(*s), GFP_KERNEL);

	if (!s)
		return -ENOMEM;
	kref_get(&dev->users);
	s->dev = dev;
	file->private_data = s;
	mutex_lock(&dev->lock);
	list_add(&s->entry, &dev->files);
	mutex_unlock(&dev->lock);
	return 0;
}

static int testdev_release(struct inode *inode, struct file *file)
{
	struct session *s = file->private_data;
	struct testdev *dev = s->dev;

	mutex_lock(&dev->lock);
	unbind(s);
	list_del(&s->entry);
	mutex_unlock(&dev->lock);
	kfree(s);
	kref_put(&dev->users, testdev_free);
	return 0;
}

static const struct file_operations testdev_operations = {
	.owner = THIS_MODULE,
	.open = testdev_open,
	.release = testdev_release,
	.unlocked_ioctl = testdev_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
};

static int testdev_probe(struct pci_dev *pci, const struct pci_device_id *id)
{
	struct testdev *dev;
	int error;

	error = pcim_enable_device(pci);
	if (error)
		return error;
	error = dma_set_mask_and_coherent(&pci->dev, DMA_BIT_MASK(64));
	if (error)
		return error;

	dev = kzalloc(sizeof(*dev), GFP_KERNEL);
	if (!dev)
		return -ENOMEM;
	kref_init(&dev->users);
	mutex_init(&dev->lock);
	INIT_LIST_HEAD(&dev->files);
	dev->pci = pci;
	dev->number = ida_alloc(&numbers, GFP_KERNEL);
	if (dev->number < 0) {
		error = dev->number;
		kfree(dev);
		return error;
	}
	dev->bar = pcim_iomap_region(pci, 0, NAME);
	if (IS_ERR(dev->bar)) {
		error = PTR_ERR(dev->bar);
		goto put;
	}
	/* Without the extension block there is neither a result nor a PASID. */
	writel(PASID_MASK, dev->bar + PASID_CTRL);
	if (readl(dev->bar + PASID_CTRL) != PASID_MASK) {
		error = dev_err_probe(&pci->dev, -ENODEV, "no extended registers\n");
		goto put;
	}
	writel(0, dev->bar + PASID_CTRL);
	pci_set_master(pci);

	snprintf(dev->name, sizeof(dev->name), "portcullis-testdev%d", dev->number);
	dev->misc.minor = MISC_DYNAMIC_MINOR;
	dev->misc.name = dev->name;
	dev->misc.fops = &testdev_operations;
	dev->misc.parent = &pci->dev;
	pci_set_drvdata(pci, dev);
	error = misc_register(&dev->misc);
	if (error)
		goto stop;
	pci_info(pci, "%s\n", dev->name);
	return 0;

stop:
	pci_clear_master(pci);
put:
	kref_put(&dev->users, testdev_free);
	return error;
}

static void testdev_remove(struct pci_dev *pci)
{
	struct testdev *dev = pci_get_drvdata(pci);
	struct session *s;

	misc_deregister(&dev->misc);
	/* Files may still be open: from here on they are told that it is gone. */
	mutex_lock(&dev->lock);
	pci_clear_master(pci);
	list_for_each_entry(s, &dev->files, entry)
		unbind(s);
	dev->pci = NULL;
	dev->bar = NULL;
	mutex_unlock(&dev->lock);
	kref_put(&dev->users, testdev_free);
}

static const struct pci_device_id testdev_ids[] = {
	{ PCI_DEVICE(0x1ae0, 0x006b) },
	{}
};
MODULE_DEVICE_TABLE(pci, testdev_ids);

static struct pci_driver testdev_driver = {
	.name = NAME,
	.id_table = testdev_ids,
	.probe = testdev_probe,
	.remove = testdev_remove,
};
module_pci_driver(testdev_driver);

MODULE_DESCRIPTION("PCIe DMA test device, for user programs, with SVA");
MODULE_LICENSE("Dual MIT/GPL");
