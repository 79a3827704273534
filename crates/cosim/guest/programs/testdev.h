/* What programs for the PCIe test device share: its file, its configuration space, copies. */
#ifndef TESTDEV_H
#define TESTDEV_H

#include "common.h"
#include "../modules/own/testdev.h"
#include <dirent.h>
#include <sys/ioctl.h>

static inline void fail(const char *what)
{
	fprintf(stderr, "%s: %s\n", what, strerror(errno));
	exit(1);
}

/* The name of the only thing in a directory that sysfs has for a device. */
static inline void only_entry(const char *bdf, const char *directory, char *name, size_t room)
{
	char path[300];

	snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/%s", bdf, directory);
	DIR *opened = opendir(path);
	if (!opened)
		fail(path);
	struct dirent *entry;
	while ((entry = readdir(opened)) && entry->d_name[0] == '.')
		;
	if (!entry) {
		fprintf(stderr, "%s is empty\n", path);
		exit(1);
	}
	snprintf(name, room, "%s", entry->d_name);
	closedir(opened);
}

/* Opens the file that portcullis_testdev has for a function. */
static inline int open_testdev(const char *bdf)
{
	char name[256], path[300];

	only_entry(bdf, "misc", name, sizeof name);
	snprintf(path, sizeof path, "/dev/%s", name);
	int file = open(path, O_RDWR | O_CLOEXEC);
	if (file < 0)
		fail(path);
	return file;
}

/* Extended capabilities of a function, with their control registers. */
struct abilities {
	int ats, pri, pasid;             /* it has them */
	int ats_on, pri_on, pasid_on;    /* the kernel switched them on */
};

static inline struct abilities abilities_of(const char *bdf)
{
	struct abilities a = { 0 };
	uint8_t config[4096];
	char path[300];

	snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/config", bdf);
	int file = open(path, O_RDONLY | O_CLOEXEC);
	if (file < 0)
		fail(path);
	ssize_t got = read(file, config, sizeof config);
	close(file);
	if (got < (ssize_t)sizeof config) {
		fprintf(stderr, "%s has %zd bytes: no extended capabilities\n", path, got);
		return a;
	}
	/* Each begins with its number, a version and the place of the next. */
	for (unsigned at = 0x100, n = 0; at >= 0x100 && at + 8 <= sizeof config && n < 100; n++) {
		uint32_t header;
		uint16_t control4, control6;

		memcpy(&header, config + at, 4);
		memcpy(&control4, config + at + 4, 2);
		memcpy(&control6, config + at + 6, 2);
		switch (header & 0xffff) {
		case 0x0f: a.ats = 1; a.ats_on = control6 >> 15; break;
		case 0x13: a.pri = 1; a.pri_on = control4 & 1; break;
		case 0x1b: a.pasid = 1; a.pasid_on = control6 & 1; break;
		}
		at = header >> 20;
	}
	return a;
}

/* The outcome of a transfer. */
struct outcome {
	int error; /* errno, if the driver has none */
	uint32_t result, done;
};

static inline struct outcome transfer(int device, uint64_t to, uint64_t from, uint32_t bytes, uint32_t mode, uint32_t pasid)
{
	struct testdev_copy c = {
		.src = from, .dst = to, .bytes = bytes, .mode = mode, .pasid = pasid, .timeout_ms = 5000,
	};
	struct outcome o = { 0 };

	if (ioctl(device, TESTDEV_COPY, &c))
		o.error = errno;
	o.result = c.result;
	o.done = c.done;
	return o;
}

/* The IOMMU stopped it, and the device says so. */
static inline int is_stopped(struct outcome o)
{
	return !o.error && (o.result & 0xff) == TESTDEV_TERMINATED;
}

static inline int is_good(struct outcome o)
{
	return !o.error && !o.result;
}

static inline const char *told(struct outcome o)
{
	static char text[100];

	if (o.error)
		snprintf(text, sizeof text, "no end: %s", strerror(o.error));
	else if (!o.result)
		snprintf(text, sizeof text, "result 0");
	else
		snprintf(text, sizeof text, "result 0x%x (%s side) after %u bytes", o.result,
			 o.result & TESTDEV_DESTINATION ? "destination" : "source", o.done);
	return text;
}

static inline void fill(uint8_t *at, uint64_t bytes, uint32_t seed)
{
	for (uint64_t i = 0; i < bytes; i++)
		at[i] = (uint8_t)(((uint32_t)i * 2654435761u + seed * 40503u) >> 13);
}

static inline uint64_t differing(const uint8_t *at, uint64_t bytes, uint8_t value)
{
	uint64_t n = 0;

	for (uint64_t i = 0; i < bytes; i++)
		n += at[i] != value;
	return n;
}

#endif
