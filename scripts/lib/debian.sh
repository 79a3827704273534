# Debian's archive without a Debian system's state: apt on private lists, for several suites side by side.
# Sourced, not run. The caller defines `fail <text>` and sets `apt_home`, a directory that it may fill.
#
#   debian_open                      finds the mirror, the keys and this machine's architecture
#   debian_refresh <suite>           fetches package lists, at most once a run
#   debian_version <suite> <package> the version on offer, or nothing
#   debian_field <suite> <package> <field>
#   debian_fetch <suite> <directory> <package>...     downloads exactly these
#   debian_closure <suite> <directory> <package>...   downloads these and all they depend on
#
# A suite is `stable`, `backports` (stable with its backports preferred), `testing` or `sid`. apt checks signatures as
# always; nothing of the system is read but its list of mirrors and its proxy, and nothing is changed.

debian_stable=trixie

debian_open() {
    for tool in apt-get apt-cache apt-config dpkg dpkg-deb; do
        command -v "$tool" > /dev/null || fail "$tool is not installed: this needs Debian's apt tools"
    done
    host_arch=$(dpkg --print-architecture)
    keyring=/usr/share/keyrings/debian-archive-keyring.gpg
    [ -e "$keyring" ] || keyring=${keyring%.gpg}.pgp
    [ -e "$keyring" ] || fail "Debian's archive keys are missing: install the package debian-archive-keyring"
    mirror=
    security=
    # A Debian host says which mirror is near, or allowed.
    if grep -qs '^ID=debian' /etc/os-release; then
        urls=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources 2> /dev/null |
            grep -v '^[[:space:]]*#' | grep -oE '(https?|file|copy):/[^] ]*' || :)
        mirror=$(echo "$urls" | grep -E '/debian/?$' | head -n 1 || :)
        security=$(echo "$urls" | grep -E '/debian-security/?$' | head -n 1 || :)
    fi
    mirror=${mirror:-http://deb.debian.org/debian}
    security=${security:-http://deb.debian.org/debian-security}
}

# Which set of lists a suite is found in: backports only make sense together with the suite below.
debian_lists() {
    case "$1" in
        backports) echo stable ;;
        *) echo "$1" ;;
    esac
}

# Writes the configuration of one set of lists. The host's own is not read, except for how it gets to the network.
debian_configure() {
    lists=$apt_home/$1
    mkdir -p "$lists/lists/partial" "$lists/archives/partial" "$lists/state" "$lists/none"
    : >> "$lists/state/status"
    from="deb [signed-by=$keyring]"
    case "$1" in
        stable)
            echo "$from $mirror $debian_stable main"
            echo "$from $mirror $debian_stable-updates main"
            echo "$from $mirror $debian_stable-backports main"
            echo "$from $security $debian_stable-security main"
            ;;
        *) echo "$from $mirror $1 main" ;;
    esac > "$lists/sources.list"
    {
        apt-config dump | grep -E '^Acquire::(https?|Retries|ForceIPv)' || :
        cat << END
Dir::Etc::Main "/dev/null";
Dir::Etc::Parts "$lists/none";
Dir::Etc::SourceList "$lists/sources.list";
Dir::Etc::SourceParts "$lists/none";
Dir::Etc::Preferences "/dev/null";
Dir::Etc::PreferencesParts "$lists/none";
Dir::State "$lists/state";
Dir::State::Status "$lists/state/status";
Dir::State::Lists "$lists/lists";
Dir::Cache "$lists";
Dir::Cache::Archives "$lists/archives";
APT::Architecture "$host_arch";
APT::Architectures { "$host_arch"; "arm64"; };
APT::Sandbox::User "$(id -un)";
APT::Install-Recommends "false";
Acquire::Languages "none";
Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
Acquire::GzipIndexes "true";
Acquire::http::Timeout "20";
Acquire::https::Timeout "20";
END
    } > "$lists/apt.conf"
}

# debian_apt <suite> <apt tool> <argument>...
debian_apt() {
    suite=$1
    tool=$2
    shift 2
    release=
    [ "$suite" != backports ] || release="-t=$debian_stable-backports"
    APT_CONFIG=$apt_home/$(debian_lists "$suite")/apt.conf "$tool" -q ${release:+"$release"} "$@"
}

debian_refresh() {
    set=$(debian_lists "$1")
    # A file, as most callers are subshells; $$ is the same in all of them.
    [ "$(cat "$apt_home/$set/fresh" 2> /dev/null)" != $$ ] || return 0
    debian_configure "$set"
    # One dead source of several is no reason to give up: only a missing package is.
    debian_apt "$set" apt-get -o Acquire::Retries=1 update > "$apt_home/$set/update.log" 2>&1 || :
    echo $$ > "$apt_home/$set/fresh"
    # Such as a mirror whose copy of a suite is older than Debian's signature lets it be.
    debian_complaints "$set" | sed "s/^/  $set: /" >&2
}

# Says why lists are incomplete, as apt told it.
debian_complaints() {
    grep -hE '^E:' "$apt_home/$1/update.log" | head -n 3 || :
}

debian_field() {
    debian_refresh "$1"
    debian_apt "$1" apt-cache show --no-all-versions "$2" 2> /dev/null | sed -n "s/^$3: //p" | head -n 1
}

debian_version() {
    debian_field "$1" "$2" Version
}

debian_newer() {
    dpkg --compare-versions "$1" gt "$2"
}

debian_fetch() {
    suite=$1
    into=$2
    shift 2
    mkdir -p "$into"
    log=$apt_home/$(debian_lists "$suite")/download.log
    (cd "$into" && debian_apt "$suite" apt-get -o Acquire::Retries=2 download "$@") > "$log" 2>&1 || {
        tail -n 3 "$log" >&2
        fail "could not be downloaded: $*"
    }
}

debian_closure() {
    suite=$1
    into=$2
    shift 2
    mkdir -p "$into/partial"
    log=$apt_home/$(debian_lists "$suite")/download.log
    debian_apt "$suite" apt-get -y -o Acquire::Retries=2 -o Dir::Cache::Archives="$into" --download-only install "$@" \
        > "$log" 2>&1 || {
        grep -E '^(E:| .* : Depends)' "$log" | head -n 5 >&2
        fail "cannot be had together with what they depend on: $*"
    }
    rm -rf "$into/partial" "$into/lock"
}

# debian_unpack <directory with packages> <root>: the packages' files, without their scripts, and the packages are gone.
# base-files goes first: it holds the links /bin, /lib and /sbin that everything else is written for.
debian_unpack() {
    mkdir -p "$2"
    for deb in "$1"/base-files_*.deb "$1"/*.deb; do
        [ -e "$deb" ] || continue
        dpkg-deb -x "$deb" "$2" || fail "${deb##*/} could not be unpacked (is the disk full?)"
        rm "$deb"
    done
}
