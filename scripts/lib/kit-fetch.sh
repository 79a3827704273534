# The parts of the kit that come as packages. Sourced by linux-kit; each function fills $work.

# ---- QEMU: with all its libraries, run through its own loader ------------------------------------------------------

fetch_qemu() {
    planned=$(plan_line qemu | cut -d ' ' -f 2)
    got=
    # sid is at times between two versions of some library: the next best suite will do.
    for suite in "$planned" backports testing; do
        version=$(debian_version "$suite" qemu-system-arm)
        [ -n "$version" ] && debian_newer "${version#*:}" "$oldest_qemu" || continue
        # cpio is for our own initial file systems, and runs the same way.
        if (debian_closure "$suite" "$work/debs" qemu-system-arm cpio base-files); then
            got=$suite
            break
        fi
        warn "QEMU $version of $suite cannot be had whole"
        rm -rf "$work/debs"
    done
    [ -n "$got" ] || fail "no suite offers QEMU with all that it depends on"
    debian_unpack "$work/debs" "$work/root"
    rm -rf "$work/debs" "$work/root/usr/share/doc" "$work/root/usr/share/man"
    runner "$work" qemu-system-aarch64 '-L "$root/usr/share/qemu"'
    runner "$work" cpio
    "$work/qemu-system-aarch64" --version > "$work/answer" || fail "the unpacked QEMU does not run on this machine"
    sed -n 's/^QEMU emulator version \([0-9.]*\).*/\1/p' "$work/answer" > "$work/version"
    echo "qemu-system-arm $version" > "$work/package"
    "$work/qemu-system-aarch64" -M virt -device help 2> /dev/null | grep -q '"vfio-user-pci"' ||
        fail "QEMU $version is built without vfio-user-pci"
    rm "$work/answer"
}

# runner <directory> <program> [options]: writes a script beside root/ that runs a program of it from anywhere.
runner() {
    (
        cd "$1/root"
        loader=$(find usr/lib* -name 'ld-linux*.so.*' | head -n 1)
        [ -n "$loader" ] || fail "the packages hold no loader (ld-linux)"
        program=$(find usr/bin bin -name "$2" | head -n 1)
        [ -n "$program" ] || fail "the packages hold no $2"
        # Libraries, and directories of private ones one level below.
        paths=$(find usr/lib usr/lib/*-linux-gnu* -maxdepth 2 -name 'lib*.so*' | sed 's,/[^/]*$,,' | sort -u |
            sed 's,^,$root/,' | tr '\n' ':')
        modules=$(find usr/lib -maxdepth 2 -type d -name qemu | head -n 1)
        cat > "../$2" << END
#!/bin/sh
# Runs $2 of the packages in root/ with their own libraries. Made by scripts/linux-kit.
root=\$(dirname "\$(readlink -f "\$0")")/root
export QEMU_MODULE_DIR="\$root/${modules:-none}"
exec "\$root/$loader" --argv0 "\$0" --library-path "${paths%:}" "\$root/$program" ${3-} "\$@"
END
        chmod +x "../$2"
    )
}

fetch_busybox() {
    debian_fetch stable "$work/debs" busybox-static:arm64
    debian_unpack "$work/debs" "$work/root"
    find "$work/root" -name busybox -type f -perm -u+x -exec mv {} "$work/" \;
    rm -rf "$work/debs" "$work/root"
    [ -x "$work/busybox" ] || fail "busybox-static holds no busybox"
}

# ---- a kernel as Debian built it: its image, and the modules that a guest needs ------------------------------------

packaged_hash() { hash_of "$guest/modules/packaged"; }

fetch_kernel() {
    suite=$(kernel_suite "$1")
    release=$(kernel_release "$1")
    version=$(kernel_version "$1")
    # One package up to 6.12; later image, modules and lists of built-in ones are apart.
    set -- "linux-image-$release"
    for package in "linux-binary-$release" "linux-modules-$release" "linux-base-$release"; do
        [ "$(debian_version "$suite" "$package:arm64")" != "$version" ] || set -- "$@" "$package"
    done
    [ $# -eq 1 ] || shift
    for package in "$@"; do
        debian_fetch "$suite" "$work/debs" "$package:arm64=$version"
    done
    debian_unpack "$work/debs" "$work/root"
    image=$(find "$work/root/boot" "$work/root/usr/lib/modules" "$work/root/lib/modules" -name 'vmlinuz*' 2> /dev/null |
        head -n 1)
    [ -n "$image" ] || fail "$* hold no vmlinuz"
    mv "$image" "$work/vmlinuz"
    tree=$(find "$work/root" -type d -path "*/modules/$release" | head -n 1)
    mkdir "$work/modules"
    pick_modules "$tree" "$work/modules" "$guest/modules/packaged"
    list_builtin "$tree/modules.builtin" > "$work/modules/builtin"
    echo "$release" > "$work/release"
    echo "$1 $version" > "$work/package"
    echo '"a"' > "$work/tiers"
    rm -rf "$work/root" "$work/debs"
}

# Names as in /proc/modules, where - and _ are one.
list_builtin() { sed -n 's,.*/\(.*\)\.ko$,\1,p' "$1" | tr - _ | sort; }

# What a module says that it depends on, one per line.
module_needs() {
    tr '\0' '\n' < "$1" | grep -a '^depends=' | head -n 1 | sed 's/^depends=//' | tr ',' '\n' | tr - _
}

# pick_modules <tree> <directory> <list>: the modules of the list that this kernel has, and what they depend on.
pick_modules() {
    find "$1" -name '*.ko*' | sed 's,.*/\([^/]*\)\.ko.*,\1 &,' | awk '{ gsub("-", "_", $1); print }' > "$work/index"
    queue=$(grep -v '^#' "$3" | tr - _)
    while [ -n "$queue" ]; do
        next=
        for module in $queue; do
            [ ! -e "$2/$module.ko" ] || continue
            file=$(awk -v name="$module" '$1 == name { print $2; exit }' "$work/index")
            [ -n "$file" ] || continue
            case "$file" in
                *.xz) xz -dc "$file" ;;
                *.zst) zstd -dc "$file" ;;
                *.gz) gzip -dc "$file" ;;
                *) cat "$file" ;;
            esac > "$2/$module.ko" || fail "$file cannot be unpacked"
            next="$next $(module_needs "$2/$module.ko")"
        done
        queue=$(echo "$next" | tr -s ' \n' ' ' | sed 's/^ *//; s/ *$//')
    done
    rm "$work/index"
}

