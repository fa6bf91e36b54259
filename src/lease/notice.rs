//! A notice that this host is about to end, as the metadata service of its cloud announces it: what it says, when it
//! counts, and what a run with a lease does about it.
//!
//! A host that ends takes terraform with it, and leaves the lock to the lease. A notice comes seconds or minutes before
//! that. So terraform can stop gracefully, save its state and release its lock.

use std::fmt;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

/// A metadata service that `tf` can ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) enum Provider {
    Ec2,
    Azure,
    Gcp,
}

impl fmt::Display for Provider {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Ec2 => "EC2",
            Self::Azure => "Azure",
            Self::Gcp => "GCP",
        })
    }
}

/// Which metadata service the user wants to be asked (`TFW_NOTICE`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum NoticeSetting {
    /// The variable is not set: EC2's service on a machine of EC2, and otherwise none. Elsewhere, its address may
    /// belong to nobody or to somebody else.
    #[default]
    ByMachine,
    /// `off`: none.
    Off,
    /// `ec2`, `azure` or `gcp`: this one, whatever the machine says about itself.
    Ask(Provider),
}

impl NoticeSetting {
    /// Returns the service to ask. `is_ec2`: this is a machine of EC2. `None` if none must be asked.
    pub(crate) fn provider(self, is_ec2: bool) -> Option<Provider> {
        match self {
            Self::Ask(provider) => Some(provider),
            Self::ByMachine if is_ec2 => Some(Provider::Ec2),
            Self::ByMachine | Self::Off => None,
        }
    }
}

/// What is about to happen to the host. Each of these ends or freezes terraform.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) enum HostEnd {
    Terminated,
    Stopped,
    Hibernated,
    Preempted,
    Rebooted,
    Redeployed,
}

impl HostEnd {
    /// Returns the participle: the host will be `terminated`.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Terminated => "terminated",
            Self::Stopped => "stopped",
            Self::Hibernated => "hibernated",
            Self::Preempted => "preempted",
            Self::Rebooted => "rebooted",
            Self::Redeployed => "redeployed",
        }
    }
}

/// What has announced the end of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) enum Announcement {
    SpotInterruption,
    AutoScaling,
    ScheduledEvent,
    Preemption,
    HostMaintenance,
}

impl Announcement {
    /// Returns the cloud's own name for it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::SpotInterruption => "EC2 spot interruption",
            Self::AutoScaling => "EC2 Auto Scaling",
            Self::ScheduledEvent => "Azure scheduled event",
            Self::Preemption => "GCP preemption",
            Self::HostMaintenance => "GCP host maintenance",
        }
    }
}

/// A notice that this host is about to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) struct Notice {
    pub(crate) end: HostEnd,
    pub(crate) announcement: Announcement,
    /// When the host ends at the earliest, in seconds since 1970. `None` if the notice does not say it.
    pub(crate) at: Option<i64>,
}

/// How long before the end of the host a notice counts. Azure announces some events days before (a machine whose
/// hardware is about to fail), and most applies are over by then. Its other events and those of EC2 come at most 15
/// minutes before (Azure, "Scheduled Events", table of the minimum notice).
const HORIZON: SignedDuration = SignedDuration::from_mins(15);

impl Notice {
    /// Whether terraform must stop now, and not later. `now` is the time of this host: only the cloud's own time is in
    /// the notice, and a wrong clock makes a difference only to a notice that comes more than 15 minutes before the
    /// end.
    pub(crate) fn is_due(self, now: Timestamp) -> bool {
        let at = self.at.and_then(|at| Timestamp::from_second(at).ok());
        at.is_none_or(|at| at.duration_since(now) <= HORIZON)
    }
}

/// Returns the time between two questions: 5 s. A debug build asks ten times as often, for the tests.
const fn ask_interval(is_debug_build: bool) -> Duration {
    if is_debug_build { Duration::from_millis(500) } else { Duration::from_secs(5) }
}

/// The longest time between two questions after useless answers, in intervals: 5 minutes, or 30 s in a debug build.
const MAX_INTERVALS: u32 = 60;

/// Returns how long to wait before the next question, after so many useless answers in a row. No answer is a useless
/// one.
pub(crate) fn ask_pause(useless: u32) -> Duration {
    pause_of(ask_interval(cfg!(debug_assertions)), useless)
}

/// Returns `interval`, doubled for each useless answer after the first one, up to [`MAX_INTERVALS`].
fn pause_of(interval: Duration, useless: u32) -> Duration {
    interval * 2_u32.pow(useless.clamp(1, 12) - 1).min(MAX_INTERVALS)
}

