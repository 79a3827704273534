# The parts of the kit that are built here. Sourced by linux-kit; each function fills $work.

# ---- running the unpacked tools -----------------------------------------------------------------------------------
#
# They expect to live in /usr, so they run in a chroot: in a user namespace where the system allows one, else as root.

# enter <root> <command>...
enter() {
    root=$1
    shift
    case "${enter_by:-$(cat "$tmp/enter")}" in
        namespace)
            unshare --map-root-user --mount sh -c '
                root=$1
                shift
                mount --rbind /dev "$root/dev" && mount --rbind /proc "$root/proc" && exec chroot "$root" "$@"
            ' sh "$root" env -i PATH=/usr/bin:/usr/sbin HOME=/ LC_ALL=C "$@"
            ;;
        root)
            # A namespace's root may not make devices.
            [ -c "$root/dev/null" ] || mknod -m 666 "$root/dev/null" c 1 3 2> /dev/null || return 1
            chroot "$root" env -i PATH=/usr/bin:/usr/sbin HOME=/ LC_ALL=C "$@"
            ;;
    esac
}

# Finds a way that works here and remembers it for this run.
enter_check() {
    [ ! -e "$tmp/enter" ] || return 0
    for enter_by in namespace root; do
        if enter "$1" sh -c 'echo > /dev/null' 2> "$tmp/enter.log"; then
            echo "$enter_by" > "$tmp/enter"
            enter_by=
            return 0
        fi
    done
    head -n 2 "$tmp/enter.log" >&2
    fail "the unpacked compiler needs unprivileged user namespaces, which this system refuses (see the sysctls" \
        "kernel.unprivileged_userns_clone, user.max_user_namespaces, kernel.apparmor_restrict_unprivileged_userns), or root"
}

