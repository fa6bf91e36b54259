//! The `TFW_*` variables, with which the user configures `tf` itself.

use std::ffi::OsString;
use std::time::Duration;

use crate::lease::grade::Clock;
use crate::lease::notice::{NoticeSetting, Provider};
use crate::lease::terms::Terms;

/// The settings of one run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Settings {
    /// `TFW_STOP_TIMEOUT`: the time after which terraform and every process below it are killed. It starts at the first
    /// TERM, INT or HUP that is not from the keyboard, or at the exit of the parent of `tf` in CI. `None`: there is no
    /// such limit.
    pub(crate) stop_timeout: Option<Duration>,
    /// `TFW_RELEASE`: whether a lock is released (`auto`, the default) or only reported (`never`).
    pub(crate) release: bool,
    /// `TFW_TTY=shared`: whether terraform remains in the process group of `tf`.
    pub(crate) shared_terminal: bool,
    /// `TFW_AWAKE`: whether the machine is kept awake while terraform holds a lock (macOS). `off` is the only other
    /// value.
    pub(crate) keep_awake: bool,
    /// `TFW_LOG`: the file that [`crate::trace`] writes. `None`: nothing is logged.
    pub(crate) log: Option<OsString>,
    /// `CI` or `TF_BUILD`: whether this is a CI job. The runner of such a job may exit without sending a signal to
    /// `tf`.
    pub(crate) ci: bool,
    pub(crate) lease: LeaseSettings,
}

/// The settings of the lease. A run needs them, and so does every `tf locks` command that judges locks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct LeaseSettings {
    /// `TFW_LEASE`: the length of the lease that a run renews on its lock. If it is set, a lock whose lease has lapsed
    /// is released without being asked. `None`: this run has no lease, and such a lock is only reported.
    pub(crate) terms: Option<Terms>,
    /// `TFW_CLOCK`.
    pub(crate) clock: Clock,
    /// `TFW_NOTICE`.
    pub(crate) notice: NoticeSetting,
}

/// The error for a variable whose value is invalid.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{name} is {value:?}, but must be {takes}")]
pub(crate) struct UnreadableSetting {
    name: &'static str,
    value: OsString,
    takes: &'static str,
}

impl Settings {
    /// Reads the settings. `variable` returns the value of an environment variable. An empty variable counts as unset.
    ///
    /// # Errors
    /// [`UnreadableSetting`] if a value is invalid. The caller handles this error before it starts any process: a user
    /// who sets a stop timeout relies on that timeout, so terraform must not run without it.
    pub(crate) fn read(variable: impl Fn(&str) -> Option<OsString>) -> Result<Self, UnreadableSetting> {
        let set = |name| variable(name).filter(|value| !value.is_empty());
        let choice = |name, default: bool, [yes, no]: [&str; 2], takes| match set(name) {
            None => Ok(default),
            Some(value) if value == yes => Ok(true),
            Some(value) if value == no => Ok(false),
            Some(value) => Err(UnreadableSetting { name, value, takes }),
        };
        let stop_timeout = match set("TFW_STOP_TIMEOUT") {
            None => None,
            Some(value) => {
                if let Some(duration) = value.to_str().and_then(duration) {
                    Some(duration)
                } else {
                    let takes = "a time such as 25s, 1500ms, 2m, or a number of seconds";
                    return Err(UnreadableSetting { name: "TFW_STOP_TIMEOUT", value, takes });
                }
            }
        };
        Ok(Self {
            stop_timeout,
            release: release(&variable)?.unwrap_or(true),
            shared_terminal: choice("TFW_TTY", false, ["shared", "lent"], "lent or shared")?,
            keep_awake: choice("TFW_AWAKE", true, ["on", "off"], "on or off")?,
            log: set("TFW_LOG"),
            // Azure Pipelines sets `TF_BUILD` instead of `CI`. Other systems set `CI`.
            ci: ["CI", "TF_BUILD"].into_iter().any(|name| {
                set(name).is_some_and(|value| !["false", "0", "no"].iter().any(|no| value.eq_ignore_ascii_case(no)))
            }),
            lease: LeaseSettings::read(variable)?,
        })
    }
}

