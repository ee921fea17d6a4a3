# Sourced by tools/test and tools/try: what the machine must have, and the virtual environment.
# The caller has set root to the top of the checkout.

# Commands, and the Debian package that brings each.
system_needs=(
    qemu-img:qemu-utils qemu-io:qemu-utils qemu-nbd:qemu-utils
    mke2fs:e2fsprogs debugfs:e2fsprogs e2fsck:e2fsprogs
    mkfs.xfs:xfsprogs mkfs.btrfs:btrfs-progs mkntfs:ntfs-3g qemu-storage-daemon:qemu-system-common
    mkfs.fat:dosfstools fsck.fat:dosfstools mcopy:mtools sfdisk:fdisk
    nbdinfo:libnbd-bin nbdcopy:libnbd-bin fio:fio openssl:openssl
    fusermount3:fuse3 groff:groff-base qemu-system-x86_64:qemu-system-x86 busybox:busybox-static mount:mount umount:mount losetup:mount strace:strace gcc:gcc
)

# Debian keeps mke2fs and its kin where an ordinary user does not look.
PATH="$PATH:/usr/sbin:/sbin"

say() { printf '== %s\n' "$*"; }

give_up() {
    printf '%s\n' "$@" >&2
    exit 2
}

# Print the interpreter to use: $PYTHON, else the first python3 of 3.11 or newer.
find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
}

has_venv() { "$1" -c 'import ensurepip, venv' 2>/dev/null; }

has_python_header() {
    "$1" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' 2>/dev/null
}

has_c_headers() { echo '#include <string.h>' | gcc -E - >/dev/null 2>&1; }

# A root that may mount, as containers do not always allow, and a kernel with loop devices.
can_mount() {
    local folder status
    [[ -e /dev/loop-control ]] || return
    folder=$(mktemp -d)
    { mount -t tmpfs tmpfs "$folder" && umount "$folder"; } 2>/dev/null
    status=$?
    rmdir "$folder"
    return $status
}

# Print the Debian packages that the machine still lacks, one a line.
missing_packages() {
    local need python
    for need in "${system_needs[@]}"; do
        command -v "${need%%:*}" >/dev/null || echo "${need#*:}"
    done
    has_c_headers || echo libc6-dev
    grep -qs device-mapper /proc/misc && ! command -v dmsetup >/dev/null && echo dmsetup
    python=$(find_python)
    if [[ -z $python ]]; then
        printf '%s\n' python3 python3-dev python3-venv
        return
    fi
    has_venv "$python" || echo python3-venv
    has_python_header "$python" || echo python3-dev
}

# Install what is missing as root; otherwise say what to install, and stop.
require_system() {
    local packages install log
    mapfile -t packages < <(missing_packages | sort -u)
    [[ ${#packages[@]} -eq 0 ]] && return
    install="apt-get install --yes --no-install-recommends ${packages[*]}"
    command -v apt-get >/dev/null ||
        give_up "This machine lacks what these Debian packages hold: ${packages[*]}"
    [[ $(id -u) -eq 0 ]] ||
        give_up "Some Debian packages are missing. Run this as root, then try again:" "  $install"
    say "installing ${packages[*]}"
    export DEBIAN_FRONTEND=noninteractive
    log=$(mktemp)
    if ! { apt-get update && $install; } >"$log" 2>&1; then
        tail -n 20 "$log" >&2
        give_up "This command failed: $install"
    fi
    rm -f "$log"
    mapfile -t packages < <(missing_packages | sort -u)
    [[ ${#packages[@]} -eq 0 ]] ||
        give_up "Installed, and yet what they bring is not found: ${packages[*]}" \
            "If it is Python's: set PYTHON to an interpreter with venv and Python.h, such as /usr/bin/python3."
}

# What an installed environment depends on: when none of it changed, it is used again.
environment_stamp() {
    (
        cd "$root" || exit
        printf '%s\n' "$root" "$1" "$("$(find_python)" -VV)"
        cat pyproject.toml tools/build_hook.py jqcow/_version.py jqcow/_native/{build.py,kernels.c,tables.c,kernels.h}
    ) | sha256sum | cut -d ' ' -f 1
}

# Make the environment $1 and install the checkout into it, editable, with the extras $2 (such as "[test]").
# Compiles the kernels. Does nothing when the environment is up to date.
make_environment() {
    local directory=$1 extras=${2:-} stamp
    # Each command of a test is a process: compiled modules halve what it takes to start. They stay out of the tree.
    export PYTHONPYCACHEPREFIX=$directory/bytecode
    unset PYTHONDONTWRITEBYTECODE
    stamp=$(environment_stamp "$extras")
    [[ -x $directory/bin/python && $(cat "$directory/stamp" 2>/dev/null) == "$stamp" ]] &&
        compgen -G "$root/jqcow/_native/_kernels*.so" >/dev/null && return
    say "making the environment $directory"
    "$(find_python)" -m venv --clear "$directory" ||
        give_up "The virtual environment $directory could not be made."
    "$directory/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$root$extras" ||
        give_up "jqcow could not be installed into $directory."
    echo "$stamp" >"$directory/stamp"
}
