//! What the answers of a metadata service mean. An answer that does not have the documented form says nothing: a proxy,
//! a captive portal or another program may have sent it.

use std::fmt;

use jiff::Timestamp;
use jiff::fmt::rfc2822;
use serde::Deserialize;

use crate::lease::notice::{Announcement, HostEnd, Notice};

/// An answer, as far as it is used.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    /// Empty unless the status is 200.
    pub(crate) body: Vec<u8>,
    /// Whether it has the header `Metadata-Flavor: Google`.
    pub(crate) is_of_google: bool,
    /// The header `ETag`. `None` if there is none.
    pub(crate) etag: Option<String>,
}

/// Why an answer cannot be used, in a few words. They contain no text of the answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Useless(pub(crate) String);

impl fmt::Display for Useless {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

/// What one answer says about the end of the host. `Ok(None)`: the host is not about to end.
pub(crate) type Found = Result<Option<Notice>, Useless>;

fn useless<T>(reason: &str) -> Result<T, Useless> {
    Err(Useless(reason.to_owned()))
}

impl Answer {
    /// Returns the body as text.
    fn text(&self) -> Result<&str, Useless> {
        match (self.status, std::str::from_utf8(&self.body)) {
            (200, Ok(text)) => Ok(text.trim()),
            (200, Err(_)) => useless("an answer that is not UTF-8"),
            (status, _) => Err(Useless(format!("the status {status}"))),
        }
    }
}

/// The longest token that is used, in bytes. EC2's have 56.
const MAX_TOKEN: usize = 1024;

/// Returns the token in the answer to `PUT /latest/api/token` (EC2, "Instance Metadata Service Version 2").
pub(crate) fn token(answer: &Answer) -> Result<String, Useless> {
    let token = answer.text()?;
    if token.is_empty() || token.len() > MAX_TOKEN || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        return useless("an answer that is not a token");
    }
    Ok(token.to_owned())
}

#[derive(Deserialize)]
struct InstanceAction {
    action: String,
    #[serde(default)]
    time: String,
}

/// Reads the answer to `GET /latest/meta-data/spot/instance-action` (EC2, "Spot Instance interruption notices"). There
/// is no such item, and so a 404, until the instance is interrupted.
pub(crate) fn spot(answer: &Answer) -> Found {
    if answer.status == 404 {
        return Ok(None);
    }
    let Ok(InstanceAction { action, time }) = serde_json::from_str(answer.text()?) else {
        return useless("an answer that is not an action");
    };
    let end = match action.as_str() {
        "terminate" => HostEnd::Terminated,
        "stop" => HostEnd::Stopped,
        "hibernate" => HostEnd::Hibernated,
        _ => return useless("an action that is not known"),
    };
    let at = time.parse::<Timestamp>().ok().map(Timestamp::as_second);
    Ok(Some(Notice { end, announcement: Announcement::SpotInterruption, at }))
}

/// Reads the answer to `GET /latest/meta-data/autoscaling/target-lifecycle-state` (EC2 Auto Scaling, "Retrieve the
/// target lifecycle state through instance metadata"). There is no such item outside of a group. An instance that
/// returns to its warm pool is stopped or hibernated too.
pub(crate) fn lifecycle(answer: &Answer) -> Found {
    if answer.status == 404 {
        return Ok(None);
    }
    let end = match answer.text()? {
        "Terminated" | "Warmed:Terminated" => HostEnd::Terminated,
        "Warmed:Stopped" => HostEnd::Stopped,
        "Warmed:Hibernated" => HostEnd::Hibernated,
        state if is_word(state) => return Ok(None),
        _ => return useless("an answer that is not a lifecycle state"),
    };
    Ok(Some(Notice { end, announcement: Announcement::AutoScaling, at: None }))
}

/// Whether the text is a word with a capital, as the states of these services are. A service may have states that are
/// not known here.
fn is_word(text: &str) -> bool {
    let is_part = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b':' | b'_');
    text.starts_with(|first: char| first.is_ascii_uppercase()) && text.len() <= 64 && text.bytes().all(is_part)
}

