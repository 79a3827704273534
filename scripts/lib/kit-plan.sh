# Which packages the kit is made of. Sourced by linux-kit; uses lib/debian.sh.
#
# The plan is a file of lines, decided by what the archive offers on the day:
#   qemu <suite> <version>
#   busybox <suite> <version>
#   kernel <name> <suite> <release> <version> <compiler>      in order: Debian 13's, then the newest
#   compiler <suite> <package> <version>

oldest_qemu=10.1

plan_make() {
    debian_refresh stable
    [ -n "$(debian_version stable linux-image-arm64:arm64)" ] ||
        fail "the package lists of $mirror could not be fetched: is the network there? (log: $apt_home/stable/update.log)"
    plan_qemu
    version=$(debian_version stable busybox-static:arm64)
    [ -n "$version" ] || fail "Debian $debian_stable offers no busybox-static for arm64"
    echo "busybox stable $version"

    plan_kernel stable || fail "Debian $debian_stable offers no complete arm64 kernel"
    first=$plan_name
    # The newest that is packaged whole; the archive is sometimes between two versions.
    order="backports sid"
    debian_newer "$(debian_version sid linux-image-arm64:arm64)" "$(debian_version backports linux-image-arm64:arm64)" &&
        order="sid backports"
    for suite in $order; do
        found=$(plan_kernel "$suite") || continue
        set -- $found
        if [ "$2" != "$first" ]; then
            echo "$found"
        fi
        break
    done
}

plan_qemu() {
    best=
    for suite in sid backports testing; do
        # testing follows sid: ask for its lists only when the others have nothing.
        [ "$suite" != testing ] || [ -z "$best" ] || break
        version=$(debian_version "$suite" qemu-system-arm)
        [ -n "$version" ] && debian_newer "${version#*:}" "$oldest_qemu" || continue
        if [ -z "$best" ] || debian_newer "$version" "$best"; then
            best=$version
            best_suite=$suite
        fi
    done
    if [ -z "$best" ]; then
        fail "$mirror offers no qemu-system-arm of $oldest_qemu or newer in sid, backports or testing"
    fi
    echo "qemu $best_suite $best"
}

# plan_kernel <suite>: its line and that of its compiler; fails if a package of the kernel is not on offer.
plan_kernel() {
    release=$(debian_field "$1" linux-image-arm64:arm64 Depends |
        grep -oE 'linux-image-[0-9][^ ,]*' | sed 's/^linux-image-//' | head -n 1)
    [ -n "$release" ] || return 1
    version=$(debian_version "$1" "linux-image-$release:arm64")
    plan_name=$(echo "$release" | grep -oE '^[0-9]+\.[0-9]+')
    flavourless=${release%-arm64}
    for package in "linux-headers-$release:arm64" "linux-headers-$flavourless-common" "linux-kbuild-$flavourless" \
        "linux-source-$plan_name"; do
        [ "$(debian_version "$1" "$package")" = "$version" ] || {
            warn "$1 offers linux-image-$release $version but not the same version of $package: passed over"
            return 1
        }
    done
    compiler=$(debian_field "$1" "linux-headers-$release:arm64" Depends | grep -oE '\bgcc-[0-9]+' | head -n 1)
    [ -n "$compiler" ] || return 1
    echo "kernel $plan_name $1 $release $version $compiler"
    suite=$(tools_suite "$1")
    echo "compiler $suite $compiler $(debian_version "$suite" "$compiler-aarch64-linux-gnu")"
}

# Backports are built with stable's tools.
tools_suite() {
    case "$1" in
        backports) echo stable ;;
        *) echo "$1" ;;
    esac
}

plan_line() { grep "^$1 " "$plan" | head -n 1; }
plan_kernels() { awk '$1 == "kernel" { print $2 }' "$plan"; }
plan_suites() { awk '$1 == "compiler" && !seen[$2]++ { print $2 }' "$plan"; }
# kernel_field <name> <number>
kernel_field() { plan_line "kernel $1" | cut -d ' ' -f "$2"; }
kernel_suite() { kernel_field "$1" 3; }
kernel_release() { kernel_field "$1" 4; }
kernel_version() { kernel_field "$1" 5; }
kernel_compiler() { kernel_field "$1" 6; }

# kernels_of <suite of tools>
kernels_of() {
    for name in $(plan_kernels); do
        [ "$(tools_suite "$(kernel_suite "$name")")" != "$1" ] || echo "$name"
    done
}

# Parts of kernels that are no longer planned.
plan_prune() {
    for directory in "$kit"/packages/* "$kit"/kernels/* "$kit"/modules/* "$kit"/sources/*; do
        name=${directory##*/}
        [ "$name" = own ] || plan_kernels | grep -qx "$name" || rm -rf "$directory"
    done
}

hash_of() { cat "$@" | sha256sum | cut -c 1-16; }
