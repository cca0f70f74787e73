# What building the binaries needs. Sourced after common.sh.
# shellcheck shell=bash

# Rust as need_rust has it, and where a Debian machine has none, the archive's if it is new enough:
# Debian 12 packages a recent one for its web browsers.
need_build_tools() {
    local found
    if ! command -v cargo >/dev/null || ! command -v rustc >/dev/null; then
        if command -v apt-get >/dev/null; then
            found=$(archive_rust)
            if [ -z "$found" ] && apt-get update >"$LOGS/apt.log" 2>&1; then found=$(archive_rust); fi
            if [ "$(printf '%s\n' "$RUST_NEEDED" "$found" | sort -V | head -n 1)" = "$RUST_NEEDED" ]; then
                need_packages rustc-web cargo-web
            fi
        fi
    fi
    need_rust
    # readelf looks at the result; the rest is for crates that compile C.
    need_packages binutils perl pkg-config ca-certificates
}

# The version of rustc-web that apt would install, or nothing.
archive_rust() {
    apt-cache policy rustc-web 2>/dev/null | awk '/Candidate:/ && $2 != "(none)" { print $2 }'
}
