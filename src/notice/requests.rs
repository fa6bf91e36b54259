//! Sends the requests to a metadata service. They go straight to its link-local address: no proxy is used, and no
//! redirect is followed. Each has a time limit, and of each answer at most 64 KiB are read.

use std::error::Error;
use std::time::Duration;

use http::{Method, Request};
use http_body_util::{BodyExt, Limited};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use jiff::Timestamp;
use tokio::time::{Instant, sleep, timeout};

use super::answer::{self, Answer, Found, Useless};
use super::service::Service;
use crate::lease::notice::{Notice, Provider, ask_pause};
use crate::trace::trace;

/// How long a connection may take. The service is on the same machine, or next to it.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// How long a request may take in all.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(2);

/// How long Google's service waits for a change before it answers without one.
const HANG: Duration = hang(cfg!(debug_assertions));

/// Returns [`HANG`]: 1 min. A debug build has a tenth of it, for the tests.
const fn hang(is_debug_build: bool) -> Duration {
    Duration::from_secs(if is_debug_build { 6 } else { 60 })
}

/// How long Azure's service may take to answer the first question about events. That question turns the events on, which
/// takes up to two minutes (Azure, "Scheduled Events for Linux VMs", Enabling and disabling Scheduled Events).
const FIRST_EVENTS_TIMEOUT: Duration = first_events_timeout(cfg!(debug_assertions));

/// Returns [`FIRST_EVENTS_TIMEOUT`]: 125 s. A debug build has less, for the tests.
const fn first_events_timeout(is_debug_build: bool) -> Duration {
    Duration::from_secs(if is_debug_build { 8 } else { 125 })
}

/// How much of an answer is read, in bytes.
const MAX_BODY_BYTES: usize = 64 << 10;

const TOKEN: &str = "/latest/api/token";
const TOKEN_HEADER: &str = "x-aws-ec2-metadata-token";
/// The time for which a token is valid, in seconds: 6 hours, the longest possible.
const TOKEN_TTL: (&str, &str) = ("x-aws-ec2-metadata-token-ttl-seconds", "21600");
const SPOT: &str = "/latest/meta-data/spot/instance-action";
const LIFECYCLE: &str = "/latest/meta-data/autoscaling/target-lifecycle-state";

const AZURE: (&str, &str) = ("metadata", "true");
const MACHINE: &str = "/metadata/instance/compute/name?api-version=2021-02-01&format=text";
const EVENTS: &str = "/metadata/scheduledevents?api-version=2020-07-01";

const FLAVOR: (&str, &str) = ("metadata-flavor", "Google");
const PREEMPTED: &str = "/computeMetadata/v1/instance/preempted";
const MAINTENANCE: &str = "/computeMetadata/v1/instance/maintenance-event";

/// Asks a metadata service again and again, until it says that this host is about to end.
pub(crate) async fn first_notice(service: Service) -> Notice {
    let mut questions = Questions::new(service, Waits::ForChange);
    let mut useless = 0_u32;
    let mut traced = None;
    loop {
        let asked = Instant::now();
        let found = questions.ask().await;
        let state = found.as_ref().map(drop).map_err(Useless::clone);
        if traced.as_ref() != Some(&state) {
            match &state {
                Ok(()) => trace!("{} answers", questions.requests.service),
                Err(failure) => trace!("{} is useless: {failure}", questions.requests.service),
            }
        }
        traced = Some(state);
        match found {
            Ok(Some(notice)) if notice.is_due(Timestamp::now()) => return notice,
            Ok(_) => useless = 0,
            Err(_) => useless = useless.saturating_add(1),
        }
        // An answer that came after a wait for a change may be followed at once by the next question.
        let waited = if useless == 0 { asked.elapsed() } else { Duration::ZERO };
        sleep(ask_pause(useless).saturating_sub(waited)).await;
    }
}

/// Asks a metadata service once, without a wait for a change.
///
/// # Errors
/// If it does not answer, or if its answer is useless.
pub(crate) async fn ask_once(service: Service) -> Found {
    Questions::new(service, Waits::Never).ask().await
}

/// Whether a question to Google's service may wait for a change. After a wait without a useful answer, none does: what is
/// between this host and the service may end every long request, and a preemption comes 30 s after its notice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Waits {
    Never,
    ForChange,
}

