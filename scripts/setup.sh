#!/usr/bin/env bash
# Prepares this machine and this checkout. Every `make` target begins here, so it may be the first thing that ever runs,
# and costs well under a second when there is nothing to do.
#
#   scripts/setup.sh                    all of it: programs, Python environment, the package
#   scripts/setup.sh --development      without the servers and the sandbox: enough for `make check` and `make lock`
#   scripts/setup.sh --official-runsc   install gVisor's own release of runsc, for systems whose packages have none (root)

set -euo pipefail
cd "$(dirname "$0")/.."

readonly RUNSC_SINCE=20240729 # Debian 12's own, of 2022, is too old; its backports have this one
readonly RUNSC_RELEASES=https://storage.googleapis.com/gvisor/releases/release/latest
readonly VENV=.venv

say() { printf 'setup: %s\n' "$*"; }
fail() {
    printf 'setup: %s\n' "$@" >&2
    exit 1
}
is_root() { [ "$(id -u)" = 0 ]; }
has_apt() { command -v apt-get >/dev/null; }

main() {
    case "${1:-}" in
        "") prepare everything ;;
        --development) prepare development ;;
        --official-runsc) install_official_runsc ;;
        *) fail "unknown option $1; there are --development and --official-runsc" ;;
    esac
}

prepare() {
    one_at_a_time
    install_programs "$1"
    prepare_environment
}

# Two targets may be started at once in a fresh clone.
one_at_a_time() {
    mkdir -p .cache
    exec 9>.cache/setup.lock
    command -v flock >/dev/null || return 0
    if ! flock --nonblock 9; then
        say "waiting for another set-up of this checkout"
        flock 9
    fi
}

# --- Programs -------------------------------------------------------------------------------------------------------

install_programs() {
    local missing=()
    mapfile -t missing < <(missing_packages "$1")
    [ ${#missing[@]} -gt 0 ] || return 0
    has_apt || explain_other_systems "${missing[@]}"
    is_root || explain_apt "${missing[@]}"
    install_with_apt "${missing[@]}"
    mapfile -t missing < <(missing_packages "$1")
    [ ${#missing[@]} -eq 0 ] || fail "installed, but still not usable: ${missing[*]}"
}

# Names of Debian packages for what is not there, one a line.
missing_packages() {
    find_python >/dev/null || printf 'python3\npython3-venv\n'
    command -v cc >/dev/null || echo gcc
    [ -e /usr/include/stdio.h ] || echo libc6-dev
    command -v make >/dev/null || echo make
    [ "$1" = everything ] || return 0
    [ -x /usr/bin/python3 ] || echo python3 # what a sandbox sees: the host's own /usr, and no more
    command -v zstd >/dev/null || echo zstd
    command -v ip >/dev/null || echo iproute2 # for the cluster of the tests
    command -v redis-server >/dev/null || echo redis-server
    has_postgres || echo postgresql
    [ "$(runsc_date)" -ge "$RUNSC_SINCE" ] || echo runsc
}

has_postgres() { command -v initdb >/dev/null || compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null; }

# The release of the installed runsc as YYYYMMDD; 0 when there is none.
runsc_date() {
    local version
    version=$(runsc --version 2>/dev/null | head -n 1 | grep -oE '[0-9]{8}' || true)
    echo "${version:-0}"
}

install_with_apt() {
    export DEBIAN_FRONTEND=noninteractive
    say "installing $* (apt)"
    apt_get update -qq || say "some package lists could not be read; going on with the rest"
    local packages="$*"
    case " $packages " in *" runsc "*) packages=${packages/runsc/$(runsc_package)} ;; esac
    case " $* " in *" postgresql "*) no_postgres_cluster ;; esac
    hold_services
    # shellcheck disable=SC2086
    apt_get install -y --no-install-recommends $packages |
        awk '/^Get:/ && ++f % 20 == 0 { print "  " f " packages fetched" } /^Setting up/ && ++s % 20 == 0 { print "  " s " set up" }
            { fflush() }'
    release_services
}

apt_get() { apt-get -o DPkg::Lock::Timeout=600 -o Dpkg::Options::=--force-confold "$@" 9>&-; }

# What to ask apt-get for to have a runsc of the required age; on Debian 12 that is the backports' one.
runsc_package() {
    if runsc_is_offered; then
        echo runsc
        return
    fi
    # shellcheck disable=SC1091
    local codename && codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
    if [ "$codename" != bookworm ]; then
        fail "the packages of this system have no runsc of $RUNSC_SINCE or later;" \
            "run  scripts/setup.sh --official-runsc  to install gVisor's own release"
    fi
    if ! grep -rqs bookworm-backports /etc/apt/sources.list /etc/apt/sources.list.d; then
        add_backports >&2
        apt_get update -qq >&2 || true
    fi
    echo runsc/bookworm-backports
}

# Whether a plain install would bring a runsc that is new enough.
runsc_is_offered() {
    local date
    date=$(apt-cache policy runsc | awk '/Candidate:/ { print $2 }' | grep -oE '[0-9]{8}' || true)
    [ "${date:-0}" -ge "$RUNSC_SINCE" ]
}

# A source of our own, from the mirror that this machine already trusts.
add_backports() {
    local mirror file=/etc/apt/sources.list.d/blastdoor-backports.sources
    # shellcheck disable=SC2016
    mirror=$(apt-get indextargets --format '$(RELEASE) $(REPO_URI)' 'Created-By: Packages' |
        awk '$1 == "bookworm" { print $2; exit }')
    [ -n "$mirror" ] || fail "found no mirror for bookworm in the apt sources, so bookworm-backports cannot be added"
    say "adding bookworm-backports from $mirror as $file"
    printf '%s\n' 'Types: deb' "URIs: $mirror" 'Suites: bookworm-backports' 'Components: main' \
        'Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg' >"$file"
}

# The packages of Redis and PostgreSQL start servers. We only want the programs: ours run in directories of their own.
hold_services() {
    [ -e /usr/sbin/policy-rc.d ] && return 0
    printf '#!/bin/sh\n# put here by Blastdoor, for the time of one installation\nexit 101\n' >/usr/sbin/policy-rc.d
    chmod 755 /usr/sbin/policy-rc.d
    trap release_services EXIT
}
release_services() {
    grep -qs 'put here by Blastdoor' /usr/sbin/policy-rc.d || return 0
    rm -f /usr/sbin/policy-rc.d
    if [ -d /run/systemd/system ]; then systemctl --quiet disable redis-server.service 2>/dev/null || true; fi
}
no_postgres_cluster() {
    [ -e /etc/postgresql-common/createcluster.conf ] && return 0
    mkdir -p /etc/postgresql-common
    echo 'create_main_cluster = false # Blastdoor makes clusters of its own' >/etc/postgresql-common/createcluster.conf
}

explain_apt() {
    fail "missing on this machine: $*" \
        "Run  sudo scripts/setup.sh  and it installs them, or by hand (on Debian 12, runsc comes from bookworm-backports):" \
        "  sudo apt-get install $*"
}

explain_other_systems() {
    fail "missing on this machine (as Debian calls them): $*" \
        "Install with your system's package manager: Python 3.11 or later with venv, also as /usr/bin/python3; a C compiler" \
        "and the C library's headers; make; zstd; redis-server; the PostgreSQL server's programs (initdb, postgres)." \
        "For runsc of $RUNSC_SINCE or later run  sudo scripts/setup.sh --official-runsc  (gVisor's release, checksum verified)."
}

# Not used where packages have runsc. It fetches from one place only, and installs nothing that its checksum does not match.
install_official_runsc() {
    is_root || fail "--official-runsc installs to /usr/local/bin: run it as root"
    command -v curl >/dev/null || fail "--official-runsc needs curl"
    local machine place
    machine=$(uname -m)
    case "$machine" in x86_64 | aarch64) ;; *) fail "gVisor has no release for $machine" ;; esac
    place=$(mktemp -d)
    say "fetching runsc for $machine from $RUNSC_RELEASES"
    for file in runsc runsc.sha512; do
        curl --fail --silent --show-error --location --proto '=https' --output "$place/$file" "$RUNSC_RELEASES/$machine/$file" ||
            fail "could not fetch $RUNSC_RELEASES/$machine/$file"
    done
    (cd "$place" && sha512sum --check --strict --quiet runsc.sha512) || fail "runsc does not match its checksum: not installed"
    install -m 755 "$place/runsc" /usr/local/bin/runsc
    rm -r "$place"
    say "installed $(/usr/local/bin/runsc --version | head -n 1)"
}

