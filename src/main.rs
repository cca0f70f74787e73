//! `ringfence`: the operator's side, the admission webhook and the verbs a person types.
#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    ringfence::cli::run()
}
