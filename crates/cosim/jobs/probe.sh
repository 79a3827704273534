# Tier A: an unmodified kernel with nothing but what is in it. The first and the last DMA channel get a driver that does
# nothing with them (simple-pm-bus, by driver_override); that puts them behind the SMMU. Then transfers are started by hand.
. /overlay/common.sh

kernel_log boot
dump groups-boot groups
dump interrupts-boot cat /proc/interrupts
hold 1

bind_override "$(nth 1)" simple-pm-bus && bind_override "$(nth "$last")" simple-pm-bus
for n in 1 "$last"; do
    if group=$(group_of "$(nth "$n")"); then
        mark "group-$n" pass "$group"
    else
        mark "group-$n" fail
    fi
done
dump groups-bound groups
kernel_log bound
hold 2

# Nothing is mapped. The kernel must say so, and the channel must end with an error.
expect stray-read "$(transfer "$(nth "$last")" read 0x123456000 64)" 0x500
sleep 0.2
kernel_log stray-read
expect stray-write "$(transfer "$(nth "$last")" write 0xfedc00040 128)" 0x600
sleep 0.2
kernel_log stray-write
# The first channel's transactions may be stalled where the board says so; nobody handles them in this kernel.
isr=$(transfer "$(nth 1)" read 0x7000 16)
echo "portcullis: first $isr"
sleep 0.2
kernel_log stray-first
# The second has no driver.
isr=$(transfer "$(nth 2)" read 0x4000 16)
echo "portcullis: second $isr"
sleep 0.2
kernel_log stray-second
for writer in /sys/bus/platform/devices/*.pl-writer; do
    [ -e "$writer" ] || continue
    # An AXI ID that is in no tree.
    base=$(base_of "${writer##*/}")
    regs w $((base + 0x30)) 4 0x5000 w $((base + 0x34)) 4 0 w $((base + 0x38)) 4 0xcafebeef w $((base + 0x40)) 4 5 \
        w $((base + 0x44)) 4 1 > /dev/null
    sleep 0.2
    dump writer regs r $((base + 0x44)) 4
    kernel_log stray-writer
done
dump interrupts-end cat /proc/interrupts
hold 3
