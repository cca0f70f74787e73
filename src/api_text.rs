//! What the API server answered, in one line for a person.
#![forbid(unsafe_code)]

/// The message of a refused call, else the cause without its layers.
#[must_use]
pub fn api_text(error: &kube::Error) -> String {
    match error {
        // The library's own text repeats the whole status as a debug dump.
        kube::Error::Api(status) if !status.message.is_empty() => status.message.clone(),
        kube::Error::Api(status) => format!("status {}", status.code),
        other => {
            let mut cause: &dyn std::error::Error = other;
            while let Some(next) = cause.source() {
                cause = next;
            }
            cause.to_string()
        }
    }
}