impl LeaseSettings {
    /// Reads the settings as [`Settings::read`] does.
    ///
    /// # Errors
    /// [`UnreadableSetting`] if a value is invalid. A team that sets a lease relies on it, so nothing must run without
    /// it.
    pub(crate) fn read(variable: impl Fn(&str) -> Option<OsString>) -> Result<Self, UnreadableSetting> {
        let set = |name| variable(name).filter(|value| !value.is_empty());
        let terms = match set("TFW_LEASE") {
            None => None,
            Some(value) if value == "off" => None,
            Some(value) => {
                let terms = value.to_str().and_then(lease_length).and_then(Terms::new);
                if terms.is_none() {
                    let takes = "a time from 1m to 1h, such as 5m or 90s, or off";
                    return Err(UnreadableSetting { name: "TFW_LEASE", value, takes });
                }
                terms
            }
        };
        let clock = match set("TFW_CLOCK") {
            None => Clock::NotVouchedFor,
            Some(value) if value == "steady" => Clock::Steady,
            Some(value) => return Err(UnreadableSetting { name: "TFW_CLOCK", value, takes: "steady or unset" }),
        };
        let notice = match set("TFW_NOTICE") {
            None => NoticeSetting::ByMachine,
            Some(value) if value == "off" => NoticeSetting::Off,
            Some(value) if value == "ec2" => NoticeSetting::Ask(Provider::Ec2),
            Some(value) if value == "azure" => NoticeSetting::Ask(Provider::Azure),
            Some(value) if value == "gcp" => NoticeSetting::Ask(Provider::Gcp),
            Some(value) => {
                return Err(UnreadableSetting { name: "TFW_NOTICE", value, takes: "ec2, azure, gcp or off" });
            }
        };
        Ok(Self { terms, clock, notice })
    }
}

/// Whether the locks of a dead run are only reported, and not released. `setting` is `TFW_RELEASE` for this process, as
/// [`release`] reads it, and `named_only` is whether it was `never` for the run. With an invalid value, no run and no
/// `tf locks recover` starts a recovery. If one comes here nevertheless, it only reports.
pub(crate) fn only_reports(setting: Result<Option<bool>, UnreadableSetting>, named_only: bool) -> bool {
    setting.map_or(true, |releases| releases.map_or(named_only, |releases| !releases))
}

/// Reads `TFW_RELEASE`: whether a lock is released (`auto`) or only reported (`never`). `None` if it is unset or empty.
///
/// # Errors
/// [`UnreadableSetting`] if its value is invalid. A user who sets it may want nothing released.
pub(crate) fn release(variable: impl Fn(&str) -> Option<OsString>) -> Result<Option<bool>, UnreadableSetting> {
    const NAME: &str = "TFW_RELEASE";
    match variable(NAME).filter(|value| !value.is_empty()) {
        None => Ok(None),
        Some(value) if value == "auto" => Ok(Some(true)),
        Some(value) if value == "never" => Ok(Some(false)),
        Some(value) => Err(UnreadableSetting { name: NAME, value, takes: "auto or never" }),
    }
}

/// Parses the length of a lease. It needs a unit, because `TFW_LEASE=5` would otherwise mean 5 s to `tf` and 5 min to
/// its user. It has whole seconds, because the record has.
fn lease_length(text: &str) -> Option<Duration> {
    let has_unit = text.ends_with(|last: char| last.is_ascii_alphabetic());
    duration(text).filter(|length| has_unit && length.subsec_nanos() == 0)
}

/// Returns whether `TFW_RELEASE` is explicitly set to `auto`. A lock in a DynamoDB global table is released only if
/// this is true.
pub(crate) fn release_is_asked_for() -> bool {
    matches!(release(|name| std::env::var_os(name)), Ok(Some(true)))
}

