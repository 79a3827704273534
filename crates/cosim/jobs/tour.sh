# What `portcullis linux` runs in the guest when nobody asks for anything else: what the kernel said about its SMMUs, the
# groups of the DMA engines, and dmatest on every ZDMA channel, as far as this guest has the modules.
. /lib/portcullis.sh
[ ! -e /overlay/parameters ] || . /overlay/parameters
iterations=${iterations:-100}
threads=${threads:-1}

dmesg | grep -E 'arm-smmu' | sed 's/^/  /'
if dmesg | grep -qE 'arm-smmu(-v3)? [^:]*: (probing hardware|.*oas [0-9]+-bit)'; then
    mark smmu-probed pass
else
    mark smmu-probed fail "no line of a driver in the kernel's log"
fi

if load zynqmp_dma 2>/dev/null && load dmatest 2>/dev/null; then
    driver=zynqmp_dma
else
    # An unmodified guest has no driver for the engines. The one that gives devices to programs puts them behind the SMMU too.
    driver=uio_pdrv_genirq
    load uio_pdrv_genirq
    for device in /sys/bus/platform/devices/*.dma-controller; do
        [ -e "$device" ] && bind_override "${device##*/}" uio_pdrv_genirq
    done
fi
sleep 1

engines=0
grouped=0
for device in /sys/bus/platform/devices/*.dma-controller; do
    [ -e "$device/driver" ] || continue
    engines=$((engines + 1))
    group=$(group_of "${device##*/}") && grouped=$((grouped + 1))
    echo "  ${device##*/}: $(basename "$(readlink -f "$device/driver")"), IOMMU group ${group:-none}"
done
if [ "$engines" -gt 0 ] && [ "$engines" = "$grouped" ]; then
    mark groups pass "$engines engines, each in a group"
else
    mark groups fail "$engines engines have a driver, $grouped of them are in a group"
fi

if [ "$driver" = zynqmp_dma ]; then
    p=/sys/module/dmatest/parameters
    echo "$iterations" > $p/iterations
    echo "$threads" > $p/threads_per_chan
    echo 1 > $p/run
    # Reading `wait` returns when every thread has ended.
    cat $p/wait > /dev/null
    dmesg | sed -n 's/.*dmatest: dma\([0-9]*\)chan[0-9]*-[a-z]*[0-9]*: summary \([0-9]*\) tests, \([0-9]*\) failures.*/\1 \2 \3/p' > /tmp/summary
    set -- $(awk '{ c[$1] = 1; t += $2; f += $3 } END { n = 0; for (i in c) n++; print n + 0, t + 0, f + 0 }' /tmp/summary)
    if [ "$2" -gt 0 ] && [ "$3" = 0 ] && [ "$2" = $((engines * threads * iterations)) ]; then
        mark dmatest pass "$2 verified copies on $1 channels, no failure"
    else
        mark dmatest fail "$2 copies on $1 channels, $3 failures"
    fi
    # Its threads hold the channels until it goes.
    rmmod dmatest
    grep -E 'zynqmp-dma' /proc/interrupts | awk '{ n = 0; for (i = 2; i <= NF && $i ~ /^[0-9]+$/; i++) n += $i; total += n } END { print "  interrupts of the engines: " total + 0 }'
fi

bad=$(dmesg | grep -E 'arm-smmu' | grep -ciE 'fault|error|timeout|warn|event 0x')
if [ "$bad" = 0 ]; then
    mark quiet pass "no fault, error or timeout in the kernel's log"
else
    mark quiet fail "$bad lines of the SMMU driver are about faults or errors"
fi