/// The questions to one metadata service, and what the next ones need of earlier answers.
struct Questions {
    requests: Requests,
    /// EC2's token. `None` if there is none, or if the service has refused it.
    token: Option<String>,
    /// The name of this machine in Azure. `None` until it was asked for.
    machine: Option<String>,
    /// Whether Azure has answered a question about events, or has not within [`FIRST_EVENTS_TIMEOUT`].
    has_events: bool,
    /// The `ETag` of Google's last answer about a preemption and about a maintenance. `None` if there is none.
    seen: [Option<String>; 2],
    /// Whether Google's service has no key for maintenance events, as that of GKE.
    has_no_maintenance: bool,
    waits: Waits,
}

impl Questions {
    fn new(service: Service, waits: Waits) -> Self {
        let mut connector = HttpConnector::new();
        connector.set_connect_timeout(Some(CONNECT_TIMEOUT));
        // The next question comes after some seconds. A connection to a machine that was suspended meanwhile is of no
        // use.
        let client = Client::builder(TokioExecutor::new()).pool_max_idle_per_host(0).build(connector);
        let requests = Requests { client, service };
        Self {
            requests,
            token: None,
            machine: None,
            has_events: false,
            seen: [None, None],
            has_no_maintenance: false,
            waits,
        }
    }

    /// Asks whether this host is about to end.
    ///
    /// # Errors
    /// If an answer is missing or useless, and no other one has a notice.
    async fn ask(&mut self) -> Found {
        match self.requests.service.provider {
            Provider::Ec2 => self.ask_ec2().await,
            Provider::Azure => self.ask_azure().await,
            Provider::Gcp => self.ask_google().await,
        }
    }

    async fn ask_ec2(&mut self) -> Found {
        let spot = self.get_from_ec2(SPOT).await.and_then(|answer| answer::spot(&answer));
        // Without a token, the other item cannot be read either.
        if self.token.is_none() || matches!(spot, Ok(Some(_))) {
            return spot;
        }
        let lifecycle = self.get_from_ec2(LIFECYCLE).await.and_then(|answer| answer::lifecycle(&answer));
        if matches!(lifecycle, Ok(Some(_))) { lifecycle } else { spot.and(lifecycle) }
    }

    /// Gets an item with the token, and with a new one if the service refuses the last one, which has expired. The
    /// first version of the service, without a token, is not used.
    async fn get_from_ec2(&mut self, path: &str) -> Result<Answer, Useless> {
        loop {
            let is_new = self.token.is_none();
            let token = match self.token.take() {
                Some(token) => token,
                None => answer::token(&self.requests.send(Method::PUT, TOKEN, TOKEN_TTL, REQUEST_TIMEOUT).await?)?,
            };
            match self.requests.get(path, (TOKEN_HEADER, &token)).await {
                Ok(answer) if answer.status == 401 && is_new => return Ok(answer),
                Ok(answer) if answer.status == 401 => {}
                answer => {
                    self.token = Some(token);
                    return answer;
                }
            }
        }
    }

    async fn ask_azure(&mut self) -> Found {
        if self.machine.is_none() {
            self.machine = Some(answer::machine(&self.requests.get(MACHINE, AZURE).await?)?);
        }
        let machine = self.machine.as_deref().unwrap_or_default();
        let may_be_first = !self.has_events && self.waits != Waits::Never;
        let (asked, limit) = (Instant::now(), if may_be_first { FIRST_EVENTS_TIMEOUT } else { REQUEST_TIMEOUT });
        let answer = self.requests.send(Method::GET, EVENTS, AZURE, limit).await;
        let found = answer.and_then(|answer| answer::scheduled_events(&answer, machine));
        // Any other failure may come before the events are on.
        self.has_events |= found.is_ok() || asked.elapsed() >= limit;
        found
    }

    /// Asks Google's service for two keys at once. An answer to one of them is enough for now: the other one is asked
    /// again with the `ETag` of its last answer, so no change is missed.
    async fn ask_google(&mut self) -> Found {
        if self.waits == Waits::ForChange
            && let [Some(preempted), Some(maintenance)] = &self.seen
        {
            let maintenance = self.requests.wait_for_change(MAINTENANCE, maintenance);
            let (place, answer) = tokio::select! {
                answer = self.requests.wait_for_change(PREEMPTED, preempted) => (0, answer),
                answer = maintenance, if !self.has_no_maintenance => (1, answer),
            };
            let found = answer.and_then(|answer| self.note(place, answer));
            if found.is_err() {
                self.waits = Waits::Never;
            }
            return found;
        }
        let preempted = self.requests.get(PREEMPTED, FLAVOR).await?;
        let preempted = self.note(0, preempted)?;
        if preempted.is_some() {
            return Ok(preempted);
        }
        let maintenance = self.requests.get(MAINTENANCE, FLAVOR).await?;
        self.note(1, maintenance)
    }