# open_root <suite>: makes $build, a directory inside the tools' root, known there as $inside.
open_root() {
    root=$kit/tools/$1/root
    [ -d "$root" ] || fail "there is no cross compiler to build with"
    enter_check "$root"
    build=$(mktemp -d "$root/build.XXXXXX")
    inside=/${build##*/}
}

# ---- guest programs and modules -----------------------------------------------------------------------------------

# Programs may include the headers of our own modules.
programs_hash() { hash_of "$guest"/programs/*.[ch] "$guest"/modules/own/*.h; }

build_programs() {
    open_root "$1"
    compiler=aarch64-linux-gnu-$(compilers_of "$1" | head -n 1)
    cp -r "$guest/programs" "$guest/modules" "$build"
    for source in "$guest"/programs/*.c; do
        program=$(basename "$source" .c)
        enter "$root" "$compiler" -std=gnu11 -O2 -static -s -Wall -Wextra -Werror \
            -o "$inside/$program" "$inside/programs/$program.c" || fail "$program.c cannot be compiled"
        cp "$build/$program" "$work/"
    done
    rm -rf "$build"
}

modules_key() {
    plan_line "kernel $1" | tr '\n' ' '
    find "$guest/modules" -maxdepth 1 -type f ! -name packaged | LC_ALL=C sort | xargs cat | hash_of -
}

build_modules() {
    suite=$(tools_suite "$(kernel_suite "$1")")
    release=$(kernel_release "$1")
    [ -e "$kit/sources/$1/.key" ] || fail "there are no driver sources to build"
    open_root "$suite"
    cp -r "$kit/sources/$1"/* "$build"
    find "$guest/modules" -maxdepth 1 -type f -exec cp {} "$build" \;
    # Without type information: it would need pahole and the kernel's own.
    enter "$root" make -s -j"$(nproc)" -C "/usr/src/linux-headers-$release" M="$inside" DEB_BUILD_ARCH="$(dpkg --print-architecture)" \
        CONFIG_DEBUG_INFO_BTF_MODULES= modules > "$work/log" 2>&1 || {
        grep -E 'error|Error|\*\*\*' "$work/log" | head -n 10 >&2
        fail "the drivers of $1 cannot be built"
    }
    take_modules "$build"
    rm -rf "$build" "$work/log"
}

# Modules as the guest's `load` expects them: without debugging information, named as in /proc/modules.
take_modules() {
    for file in "$1"/*.ko; do
        enter "$root" aarch64-linux-gnu-strip --strip-debug "${file#"$root"}"
        cp "$file" "$work/$(basename "$file" | tr - _)"
    done
}

# ---- kernel and initial file system, side by side -----------------------------------------------------------------

initrd_key() {
    set -- "$kit/packages/$1/.key" "$kit/modules/$1/.key" "$kit/programs/.key" "$kit/busybox/.key"
    for file in "$@"; do
        [ ! -e "$file" ] || cat "$file"
    done | hash_of - "$guest"/init "$guest"/portcullis.sh
}

build_kernel() {
    from=$kit/packages/$1
    [ -e "$kit/qemu/.key" ] && [ -e "$kit/busybox/.key" ] || fail "there is no busybox or no cpio to build it with"
    stage=$work/stage
    mkdir -p "$stage/bin" "$stage/lib" "$stage/modules" "$stage/dev" "$stage/proc" "$stage/sys" "$stage/tmp" "$stage/root"
    cp "$kit/busybox/busybox" "$stage/bin/"
    cp "$guest/init" "$stage/init"
    chmod 755 "$stage/init"
    cp "$guest/portcullis.sh" "$stage/lib/"
    cp "$from"/modules/* "$stage/modules/"
    tier=$(cat "$from/tiers")
    if [ -e "$kit/programs/.key" ]; then
        cp "$kit"/programs/* "$stage/bin/"
    else
        warn "the guest of $1 is without our programs: they could not be built"
    fi
    if [ -e "$kit/modules/$1/.key" ]; then
        cp "$kit/modules/$1"/*.ko "$stage/modules/"
        [ "$1" = own ] || [ ! -e "$kit/programs/.key" ] || tier="$tier, \"b\""
    fi
    order_modules "$stage/modules" > "$work/order"
    mv "$work/order" "$stage/modules/order"
    (cd "$stage" && find . | LC_ALL=C sort | "$kit/qemu/cpio" --quiet -o -H newc -R 0:0 --reproducible) |
        gzip -9n > "$work/initrd.cpio.gz"
    [ "$(gzip -dc "$work/initrd.cpio.gz" | wc -c)" -gt 1000000 ] || fail "the archive of $1 could not be written"
    # Another archive may follow it, and has to begin at a multiple of four.
    truncate -s %512 "$work/initrd.cpio.gz"
    rm -rf "$stage"
    ln "$from/vmlinuz" "$work/vmlinuz" 2> /dev/null || cp "$from/vmlinuz" "$work/vmlinuz"
    cp "$from/release" "$from/package" "$work/"
    echo "$tier" > "$work/tiers"
}

# order_modules <directory>: for each module a line `<name>: <files to insert, in this order>`.
order_modules() {
    for file in "$1"/*.ko; do
        [ -e "$file" ] || continue
        echo "$(basename "$file" .ko)" $(module_needs "$file")
    done | awk '
        { order[NR] = $1; needs[$1] = $0 }
        function insert(name,    words, count, i) {
            if (name in done) return
            done[name] = 1
            count = split(needs[name], words, " ")
            if (count == 0) print "linux-kit: module " name " is needed and not there" > "/dev/stderr"
            for (i = 2; i <= count; i++) insert(words[i])
            line = line " " name ".ko"
        }
        END {
            for (n = 1; n <= NR; n++) {
                split("", done)
                line = ""
                insert(order[n])
                print order[n] ":" line
            }
        }'
}

# ---- an own small kernel of the newest source ---------------------------------------------------------------------

own_key() {
    plan_line "kernel $1" | tr '\n' ' '
    hash_of "$guest"/kernel/*
}

build_own() {
    suite=$(tools_suite "$(kernel_suite "$1")")
    source=linux-source-$1
    cross=$(kernel_compiler "$1")
    # Kernel builds also compile programs for this machine: a root of its own, gone when the kernel is there.
    debian_closure "$suite" "$work/debs" base-files dash bash coreutils sed grep findutils diffutils mawk make gzip bc \
        flex bison perl python3-minimal gcc libc6-dev "$cross-aarch64-linux-gnu"
    debian_fetch "$(kernel_suite "$1")" "$work/source" "$source=$(kernel_version "$1")"
    root=$work/root
    debian_unpack "$work/debs" "$root"
    [ -e "$root/usr/bin/awk" ] || ln -s mawk "$root/usr/bin/awk"
    [ -e "$root/usr/bin/sh" ] || ln -s dash "$root/usr/bin/sh"
    mkdir -p "$root/dev" "$root/proc" "$root/tmp" "$root/build"
    dpkg-deb --fsys-tarfile "$work/source/$source"_*.deb | tar -xO "./usr/src/$source.tar.xz" |
        tar -xJ -C "$root/build" --strip-components=1 --wildcards -X "$guest/kernel/unused" || fail "$source cannot be unpacked (is the disk full?)"
    cp "$guest/kernel/config" "$root/build/asked"
    rm -rf "$work/debs" "$work/source"
    enter_check "$root"

    set -- make -s -C /build ARCH=arm64 CROSS_COMPILE=aarch64-linux-gnu- CC="aarch64-linux-gnu-$cross" \
        LOCALVERSION=-portcullis KBUILD_BUILD_USER=portcullis KBUILD_BUILD_HOST=linux-kit
    enter "$root" "$@" KCONFIG_ALLCONFIG=asked allnoconfig > "$work/log" 2>&1 || {
        tail -n 5 "$work/log" >&2
        fail "$source cannot be configured"
    }
    missing=$(grep '^CONFIG' "$root/build/asked" | grep -vxFf "$root/build/.config" | tr '\n' ' ' || :)
    [ -z "$missing" ] || fail "$source does not come out with ${missing% }"
    enter "$root" nice "$@" -j"$(nproc)" Image modules > "$work/log" 2>&1 || {
        grep -E 'error|Error|\*\*\*' "$work/log" | head -n 10 >&2
        fail "$source cannot be built"
    }
    cp "$root/build/arch/arm64/boot/Image" "$work/vmlinuz"
    cp "$root/build/include/config/kernel.release" "$work/release"
    cp "$root/build/.config" "$work/config"
    echo "$source $(kernel_version "$(plan_kernels | tail -n 1)")" > "$work/package"
    echo '"c"' > "$work/tiers"
    mkdir "$work/modules"
    list_builtin "$root/build/modules.builtin" > "$work/modules/builtin"
    # What it takes to build a module for it.
    mkdir -p "$work/devel/arch/arm64"
    (
        cd "$root/build"
        mv Makefile Kbuild .config Module.symvers include scripts "$work/devel/"
        mv arch/arm64/Makefile arch/arm64/include "$work/devel/arch/arm64/"
    )
    rm -rf "$root" "$work/log"
}

own_modules_key() {
    cat "$kit/packages/own/.key" 2> /dev/null | tr '\n' ' '
    hash_of "$guest"/modules/own/*
}

# Our own modules for the own kernel.
build_own_modules() {
    [ -e "$kit/packages/own/devel" ] || fail "there is no own kernel to build them for"
    open_root "$(tools_suite "$(kernel_suite "$1")")"
    # Hard links, and symbolic ones as they are: some lead to what was not kept.
    cp -Rdl "$kit/packages/own/devel" "$build/devel"
    cp -r "$guest/modules/own" "$build/own"
    enter "$root" make -s -C "$inside/devel" M="$inside/own" ARCH=arm64 CROSS_COMPILE=aarch64-linux-gnu- \
        CC="aarch64-linux-gnu-$(kernel_compiler "$1")" LOCALVERSION=-portcullis modules > "$work/log" 2>&1 || {
        grep -E 'error|Error|\*\*\*' "$work/log" | head -n 10 >&2
        fail "our modules for the own kernel cannot be built"
    }
    take_modules "$build/own"
    rm -rf "$build" "$work/log"
}
