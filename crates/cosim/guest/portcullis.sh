# Shell functions for scripts that run in the guest. Source it: `. /lib/portcullis.sh`. Each says on stderr why it fails.

# load <module> [parameter=value]...: inserts a module after all that it needs. One that is built in or already there
# is fine; of a module that is built in, the parameters are written to sysfs unless they say so already.
load() {
    name=$(echo "$1" | tr - _)
    shift
    if grep -qx "$name" /modules/builtin 2>/dev/null; then
        for parameter in "$@"; do
            file=/sys/module/$name/parameters/${parameter%%=*}
            value=${parameter#*=}
            [ "$(tr NY 01 < "$file")" != "$(echo "$value" | tr NY 01)" ] || continue
            if ! echo "$value" 2>/dev/null > "$file"; then
                echo "load: $name is built in: give $name.$parameter on the kernel's command line" >&2
                return 1
            fi
        done
        return 0
    fi
    files=$(sed -n "s/^$name: //p" /modules/order)
    if [ -z "$files" ]; then
        echo "load: this guest has no module $name" >&2
        return 1
    fi
    for file in $files; do
        module=${file%.ko}
        [ ! -e "/sys/module/$module" ] || continue
        if [ "$module" = "$name" ]; then
            insmod "/modules/$file" "$@" || return 1
        else
            insmod "/modules/$file" || return 1
        fi
    done
}

# device_of <device>: its directory in sysfs, on whichever bus it is.
device_of() {
    for bus in platform pci amba; do
        if [ -e "/sys/bus/$bus/devices/$1" ]; then
            echo "/sys/bus/$bus/devices/$1"
            return 0
        fi
    done
    echo "no device $1 on the platform, pci or amba bus" >&2
    return 1
}

# unbind <device>: takes it from its driver, if it has one.
unbind() {
    directory=$(device_of "$1") || return 1
    [ ! -e "$directory/driver" ] || echo "$1" > "$directory/driver/unbind"
}

# bind_override <device> <driver>: gives it to a driver whether or not that one claims such devices.
bind_override() {
    directory=$(device_of "$1") || return 1
    unbind "$1" || return 1
    echo "$2" > "$directory/driver_override" || return 1
    bus=$(readlink -f "$directory/subsystem")
    echo "$1" > "$bus/drivers_probe" || return 1
    if [ ! -e "$directory/driver" ]; then
        echo "$2 did not take $1" >&2
        return 1
    fi
}

# group_of <device>: the number of its IOMMU group.
group_of() {
    directory=$(device_of "$1") || return 1
    if [ ! -e "$directory/iommu_group" ]; then
        echo "$1 is in no IOMMU group" >&2
        return 1
    fi
    basename "$(readlink -f "$directory/iommu_group")"
}

# mark <name> <pass|fail> [detail]: a result, for whoever reads the console.
mark() {
    name=$1
    result=$2
    shift 2
    echo "portcullis: mark $name $result${*:+ $*}"
}