/// Returns the name in the answer to `GET /metadata/instance/compute/name`, by which Azure's events name this machine.
pub(crate) fn machine(answer: &Answer) -> Result<String, Useless> {
    let name = answer.text()?;
    if name.is_empty() || name.len() > 256 || name.chars().any(char::is_control) || name.contains('<') {
        return useless("an answer that is not the name of a machine");
    }
    Ok(name.to_owned())
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ScheduledEvents {
    events: Vec<ScheduledEvent>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ScheduledEvent {
    event_type: String,
    resources: Vec<String>,
    #[serde(default)]
    event_status: String,
    #[serde(default)]
    not_before: Option<String>,
}

/// Reads the answer to `GET /metadata/scheduledevents` (Azure, "Scheduled Events for Linux VMs"). `machine` is the name
/// of this machine: the machines of a scale set or of an availability set get the events of all of them.
///
/// A `Freeze` pauses the machine for some seconds, which a lease survives. An event of an unknown type says nothing. A
/// reboot that has `Started` has happened, if terraform is running: the event stays in the list for a moment after it.
pub(crate) fn scheduled_events(answer: &Answer, machine: &str) -> Found {
    let Ok(ScheduledEvents { events }) = serde_json::from_str(answer.text()?) else {
        return useless("an answer that is not a list of events");
    };
    let is_ours =
        |event: &&ScheduledEvent| event.resources.iter().any(|resource| resource.eq_ignore_ascii_case(machine));
    let mut notices = Vec::new();
    for event in events.iter().filter(is_ours) {
        let has_started = event.event_status == "Started";
        let end = match event.event_type.as_str() {
            "Preempt" => HostEnd::Preempted,
            "Terminate" => HostEnd::Terminated,
            "Reboot" if !has_started => HostEnd::Rebooted,
            "Redeploy" if !has_started => HostEnd::Redeployed,
            _ => continue,
        };
        // The time is missing or empty after the event has started.
        let at = match event.not_before.as_deref().unwrap_or_default() {
            "" => None,
            time => match rfc2822::DateTimeParser::new().parse_timestamp(time) {
                Ok(at) => Some(at.as_second()),
                // The event may be days ahead.
                Err(_) => return useless("an event whose time is not a time"),
            },
        };
        notices.push(Notice { end, announcement: Announcement::ScheduledEvent, at });
    }
    // `None` is less than every time.
    Ok(notices.into_iter().min_by_key(|notice| notice.at))
}

/// Returns the text of an answer of Google's service. Every answer of that service has the header, so that a program
/// can tell it from another one (Compute Engine, "About VM metadata").
fn googles(answer: &Answer) -> Result<&str, Useless> {
    if answer.is_of_google { answer.text() } else { useless("an answer without Metadata-Flavor: Google") }
}

/// Reads the answer to `GET /computeMetadata/v1/instance/preempted` (Compute Engine, "Spot VMs").
pub(crate) fn preempted(answer: &Answer) -> Found {
    match googles(answer)? {
        "TRUE" => Ok(Some(Notice { end: HostEnd::Preempted, announcement: Announcement::Preemption, at: None })),
        "FALSE" => Ok(None),
        _ => useless("an answer that is neither TRUE nor FALSE"),
    }
}

/// Reads the answer to `GET /computeMetadata/v1/instance/maintenance-event` (Compute Engine, "Query metadata server for
/// maintenance event notices"). A live migration pauses the machine for less than a second.
pub(crate) fn maintenance(answer: &Answer) -> Found {
    match googles(answer)? {
        "TERMINATE_ON_HOST_MAINTENANCE" => {
            Ok(Some(Notice { end: HostEnd::Terminated, announcement: Announcement::HostMaintenance, at: None }))
        }
        event if is_word(event) => Ok(None),
        _ => useless("an answer that is not a maintenance event"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(status: u16, body: &str) -> Answer {
        Answer { status, body: body.into(), is_of_google: true, etag: None }
    }

    fn notice(end: HostEnd, announcement: Announcement, at: Option<&str>) -> Notice {
        Notice { end, announcement, at: at.map(|at| at.parse::<Timestamp>().unwrap().as_second()) }
    }

    const GARBAGE: [&str; 8] =
        ["", "{", "[]", "null", "<html>sign in</html>", "{\"a\":[{}]}", "\u{7f}\u{1b}", "two words"];

    /// No answer but the documented one says anything, whatever its status.
    fn says_nothing_else(read: impl Fn(&Answer) -> Found, good: &str) {
        for body in GARBAGE {
            assert!(read(&with(200, body)).is_err(), "{body:?}");
        }
        assert!(read(&Answer { body: vec![0xff, b'T'], ..with(200, "") }).is_err());
        for status in [0, 201, 204, 301, 302, 307, 400, 401, 403, 405, 429, 500, 503] {
            assert!(read(&with(status, good)).is_err(), "{status}");
        }
    }

    #[test]
    fn a_spot_interruption_is_an_action_with_its_time() {
        let at = Some("2026-11-24T12:00:05Z");
        for (action, end) in
            [("terminate", HostEnd::Terminated), ("stop", HostEnd::Stopped), ("hibernate", HostEnd::Hibernated)]
        {
            for (time, at) in [(r#","time":"2026-11-24T12:00:05Z""#, at), ("", None), (r#","time":"soon""#, None)] {
                let found = spot(&with(200, &format!(r#"{{"action":"{action}"{time}}}"#)));
                assert_eq!(found, Ok(Some(notice(end, Announcement::SpotInterruption, at))), "{action} {time}");
            }
        }
        assert_eq!(spot(&with(404, "<html>")), Ok(None));
        assert!(spot(&with(200, r#"{"action":"rest"}"#)).is_err());
        says_nothing_else(spot, r#"{"action":"terminate","time":"2026-11-24T12:00:05Z"}"#);
    }

    #[test]
    fn a_lifecycle_state_counts_if_the_instance_does_not_go_on() {
        for (state, end) in [
            ("Terminated", HostEnd::Terminated),
            ("Terminated\n", HostEnd::Terminated),
            ("Warmed:Terminated", HostEnd::Terminated),
            ("Warmed:Stopped", HostEnd::Stopped),
            ("Warmed:Hibernated", HostEnd::Hibernated),
        ] {
            assert_eq!(lifecycle(&with(200, state)), Ok(Some(notice(end, Announcement::AutoScaling, None))), "{state}");
        }
        for state in ["InService", "Standby", "Detached", "Warmed:Running", "StateOfTomorrow"] {
            assert_eq!(lifecycle(&with(200, state)), Ok(None), "{state}");
        }
        assert_eq!(lifecycle(&with(404, "")), Ok(None));
        says_nothing_else(lifecycle, "Terminated");
    }

    fn events(all: &str) -> Found {
        scheduled_events(&with(200, &format!(r#"{{"DocumentIncarnation":7,"Events":[{all}]}}"#)), "vmss_1")
    }

    fn event(kind: &str, resources: &str, status: &str, not_before: &str) -> String {
        format!(
            r#"{{"EventId":"i","EventStatus":"{status}","EventType":"{kind}","ResourceType":"VirtualMachine",
             "Resources":[{resources}],"NotBefore":"{not_before}","EventSource":"Platform"}}"#
        )
    }

    #[test]
    fn an_event_counts_if_it_ends_this_machine() {
        const TIME: &str = "Tue, 24 Nov 2026 12:00:05 GMT";
        let at = Some("2026-11-24T12:00:05Z");
        for (kind, scheduled, started) in [
            ("Preempt", Some(HostEnd::Preempted), Some(HostEnd::Preempted)),
            ("Terminate", Some(HostEnd::Terminated), Some(HostEnd::Terminated)),
            ("Reboot", Some(HostEnd::Rebooted), None),
            ("Redeploy", Some(HostEnd::Redeployed), None),
            ("Freeze", None, None),
            ("EventOfTomorrow", None, None),
        ] {
            let of = |end: Option<HostEnd>, at| Ok(end.map(|end| notice(end, Announcement::ScheduledEvent, at)));
            for (resources, is_ours) in
                [(r#""vmss_1""#, true), (r#""vmss_0","VMSS_1""#, true), (r#""vmss_0","vmss_11""#, false), ("", false)]
            {
                let expected = of(scheduled.filter(|_| is_ours), at);
                assert_eq!(events(&event(kind, resources, "Scheduled", TIME)), expected, "{kind} {resources}");
                let expected = of(started.filter(|_| is_ours), None);
                assert_eq!(events(&event(kind, resources, "Started", "")), expected, "{kind} {resources}");
            }
        }
    }

    #[test]
    fn of_several_events_the_first_one_counts() {
        let ours = |kind, time| event(kind, r#""vmss_1""#, "Scheduled", time);
        let both = format!(
            "{},{},{}",
            ours("Reboot", "Tue, 24 Nov 2026 12:10:00 GMT"),
            ours("Preempt", "Tue, 24 Nov 2026 12:00:00 GMT"),
            ours("Redeploy", "Tue, 24 Nov 2026 12:20:00 GMT"),
        );
        assert_eq!(events(&both).unwrap().unwrap().end, HostEnd::Preempted);
        assert_eq!(events(""), Ok(None));
        assert!(events(&ours("Reboot", "soon")).is_err());
        assert!(events("7").is_err());
        assert!(scheduled_events(&with(404, ""), "vmss_1").is_err());
        says_nothing_else(|answer| scheduled_events(answer, "vmss_1"), r#"{"Events":[]}"#);
    }

    #[test]
    fn google_says_true_or_false_and_says_that_it_is_google() {
        let preemption = notice(HostEnd::Preempted, Announcement::Preemption, None);
        let terminate = notice(HostEnd::Terminated, Announcement::HostMaintenance, None);
        assert_eq!(preempted(&with(200, "TRUE\n")), Ok(Some(preemption)));
        assert_eq!(preempted(&with(200, "FALSE")), Ok(None));
        assert!(preempted(&with(200, "NONE")).is_err() && preempted(&with(404, "")).is_err());
        assert_eq!(maintenance(&with(200, "TERMINATE_ON_HOST_MAINTENANCE")), Ok(Some(terminate)));
        for event in ["NONE", "MIGRATE_ON_HOST_MAINTENANCE", "EVENT_OF_TOMORROW"] {
            assert_eq!(maintenance(&with(200, event)), Ok(None), "{event}");
        }
        for read in [preempted, maintenance] {
            for body in ["TRUE", "FALSE", "NONE", "TERMINATE_ON_HOST_MAINTENANCE"] {
                assert!(read(&Answer { is_of_google: false, ..with(200, body) }).is_err(), "{body}");
            }
        }
        says_nothing_else(preempted, "TRUE");
    }

    #[test]
    fn a_token_and_a_machines_name_are_one_line_of_visible_text() {
        assert_eq!(token(&with(200, "AQAEAK-x==\n")), Ok("AQAEAK-x==".to_owned()));
        for bad in ["", " ", "a b", "a\nb", "\u{e4}", &"a".repeat(MAX_TOKEN + 1)] {
            assert!(token(&with(200, bad)).is_err(), "{bad:.20}");
        }
        assert!(token(&with(404, "token")).is_err() && token(&with(302, "token")).is_err());
        assert_eq!(machine(&with(200, "vm 1")), Ok("vm 1".to_owned()));
        for bad in ["", "a\nb", "<html>", &"a".repeat(257)] {
            assert!(machine(&with(200, bad)).is_err(), "{bad:.20}");
        }
    }

    #[test]
    fn no_answer_panics() {
        let sample = event("Reboot", r#""vmss_1""#, "Scheduled", "Tue, 24 Nov 2026 12:00:05 GMT");
        let sample = format!(r#"{{"Events":[{sample}]}}"#).into_bytes();
        crate::generated_input::for_all(file!(), &crate::generated_input::changed(sample), |body| {
            let answer = Answer { body, ..with(200, "") };
            for read in [spot, lifecycle, preempted, maintenance] {
                let _ = read(&answer);
            }
            let _ = (scheduled_events(&answer, "vmss_1"), token(&answer), machine(&answer));
            Ok(())
        });
    }
}
