//! The result of a conditional write.

use jiff::Timestamp;

/// The result of a conditional write, as the service reports it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Written<T> {
    /// The service has stored this. The time is the service's. It is `None` if the response has none that counts
    /// ([`super::service_time`]).
    Yes(T, Option<Timestamp>),
    /// The condition was not met, and nothing was written by this request. An earlier attempt may have succeeded: if
    /// its response is lost, the SDK sends the request again.
    Changed,
}

impl<T> Written<T> {
    pub(super) fn map<U>(self, convert: impl FnOnce(T) -> U) -> Written<U> {
        match self {
            Self::Yes(stored, date) => Written::Yes(convert(stored), date),
            Self::Changed => Written::Changed,
        }
    }
}
