//! The text of an error and its causes, without secrets.

use std::error::Error;

/// Returns the message of `error` followed by the messages of its causes, separated by `: `.
///
/// The SDK's own function for printing an error also prints the `Debug` output of the error, which contains the whole
/// response. If the SDK cannot parse a response of STS, this output would contain the credentials in the response.
pub(crate) fn causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        // Many errors repeat the message of their cause.
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
    struct Outer(#[source] Below);

    #[derive(Debug, thiserror::Error)]
    #[error("below")]
    struct Below(&'static str);

    #[test]
    fn what_only_the_debugger_shows_is_not_told() {
        let error = Outer(Below("hunter2"));
        assert!(format!("{error:?}").contains("hunter2"));
        assert_eq!(causes(&error), "above: below");
    }
}