    /// Remembers the `ETag` of an answer to the question about a preemption (0) or a maintenance (1), and reads it.
    fn note(&mut self, place: usize, answer: Answer) -> Found {
        if place == 1 && answer.status == 404 && answer.is_of_google {
            self.has_no_maintenance = true;
            self.seen[1] = Some(String::new());
            return Ok(None);
        }
        let found = if place == 0 { answer::preempted(&answer) } else { answer::maintenance(&answer) };
        self.seen[place] = answer.etag.filter(|_| found.is_ok());
        found
    }
}

/// The client, and where it sends its requests.
struct Requests {
    client: Client<HttpConnector, String>,
    service: Service,
}

impl Requests {
    async fn get(&self, path: &str, header: (&str, &str)) -> Result<Answer, Useless> {
        self.send(Method::GET, path, header, REQUEST_TIMEOUT).await
    }

    /// Gets a key from Google's service when its value is no longer the one with the `ETag` `seen`, or after [`HANG`].
    async fn wait_for_change(&self, path: &str, seen: &str) -> Result<Answer, Useless> {
        let path = format!("{path}?wait_for_change=true&timeout_sec={}&last_etag={seen}", HANG.as_secs());
        self.send(Method::GET, &path, FLAVOR, hang_timeout(HANG)).await
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        (name, value): (&str, &str),
        limit: Duration,
    ) -> Result<Answer, Useless> {
        let request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.service.address))
            .header(name, value)
            .body(String::new())
            .map_err(|_| Useless("its address cannot be used".to_owned()))?;
        match timeout(limit, self.answer(request)).await {
            Ok(answer) => answer,
            Err(_) => Err(Useless(format!("no answer in {} s", limit.as_secs()))),
        }
    }

    async fn answer(&self, request: Request<String>) -> Result<Answer, Useless> {
        let response = self.client.request(request).await.map_err(|error| Useless(innermost(&error)))?;
        let text = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok());
        let mut answer = Answer {
            status: response.status().as_u16(),
            body: Vec::new(),
            is_of_google: text(FLAVOR.0) == Some(FLAVOR.1),
            etag: text("etag").filter(|etag| is_etag(etag)).map(ToOwned::to_owned),
        };
        if answer.status == 200 {
            let body = Limited::new(response.into_body(), MAX_BODY_BYTES).collect().await;
            answer.body = body.map_err(|error| Useless(innermost(error.as_ref())))?.to_bytes().to_vec();
        }
        Ok(answer)
    }
}

/// Returns the time limit of a request to a service that waits for a change for as long as `hang`.
fn hang_timeout(hang: Duration) -> Duration {
    hang + REQUEST_TIMEOUT
}

/// Whether an `ETag` can be a part of a URL as it is. Google's are hexadecimal.
fn is_etag(etag: &str) -> bool {
    !etag.is_empty() && etag.len() <= 64 && etag.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
}

/// Returns the text of the innermost cause of an error: the reason of the system, or of the library.
fn innermost(error: &(dyn Error + 'static)) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// docs/notice.md has these times. A debug build has shorter ones.
    #[test]
    fn a_hanging_get_of_a_release_lasts_a_minute_and_its_limit_is_62_s() {
        assert_eq!(hang(false), Duration::from_mins(1));
        assert_eq!(hang_timeout(hang(false)), Duration::from_secs(62));
    }

    #[test]
    fn the_first_answer_of_azure_may_take_two_minutes() {
        assert_eq!(first_events_timeout(false), Duration::from_secs(125));
        assert_eq!(FIRST_EVENTS_TIMEOUT, first_events_timeout(cfg!(debug_assertions)));
    }

    #[test]
    fn an_etag_is_used_only_if_it_can_be_a_part_of_a_url() {
        for good in ["0", "d1a7bf3b0a9f8e5c", "A-b", &"a".repeat(64)] {
            assert!(is_etag(good), "{good}");
        }
        for bad in ["", "\"d1a7\"", "a&b", "a b", "a%20", &"a".repeat(65)] {
            assert!(!is_etag(bad), "{bad}");
        }
    }
}