/// Parses a duration: a whole number followed by `ms`, `s`, `m`, `h` or `d`. A number without a unit is in seconds.
/// `None` for any other text, and if the number is too large.
pub(crate) fn duration(text: &str) -> Option<Duration> {
    let digits = text.find(|character: char| !character.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().ok()?;
    match unit {
        "ms" => Some(Duration::from_millis(number)),
        "" | "s" => Some(Duration::from_secs(number)),
        "m" => number.checked_mul(60).map(Duration::from_secs),
        "h" => number.checked_mul(3600).map(Duration::from_secs),
        "d" => number.checked_mul(86_400).map(Duration::from_secs),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(name: &str, value: &str) -> Result<Settings, UnreadableSetting> {
        Settings::read(|asked| (asked == name).then(|| value.into()))
    }

    #[test]
    fn a_time_is_read_with_its_unit() {
        for (text, expected) in
            [("25s", 25_000), ("1500ms", 1500), ("2m", 120_000), ("1h", 3_600_000), ("7", 7000), ("0", 0)]
        {
            assert_eq!(read("TFW_STOP_TIMEOUT", text).unwrap().stop_timeout, Some(Duration::from_millis(expected)));
        }
        assert_eq!(read("TFW_STOP_TIMEOUT", "").unwrap().stop_timeout, None);
    }

    #[test]
    fn what_cannot_be_read_is_refused_by_name() {
        for (name, value) in [
            ("TFW_STOP_TIMEOUT", "soon"),
            ("TFW_STOP_TIMEOUT", "-1"),
            ("TFW_STOP_TIMEOUT", "1.5s"),
            ("TFW_STOP_TIMEOUT", "1w"),
            ("TFW_STOP_TIMEOUT", "99999999999999999999"),
            ("TFW_RELEASE", "yes"),
            ("TFW_TTY", "none"),
            ("TFW_AWAKE", "no"),
            ("TFW_LEASE", "5"),
            ("TFW_LEASE", "300"),
            ("TFW_LEASE", "0s"),
            ("TFW_LEASE", "1s"),
            ("TFW_LEASE", "61m"),
            ("TFW_LEASE", "2h"),
            ("TFW_LEASE", "1d"),
            ("TFW_LEASE", "60500ms"),
            ("TFW_LEASE", "-5m"),
            ("TFW_LEASE", "yes"),
            ("TFW_LEASE", "OFF"),
            ("TFW_CLOCK", "maybe"),
            ("TFW_CLOCK", "Steady"),
            ("TFW_NOTICE", "aws"),
            ("TFW_NOTICE", "EC2"),
            ("TFW_NOTICE", "http://169.254.169.254"),
        ] {
            let message = read(name, value).unwrap_err().to_string();
            assert!(message.contains(name) && message.contains(value), "{message}");
        }
    }

    #[test]
    fn a_lease_has_a_length_or_is_off() {
        for (text, seconds) in [("5m", 300), ("90s", 90), ("60s", 60), ("1h", 3600), ("60m", 3600), ("90000ms", 90)] {
            let lease = read("TFW_LEASE", text).unwrap().lease;
            assert_eq!(lease.terms.map(Terms::length), Some(Duration::from_secs(seconds)), "{text}");
            assert_eq!(lease.clock, Clock::NotVouchedFor);
        }
        for text in ["", "off"] {
            assert_eq!(read("TFW_LEASE", text).unwrap().lease, LeaseSettings::default(), "{text:?}");
        }
        // A debug build accepts short leases, for the tests.
        let short = read("TFW_LEASE", "2s").map(|settings| settings.lease.terms.is_some());
        assert_eq!(short.unwrap_or_default(), cfg!(debug_assertions));
    }

    #[test]
    fn a_clock_is_vouched_for_by_one_word() {
        for (text, clock) in [("", Clock::NotVouchedFor), ("steady", Clock::Steady)] {
            let lease = read("TFW_CLOCK", text).unwrap().lease;
            assert_eq!(lease, LeaseSettings { clock, ..LeaseSettings::default() }, "{text:?}");
        }
    }

    #[test]
    fn the_metadata_service_is_named_by_one_word() {
        for (text, notice) in [
            ("", NoticeSetting::ByMachine),
            ("off", NoticeSetting::Off),
            ("ec2", NoticeSetting::Ask(Provider::Ec2)),
            ("azure", NoticeSetting::Ask(Provider::Azure)),
            ("gcp", NoticeSetting::Ask(Provider::Gcp)),
        ] {
            let lease = read("TFW_NOTICE", text).unwrap().lease;
            assert_eq!(lease, LeaseSettings { notice, ..LeaseSettings::default() }, "{text:?}");
        }
    }

    #[test]
    fn ci_is_what_says_so() {
        for (value, expected) in
            [("true", true), ("1", true), ("woodpecker", true), ("false", false), ("0", false), ("", false)]
        {
            assert_eq!(read("CI", value).unwrap().ci, expected, "{value:?}");
            assert_eq!(read("TF_BUILD", value).unwrap().ci, expected, "{value:?}");
        }
    }

    #[test]
    fn no_text_of_a_time_panics_and_a_time_is_never_longer_than_written() {
        use proptest::prelude::*;
        let strategy = (any::<u64>(), prop::sample::select(vec!["ms", "", "s", "m", "h", "d"]), ".{0,12}");
        crate::generated_input::for_all(file!(), &strategy, |(number, unit, any)| {
            let _ = duration(&any);
            let unit_in_ms: u128 = match unit {
                "ms" => 1,
                "m" => 60_000,
                "h" => 3_600_000,
                "d" => 86_400_000,
                _ => 1000,
            };
            let expected = u128::from(number) * unit_in_ms;
            let read = duration(&format!("{number}{unit}"));
            let fits = unit_in_ms <= 1000 || u128::from(number) * (unit_in_ms / 1000) <= u128::from(u64::MAX);
            prop_assert_eq!(read.map(|time| time.as_millis()), fits.then_some(expected));
            Ok(())
        });
    }
}
