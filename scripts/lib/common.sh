# Shared by the scripts; sourced from the top of the checkout.
# shellcheck shell=bash

CACHE=${RINGFENCE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/ringfence}
LOGS=$CACHE/logs
mkdir -p "$LOGS"

# What Cargo.toml asks for as rust-version.
RUST_NEEDED=1.89
CARGO_DENY=0.20.2
STARTED=$SECONDS

# A line of progress with the time since the script began.
say() {
    printf '[%3d:%02d] %s\n' $(((SECONDS - STARTED) / 60)) $(((SECONDS - STARTED) % 60)) "$*"
}

die() {
    echo "${0##*/}: $*" >&2
    exit 1
}

# Installs Debian packages that are missing; quiet when all are there.
need_packages() {
    # Another apt may be at work.
    local missing=() package apt=(apt-get -o DPkg::Lock::Timeout=300)
    for package in "$@"; do
        dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' ||
            missing+=("$package")
    done
    [ ${#missing[@]} = 0 ] && return
    [ "$(id -u)" = 0 ] || die "needs ${missing[*]}: run as root, or apt-get install them"
    say "installing ${missing[*]}"
    if ! "${apt[@]}" install -y --no-install-recommends "${missing[@]}" >"$LOGS/apt.log" 2>&1; then
        # The package lists of a new machine are empty or old.
        "${apt[@]}" update >>"$LOGS/apt.log" 2>&1
        "${apt[@]}" install -y --no-install-recommends "${missing[@]}" >>"$LOGS/apt.log" 2>&1 || {
            tail -n 20 "$LOGS/apt.log" >&2
            die "cannot install ${missing[*]}; the log is $LOGS/apt.log"
        }
    fi
}

# Rust and what its crates with C code want.
need_rust() {
    need_packages gcc libc6-dev make cmake
    local have
    have=$(rustc --version 2>/dev/null | cut -d' ' -f2) ||
        die "no Rust toolchain: install Rust $RUST_NEEDED or newer by rustup, then run this again"
    [ "$(printf '%s\n' "$RUST_NEEDED" "$have" | sort -V | head -n 1)" = "$RUST_NEEDED" ] ||
        die "Rust $have is too old: $RUST_NEEDED or newer is needed (rustup update)"
}

# cargo-deny on the dependencies; built once into the cache.
check_dependencies() {
    local deny=$CACHE/cargo-deny-$CARGO_DENY/bin/cargo-deny
    if [ ! -x "$deny" ]; then
        say "building cargo-deny $CARGO_DENY (once)"
        cargo install --locked --quiet --root "$CACHE/cargo-deny-$CARGO_DENY" \
            "cargo-deny@$CARGO_DENY"
    fi
    "$deny" --log-level error check bans licenses sources
}

# The test targets that need no cluster, as cargo's arguments.
test_targets() {
    cargo metadata --no-deps --format-version 1 --offline |
        python3 -c 'import json,sys
for target in json.load(sys.stdin)["packages"][0]["targets"]:
    if "test" in target["kind"] and target["name"] not in ("e2e", "load"):
        print("--test", target["name"])'
}
