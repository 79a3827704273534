# What the jobs of the tests with real kernels have in common.
. /lib/portcullis.sh
. /overlay/parameters
# The kernel's lines are asked for; they must not come in the middle of ours.
echo 1 > /proc/sys/kernel/printk

devices=$(cd /sys/bus/platform/devices && ls -d ./*.dma-controller | cut -c3-)
# nth <n>: the device of the n-th DMA channel, from 1, by address.
nth() { echo "$devices" | sed -n "$1p"; }
last=$(echo "$devices" | wc -l)
# base_of <device>: where its registers are.
base_of() { echo $((0x${1%%.*})); }

# dump <section> <command>...: a section of output.
dump() {
    section=$1
    shift
    echo "portcullis: begin $section"
    "$@"
    echo "portcullis: end $section"
}

# kernel_log <section>: what the kernel said since the last time.
kernel_log() { dump "$1" dmesg -r -c; }

# hold <number>: waits while somebody looks at the machine. The third channel's first descriptor word is the mailbox.
mailbox=$(($(base_of "$(nth 3)") + 0x128))
hold() {
    regs w $mailbox 4 $((0x4c000000 + $1)) > /dev/null
    tries=0
    while [ "$(regs r $mailbox 4 | sed 's/.* //')" != 0x0 ]; do
        tries=$((tries + 1))
        if [ $tries = 600 ]; then
            mark "hold-$1" fail "nobody looked"
            return 1
        fi
        sleep 0.05
    done
}

# transfer <device> <read|write> <address> <bytes>: one transfer of one side, by hand: the channel reads and throws away,
# or writes a pattern. Prints ISR, or `stuck` if it does not end.
transfer() {
    base=$(base_of "$1")
    low=$(($3 & 0xffffffff))
    high=$(($3 >> 32))
    case $2 in
    read) ctrl0=0xa0 word=0x128 ;;
    write) ctrl0=0x90 word=0x138 ;;
    esac
    regs w $((base + 0x100)) 4 0xfff w $((base + 0x110)) 4 $ctrl0 \
        w $((base + word)) 4 $low w $((base + word + 4)) 4 $high w $((base + word + 8)) 4 "$4" \
        w $((base + word + 12)) 4 0 w $((base + 0x200)) 4 1 > /dev/null || return 1
    wait_done "$1"
}

# wait_done <device>: prints ISR when the channel has ended, or `stuck`.
wait_done() {
    tries=0
    while [ $tries -lt 20 ]; do
        isr=$(regs r $(($(base_of "$1") + 0x100)) 4 | sed 's/.* //')
        if [ $((isr & 0x400)) != 0 ]; then
            echo "$isr"
            return 0
        fi
        tries=$((tries + 1))
        sleep 0.02
    done
    echo stuck
}

# expect <mark> <is> <should be>
expect() {
    if [ "$2" = "$3" ]; then mark "$1" pass "$2"; else mark "$1" fail "$2 instead of $3"; fi
}

# groups: a line for each IOMMU group: number, type, devices.
groups() {
    for group in /sys/kernel/iommu_groups/*; do
        [ ! -e "$group/type" ] || echo "${group##*/} $(cat "$group/type") $(ls "$group/devices" | tr '\n' ' ')"
    done
}
