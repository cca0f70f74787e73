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

# Sets what a build of the static binaries takes, and TRIPLE and OUT, where they come to lie.
for_static_binaries() {
    TRIPLE=$(rustc -vV | sed -n 's/^host: //p')
    case $TRIPLE in
        *-linux-gnu* | *-linux-musl*) ;;
        *) die "the binaries are for Linux; this toolchain builds for $TRIPLE" ;;
    esac
    OUT=${CARGO_TARGET_DIR:-target}/$TRIPLE/release
    # With --target the flags are kept from build scripts and procedural macros, which cannot be static.
    # The cfg: in a static program the crate getrandom does not find getrandom(2) by itself and opens
    # /dev/urandom instead, which the proxy's Landlock domain does not have.
    export RUSTFLAGS="${RUSTFLAGS:-} -C target-feature=+crt-static --cfg getrandom_backend=\"linux_getrandom\""
}

# Symbols without what the compiler adds to tell types and crates' versions apart.
without_hash() { sed -E 's/17h[0-9a-f]{16}E$/E/; s/\.llvm\.[0-9]+$//; s/Cs[0-9A-Za-z]+_/C/g'; }

# Writes the symbols of the libraries just built that are in scripts/lib/start-up.functions, in that
# order, for the linker, and prints the file's path; nothing where the linker does not take such a file
# (Rust's own LLD does, which links for x86-64 by itself). A listed symbol that another compiler or
# version made anew is found by its name, if few have it: the list outlives an update.
symbols_in_order() {
    local sysroot libraries list=scripts/lib/start-up.functions new=$OUT/symbols.new order
    sysroot=$(rustc --print sysroot)/lib/rustlib/$TRIPLE
    [ "$TRIPLE" = x86_64-unknown-linux-gnu ] && [ -x "$sysroot/bin/gcc-ld/ld.lld" ] || return 0
    mapfile -t libraries < <(ls "$OUT"/deps/*.rlib "$sysroot"/lib/*.rlib; cc -print-file-name=libc.a)
    nm --defined-only "${libraries[@]}" 2>/dev/null | awk '$2 ~ /[tTwW]/ { print $3 }' | sort -u >"$new"
    awk '
        NR == FNR { there[$2]; named[$1] = named[$1] $2 "\n"; count[$1]++; next }
        $2 in there { print $2; next }
        count[$1] <= 8 { printf "%s", named[$1] }
    ' <(without_hash <"$new" | paste -d ' ' - "$new") <(without_hash <$list | paste -d ' ' - $list) |
        awk '!seen[$0]++' >"$new.sorted"
    [ "$(wc -l <"$new.sorted")" -gt 1000 ] || say "$list names few functions of this build: scripts/start-up-functions makes it anew" >&2
    # Cargo does not look into the file: what it holds has to show in its name.
    order=$OUT/start-up-$(sha256sum <"$new.sorted" | cut -c 1-16).symbols
    rm -f "$OUT"/start-up-*.symbols "$new"
    mv "$new.sorted" "$order"
    realpath "$order"
}
