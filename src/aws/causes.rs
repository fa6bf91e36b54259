//! Why something failed, in words that hold no secret.

use std::error::Error;

/// What an error and everything beneath it say of themselves. The SDK's own way to print an error shows it as the
/// debugger would as well, with the whole answer in it: one of STS that cannot be read has credentials in its body.
pub(crate) fn causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        // Many repeat what lies beneath them.
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("above")]
    struct Subreaper(#[source] Below);

    #[derive(Debug, thiserror::Error)]
    #[error("below")]
    struct Below(&'static str);

    #[test]
    fn what_only_the_debugger_shows_is_not_told() {
        let error = Subreaper(Below("hunter2"));
        assert!(format!("{error:?}").contains("hunter2"));
        assert_eq!(causes(&error), "above: below");
    }
}