# --- Python ---------------------------------------------------------------------------------------------------------

# The first interpreter that is new enough and can make virtual environments; a version manager's stand-in is resolved.
find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3 /usr/bin/python3 python3.14 python3.13 python3.12 python3.11; do
        "$candidate" -c '
import sys
if sys.version_info < (3, 11): sys.exit(1)
import ensurepip, venv
print(sys.executable)' 2>/dev/null && return 0
    done
    return 1
}

prepare_environment() {
    local locked package
    locked=$(sha256sum requirements-dev.lock)
    if ! "$VENV/bin/python" -c '' 2>/dev/null || [ "$locked" != "$(cat "$VENV/.locked" 2>/dev/null)" ]; then
        install_dependencies
        echo "$locked" >"$VENV/.locked"
    fi
    package=$(pwd; sha256sum pyproject.toml hatch_build.py workers/boundaries/*/init.c workers/pods/init.c workers/pods/inside/*.h 2>/dev/null || true)
    if [ "$package" != "$(cat "$VENV/.package" 2>/dev/null)" ] || ! sandbox_init_is_built; then
        install_package
        echo "$package" >"$VENV/.package"
    fi
}

sandbox_init_is_built() {
    local source
    for source in workers/boundaries/*/init.c; do
        [ ! -e "$source" ] || [ -x "${source%.c}" ] || return 1
    done
}

install_dependencies() {
    local python count
    if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        python=$(find_python) || fail "no Python 3.11 or later that can make virtual environments"
        say "making $VENV with $python"
        "$python" -m venv --clear "$VENV"
    fi
    count=$(grep -c '==' requirements-dev.lock)
    say "installing $count locked dependencies; about a minute"
    "$VENV/bin/python" -m pip install --disable-pip-version-check --progress-bar off --require-hashes -r requirements-dev.lock |
        awk '/^Collecting/ { if (++n % 15 == 0) print "  " n " found" } /^Installing/ { print "  unpacking" } { fflush() }'
}

install_package() {
    say "installing blastdoor from this checkout"
    "$VENV/bin/python" -m pip install --disable-pip-version-check --quiet --no-build-isolation --no-deps --editable . ||
        fail "blastdoor does not install; what is above says why"
}

main "$@"
