# Tier C: buffers of dma-buf heaps, copied by DMA channels with the kernel's own driver; then copies between addresses that
# nobody mapped, on a channel whose transactions may be stalled and on one where they may not.
. /overlay/common.sh

kernel_log boot
load portcullis_heapcopy || mark driver fail
# with <device>: from now on copies are made by this channel.
with() { echo "$1" > /sys/module/portcullis_heapcopy/parameters/device; }

for n in 1 "$last"; do
    with "$(nth "$n")"
    for heap in system default_cma_region; do
        # The last one ends in the middle of a page, and has pieces of many sizes.
        for bytes in 4096 1048576 3000001; do
            heap-copy -n 10 -b $bytes $heap > /tmp/copy 2>&1
            status=$?
            cat /tmp/copy
            if [ $status = 0 ]; then
                mark "heap-$n-$heap-$bytes" pass "$(sed -n 's/^heap-copy: \([0-9]* of .*\)/\1/p' /tmp/copy)"
            else
                mark "heap-$n-$heap-$bytes" fail "$(tail -n 1 /tmp/copy)"
            fi
        done
    done
done
kernel_log copies

with "$(nth 1)"
heap-copy -s
expect stray-stalling $? 0
kernel_log stray-stalling
with "$(nth "$last")"
heap-copy -s
expect stray $? 0
kernel_log stray
# The system goes on, both channels as well.
for n in 1 "$last"; do
    with "$(nth "$n")"
    heap-copy -n 3 system
    expect "after-$n" $? 0
done
kernel_log after
rmmod portcullis_heapcopy && mark unloaded pass || mark unloaded fail
