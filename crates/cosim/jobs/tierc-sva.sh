# Tier C: processes share their address spaces with a PCI function; then again with page requests switched on by hand,
# which no driver of the kernel answers.
. /overlay/common.sh

# steps <name> [option]: one mark for each line `sva: <name>: <detail>: <pass|FAIL>`.
steps() {
    sva $flags $2 "$function" > /tmp/sva 2>&1
    status=$?
    cat /tmp/sva
    sed -n 's/^sva: \([a-z-]*\): \(.*\): \(pass\|FAIL\)$/\1|\3|\2/p' /tmp/sva | while IFS='|' read -r name result detail; do
        mark "$1-$name" "$(echo "$result" | tr A-Z a-z)" "$detail"
    done
    expect "$1" "$status" 0
}

kernel_log boot
load portcullis_testdev || mark driver fail
dump interrupts-boot cat /proc/interrupts
steps sva
kernel_log sva
[ -z "$cpus" ] || expect cpus "$(nproc)" "$cpus"

# Where the function has page requests: the Enable bit of the capability's control register.
config=/sys/bus/pci/devices/$function/config
word() { hexdump -s $(($1)) -n 4 -e '1/4 "%u"' "$config"; }
at=256
while [ $at != 0 ]; do
    header=$(word $at)
    [ $((header & 65535)) != 19 ] || break
    at=$((header >> 20))
done
if [ $at != 0 ]; then
    # PASID and ATS stay as the kernel has them.
    printf '\001\000' | dd of="$config" bs=2 seek=$(((at + 4) / 2)) conv=notrunc 2>/dev/null
    expect pri-on $(($(word $((at + 4))) & 1)) 1
    steps pri -s
    kernel_log pri
fi
dump interrupts-end cat /proc/interrupts
rmmod portcullis_testdev && mark unloaded pass || mark unloaded fail
