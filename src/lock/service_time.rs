//! The time of a lock service. Only the service's time decides whether a lease has lapsed, so that no host's clock
//! matters.

use std::sync::{Arc, Mutex, PoisonError};

use aws_smithy_runtime_api::box_error::BoxError;
use aws_smithy_runtime_api::client::interceptors::context::AfterDeserializationInterceptorContextRef;
use aws_smithy_runtime_api::client::interceptors::{Intercept, dyn_dispatch_hint};
use aws_smithy_runtime_api::client::orchestrator::HttpResponse;
use aws_smithy_runtime_api::client::runtime_components::RuntimeComponents;
use aws_smithy_types::config_bag::ConfigBag;
use jiff::Timestamp;

/// Takes the service's time from the response to one request. It is an interceptor of that request.
#[derive(Clone, Debug, Default)]
pub(crate) struct ServiceTime(Arc<Mutex<Option<Timestamp>>>);

impl ServiceTime {
    /// Returns the time in the last response, in whole seconds. `None` if there was no response that [`date`] accepts.
    pub(crate) fn get(&self) -> Option<Timestamp> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[dyn_dispatch_hint]
impl Intercept for ServiceTime {
    fn name(&self) -> &'static str {
        "ServiceTime"
    }

    fn read_after_deserialization(
        &self,
        context: &AfterDeserializationInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let found = of_response(context.response());
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = found;
        Ok(())
    }
}

/// Returns the service's time in `response`, as [`ServiceTime::get`].
pub(super) fn of_response(response: &HttpResponse) -> Option<Timestamp> {
    date(response.status().as_u16(), |name| response.headers().get(name))
}

/// Returns the `Date` of a response. `None` if the response is not a success of the service itself. A proxy's own
/// responses have a `Date` too, but no request ID; and only a cache adds `Age` (RFC 9111, 5.1). DynamoDB sends
/// `x-amzn-requestid`, and S3 `x-amz-request-id`; some services that are compatible with S3 send only the former.
fn date<'a>(status: u16, header: impl Fn(&str) -> Option<&'a str>) -> Option<Timestamp> {
    let has_id =
        ["x-amz-request-id", "x-amzn-requestid"].into_iter().any(|name| header(name).is_some_and(|id| !id.is_empty()));
    let is_of_service = (200..300).contains(&status) && has_id && header("age").is_none();
    parse(header("date")?).filter(|_| is_of_service)
}

/// Parses a `Date` header (RFC 9110, 5.6.7). `None` if it is not a time.
pub(super) fn parse(date: &str) -> Option<Timestamp> {
    jiff::fmt::rfc2822::DateTimeParser::new().parse_timestamp(date).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const DATE: &str = "Tue, 24 Nov 2026 10:31:45 GMT";

    #[test]
    fn a_services_clock_is_read() {
        assert_eq!(parse(DATE), "2026-11-24T10:31:45Z".parse().ok());
        assert_eq!(parse("yesterday"), None);
    }

    #[test]
    fn only_a_success_with_the_services_request_id_has_the_services_time() {
        let id = ("x-amzn-requestid", "7T");
        for (status, headers, expected) in [
            (200, vec![("date", DATE), id], true),
            (204, vec![("date", DATE), ("x-amz-request-id", "7T")], true),
            (200, vec![("date", DATE)], false),
            (200, vec![("date", DATE), ("x-amz-request-id", "")], false),
            (200, vec![id], false),
            (200, vec![("date", "now"), id], false),
            (200, vec![("date", DATE), id, ("age", "7")], false),
            (304, vec![("date", DATE), id], false),
            (403, vec![("date", DATE), id], false),
            (502, vec![("date", DATE), id], false),
        ] {
            let header = |name: &str| headers.iter().find(|(known, _)| *known == name).map(|(_, value)| *value);
            assert_eq!(date(status, header), parse(DATE).filter(|_| expected), "{status} {headers:?}");
        }
    }
}