/// What a run does about a notice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NoticeStep {
    /// It interrupts terraform.
    Interrupt,
    /// It interrupts terraform, which the kernel has stopped because of its lease. Terraform gets the interrupt when it
    /// goes on. The notice does not make it go on: its lock may be another run's by now.
    InterruptStopped,
    /// It only says so. Terraform has got its one interrupt, or is about to get it, and a second one would make it exit
    /// with its lock held.
    SayOnly,
}

/// What a run sees when a notice arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NoticeSight {
    /// Whether terraform was interrupted before, for whatever reason.
    pub(crate) is_interrupted: bool,
    /// Whether a service manager has sent SIGTERM to `tf`, and it is not known yet whether terraform got it as well.
    /// Within a moment, terraform has got one interrupt, from the one or from the other.
    pub(crate) is_being_asked: bool,
    /// Whether the kernel has stopped terraform because of its lease.
    pub(crate) is_stopped: bool,
}

/// Decides what a run does about a notice.
pub(crate) fn notice_step(sight: NoticeSight) -> NoticeStep {
    if sight.is_interrupted || sight.is_being_asked {
        NoticeStep::SayOnly
    } else if sight.is_stopped {
        NoticeStep::InterruptStopped
    } else {
        NoticeStep::Interrupt
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_machine_of_ec2_is_asked_unless_the_user_names_a_service() {
        for is_ec2 in [false, true] {
            assert_eq!(NoticeSetting::ByMachine.provider(is_ec2), is_ec2.then_some(Provider::Ec2));
            assert_eq!(NoticeSetting::Off.provider(is_ec2), None);
            for provider in [Provider::Ec2, Provider::Azure, Provider::Gcp] {
                assert_eq!(NoticeSetting::Ask(provider).provider(is_ec2), Some(provider));
            }
        }
    }

    #[test]
    fn a_notice_counts_in_the_last_quarter_of_an_hour_and_without_a_time_at_once() {
        let now = Timestamp::from_second(1_790_000_000).unwrap();
        for (at, expected) in [
            (None, true),
            (Some(120), true),
            (Some(900), true),
            (Some(901), false),
            (Some(7 * 86_400), false),
            (Some(0), true),
            (Some(-3600), true),
            // It is no time.
            (Some(i64::MAX - 1_790_000_000), true),
        ] {
            let at = at.map(|seconds| 1_790_000_000 + seconds);
            let notice = Notice { end: HostEnd::Rebooted, announcement: Announcement::ScheduledEvent, at };
            assert_eq!(notice.is_due(now), expected, "{at:?}");
        }
    }

    #[test]
    fn a_release_asks_every_5_s_and_after_useless_answers_ever_more_rarely_up_to_5_minutes() {
        let pauses = |interval| [0, 1, 2, 3, 4, 5, 6, 7, 8, u32::MAX].map(|useless| pause_of(interval, useless));
        let seconds = [5, 5, 10, 20, 40, 80, 160, 300, 300, 300].map(Duration::from_secs);
        assert_eq!(pauses(ask_interval(false)), seconds);
        assert_eq!(pauses(ask_interval(true)), seconds.map(|pause| pause / 10));
        assert_eq!(ask_pause(3), pause_of(ask_interval(cfg!(debug_assertions)), 3));
    }

    #[test]
    fn a_notice_leads_to_an_interrupt_only_if_terraform_has_none_and_is_about_to_get_none() {
        for bits in 0..8_u8 {
            let bit = |place: u8| bits & (1 << place) != 0;
            let expected = match (bit(0) || bit(1), bit(2)) {
                (true, _) => NoticeStep::SayOnly,
                (false, true) => NoticeStep::InterruptStopped,
                (false, false) => NoticeStep::Interrupt,
            };
            let sight = NoticeSight { is_interrupted: bit(0), is_being_asked: bit(1), is_stopped: bit(2) };
            assert_eq!(notice_step(sight), expected, "{sight:?}");
        }
    }

    #[test]
    fn a_notice_is_read_as_it_was_sent() {
        let notice =
            Notice { end: HostEnd::Hibernated, announcement: Announcement::SpotInterruption, at: Some(1_790_000_000) };
        assert_eq!(serde_json::from_str::<Notice>(&serde_json::to_string(&notice).unwrap()).unwrap(), notice);
    }
}
