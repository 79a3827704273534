. /lib/portcullis.sh
parameters=/sys/module/dmatest/parameters

# Interrupts of the engines so far.
interrupts() {
    grep zynqmp-dma /proc/interrupts | awk '{ for (i = 2; i <= NF && $i ~ /^[0-9]+$/; i++) n += $i } END { print n + 0 }'
}

# dmatest_begin <copies per channel>: starts it on every channel, with time for hosts that stop.
dmatest_begin() {
    load zynqmp_dma && load dmatest || { mark modules fail; return 1; }
    sleep 1
    copies=$1
    echo 60000 > $parameters/timeout
    echo "$copies" > $parameters/iterations
    echo 1 > $parameters/run
    until [ "$(interrupts)" -gt 0 ]; do :; done
    mark dmatest-runs pass "$(interrupts) interrupts"
}

# Waits for the end of it and looks at what came of it. (A thread that is stopped before its end calls that a timeout.)
dmatest_end() {
    cat $parameters/wait > /dev/null
    dmesg | sed -n 's/.*dmatest: dma[0-9]*chan[0-9]*-[a-z]*[0-9]*: summary \([0-9]*\) tests, \([0-9]*\) failures.*/\1 \2/p' > /tmp/summary
    set -- $(awk '{ n++; t += $1; f += $2 } END { print n + 0, t + 0, f + 0 }' /tmp/summary)
    if [ "$1" -gt 0 ] && [ "$2" = $(($1 * copies)) ] && [ "$3" = 0 ]; then
        mark dmatest pass "$2 verified copies on $1 channels, no failure"
    else
        mark dmatest fail "$2 copies on $1 channels, $3 failures"
    fi
}

# What the SMMU's driver complained of.
complaints() {
    dmesg | grep arm-smmu | grep -iE 'fault|error|timeout|event 0x' | head -3 | sed 's/^/  complaint: /'
}

# Memory that this kernel does not use (mem=960M) and that a reset of the machine leaves alone.
NOTE=0x7ff00000
noted() { regs r $NOTE 4 | grep -qi b007b007; }
note() { regs w $NOTE 4 0xb007b007; }
