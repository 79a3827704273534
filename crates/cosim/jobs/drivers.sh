# Tier B: zynqmp_dma drives every channel and dmatest verifies; drivers go and come again; a user program takes a channel
# through vfio and has its mapping torn away, and a driver's channel is given a wrong descriptor list, while the other
# channels go on.
#
# Parameters: iterations (per channel and run), meanwhile (the same for runs while others are disturbed), type
# (of the groups: DMA or DMA-FQ), refused (if set, the spare channel is not coherent).
. /overlay/common.sh

p=/sys/module/dmatest/parameters
platform=/sys/bus/platform/devices

# summary: copies, channels and failures in what dmatest said last, from /tmp/log.
summary() {
    sed -n 's/.*dmatest: \(dma[0-9]*chan[0-9]*\)-[a-z]*[0-9]*: summary \([0-9]*\) tests, \([0-9]*\) failures.*/\1 \2 \3/p' /tmp/log |
        awk '{ c[$1] = 1; t += $2; f += $3 } END { n = 0; for (i in c) n++; print t + 0, n + 0, f + 0 }'
}

# keep_log <section>: as kernel_log, and kept in /tmp/log.
keep_log() {
    dmesg -r -c > /tmp/log
    dump "$1" cat /tmp/log
}

# dmatest_all <name>: so many verified copies on every channel at once.
dmatest_all() {
    load dmatest iterations="$iterations" timeout=30000 || return 1
    echo 1 > $p/run
    # Reading `wait` returns when every thread has ended.
    cat $p/wait > /dev/null
    # Its threads hold the channels until it goes.
    rmmod dmatest
    keep_log "$1"
    expect "$1" "$(summary)" "$((last * iterations)) $last 0"
}

# channel_of <n>: what dmaengine calls the n-th channel.
channel_of() { basename "$platform/$(nth "$1")"/dma/dma*chan*; }

# leave <device>: takes it from zynqmp_dma. Its remove switches the clocks off, also when runtime power management has done
# so already, of which the clock framework warns (6.12). So it is kept awake until then.
leave() {
    echo on > "$platform/$1/power/control"
    unbind "$1"
    echo auto > "$platform/$1/power/control"
}

kernel_log boot
load zynqmp_dma || mark modules fail
first=$(nth 1)
target=$(nth "$last")
spare=$(nth 2)
driver=$(basename "$(readlink -f "$platform/$first/driver")")
expect driver "$driver" xilinx-zynqmp-dma
groups > /tmp/groups
expect groups "$(grep -c " $type .*dma-controller" /tmp/groups)" "$last"
dump groups cat /tmp/groups
kernel_log bound

dmatest_all copies

# Drivers go and come again.
for device in $devices; do leave "$device"; done
for device in $devices; do echo "$device" > "/sys/bus/platform/drivers/$driver/bind"; done
dmatest_all rebound
dump interrupts cat /proc/interrupts

# The rest goes on meanwhile.
leave "$spare"
leave "$target"
# A domain less: an SMMUv2 of 16 banks has no other for vfio, where 16 channels have one each.
group=$(group_of "$spare")
echo identity > "/sys/kernel/iommu_groups/$group/type"
expect identity "$(cat "/sys/kernel/iommu_groups/$group/type")" identity
load vfio_iommu_type1 allow_unsafe_interrupts=1 && load vfio_platform reset_required=0 || mark modules fail
if [ -n "$refused" ]; then
    # The spare one's DMA does not snoop: vfio does not take it.
    if bind_override "$spare" vfio-platform 2> /dev/null; then mark vfio-refuses fail; else mark vfio-refuses pass; fi
    echo > "$platform/$spare/driver_override"
fi
bind_override "$target" vfio-platform
others=
n=1
while [ "$n" -lt "$last" ]; do
    [ "$n" = 2 ] || others="$others $(channel_of "$n")"
    n=$((n + 1))
done
kernel_log vfio-begin
# One run after the other until nobody is disturbed any more. None is stopped: dmatest takes that for a copy that timed out.
(
    until [ -e /tmp/stop ]; do
        load dmatest iterations="$meanwhile" timeout=30000
        for channel in $others; do echo "$channel" > $p/channel; done
        echo 1 > $p/run
        cat $p/wait > /dev/null
        rmmod dmatest
        echo >> /tmp/runs
    done
) &
hold 1
if vfio-zdma -n 50 "$(group_of "$target")" "$target" > /tmp/vfio 2>&1; then
    mark vfio pass "$(grep verified /tmp/vfio | head -1)"
else
    mark vfio fail
fi
dump vfio cat /tmp/vfio

# Back to the driver. Then by hand: the descriptors of its next transfer are where nothing is.
echo > "$platform/$target/driver_override"
unbind "$target"
echo "$target" > "/sys/bus/platform/drivers/$driver/bind"
keep_log vfio-log
cp /tmp/log /tmp/log.1
base=$(base_of "$target")
regs w $((base + 0x158)) 4 0x00dead00 w $((base + 0x15c)) 4 0 w $((base + 0x160)) 4 0x00beef00 w $((base + 0x164)) 4 0 \
    w $((base + 0x110)) 4 0x40 w $((base + 0x108)) 4 0x7c9 w $((base + 0x200)) 4 1 > /dev/null || mark scribble fail
sleep 0.5
keep_log scribble-log
cp /tmp/log /tmp/log.2
touch /tmp/stop
wait
keep_log meanwhile
cat /tmp/log.* /tmp/log > /tmp/all && mv /tmp/all /tmp/log
expect meanwhile "$(summary)" "$(((last - 2) * meanwhile * $(wc -l < /tmp/runs))) $((last - 2)) 0"

# As if nothing had been.
echo "$type" > "/sys/kernel/iommu_groups/$group/type" 2> /dev/null || echo DMA > "/sys/kernel/iommu_groups/$group/type"
echo "$spare" > "/sys/bus/platform/drivers/$driver/bind"
dmatest_all after