# ---- what drivers and programs are built with ---------------------------------------------------------------------

compilers_of() { awk -v suite="$1" '$1 == "compiler" && $2 == suite && !seen[$3]++ { print $3 }' "$plan"; }

tools_key() {
    grep "^compiler $1 " "$plan" | sort -u | tr '\n' ' '
    for name in $(kernels_of "$1"); do plan_line "kernel $name"; done | tr '\n' ' '
    echo "recipe 1"
}

# A root of its own with a cross compiler, make and the kernels' headers.
fetch_tools() {
    libc=libc6-dev-arm64-cross
    [ "$host_arch" != arm64 ] || libc=libc6-dev
    set -- "$1" base-files dash coreutils sed grep findutils mawk make "$libc"
    suite=$1
    for compiler in $(compilers_of "$suite"); do
        set -- "$@" "$compiler-aarch64-linux-gnu"
    done
    for name in $(kernels_of "$suite"); do
        from=$(kernel_suite "$name")
        release=$(kernel_release "$name")
        version=$(kernel_version "$name")
        kbuild=linux-kbuild-${release%-arm64}
        debian_fetch "$from" "$work/debs" "linux-headers-$release:arm64=$version" \
            "linux-headers-${release%-arm64}-common=$version" "$kbuild=$version"
        # Libraries of its programs. pahole only serves type information that we leave out.
        set -- "$@" $(debian_field "$from" "$kbuild" Depends | sed 's/([^)]*)//g' | tr -d ' ' | tr ',' '\n' | grep -vx pahole)
    done
    shift
    debian_closure "$suite" "$work/more" "$@"
    mv "$work"/more/*.deb "$work/debs"
    debian_unpack "$work/debs" "$work/root"
    rm -rf "$work/debs" "$work/more" "$work/root/usr/share/doc" "$work/root/usr/share/man" "$work/root/usr/share/locale"
    # The links that the packages' scripts would have made.
    [ -e "$work/root/usr/bin/awk" ] || ln -s mawk "$work/root/usr/bin/awk"
    [ -e "$work/root/usr/bin/sh" ] || ln -s dash "$work/root/usr/bin/sh"
    mkdir -p "$work/root/dev" "$work/root/proc" "$work/root/tmp"
}

sources_hash() { hash_of "$guest/modules/sources"; }

# The few files of Debian's kernel source that tier b is built from.
fetch_sources() {
    suite=$(kernel_suite "$1")
    source=linux-source-$1
    debian_fetch "$suite" "$work" "$source=$(kernel_version "$1")"
    grep -v '^#' "$guest/modules/sources" | sed "s,^,$source/," > "$work/wanted"
    # Each file once and then stop: the rest of the archive need not be decompressed.
    dpkg-deb --fsys-tarfile "$work/$source"_*.deb 2> /dev/null | tar -xO "./usr/src/$source.tar.xz" 2> /dev/null |
        tar -xJ -C "$work" --strip-components=1 --occurrence=1 -T "$work/wanted" 2> "$work/tar.log" || {
        head -n 3 "$work/tar.log" >&2
        fail "$source lacks files of crates/cosim/guest/modules/sources"
    }
    rm "$work"/*.deb "$work/wanted" "$work/tar.log"
}
