//! `ringfence`: the operator's side, the admission webhook and the verbs a person types.
#![forbid(unsafe_code)]

/// A review is a tree of small pieces, made, copied and dropped: by the C library's allocator it takes a
/// third longer (docs/performance.md). The supervisor, whose memory counts, keeps that one.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    ringfence::cli::run()
}
