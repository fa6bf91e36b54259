//! Decides what `tf` does with a signal that it gets. The decision is a pure function, and this module signals no
//! process. [`crate::supervise::stop`] decides which effects a request to stop has.

use nix::sys::signal::Signal;

use crate::supervise::stop::StopEvent;
use crate::sys::signals::SignalOrigin;

/// Which process group terraform is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TerraformGroup {
    /// A group of its own. The group gets only the signals that `tf` sends to it.
    Own,
    /// The group of `tf` (`TFW_TTY=shared`). The terminal's keys signal both.
    Shared,
}

/// The facts on which the route of a signal depends, besides the signal and its origin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Circumstances {
    pub(crate) group: TerraformGroup,
    /// Whether the signal was ignored when `tf` was started (nohup).
    pub(crate) was_ignored: bool,
    /// Whether the sender is a service manager, so that the signal may have been sent to every process of the unit,
    /// including terraform.
    pub(crate) may_be_for_unit: bool,
}

/// What `tf` does with a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Route {
    /// The signal is a request to stop.
    Ask(StopEvent),
    /// The signal is a request to stop. `tf` waits for a report of the guardian, which shows whether terraform has got
    /// the signal too.
    AskGuardian,
    /// `tf` stops terraform, and then itself.
    Suspend,
    /// The kernel has stopped a process of the group of `tf`, because that process needed the terminal. `tf` records
    /// the stop.
    NoteStoppedReader,
    /// `tf` sends the signal to terraform's whole process group, as the terminal would.
    PassToGroup,
    /// `tf` sends the signal to terraform alone.
    PassToTerraform,
    /// A child of `tf` has stopped or exited. `tf` checks its children.
    LookAtChildren,
    /// `tf` ignores the signal.
    Ignore,
}

/// Returns what `tf` does with a `signal` from `origin`.
pub(crate) fn route(signal: Signal, origin: SignalOrigin, circumstances: Circumstances) -> Route {
    let Circumstances { group, was_ignored, may_be_for_unit } = circumstances;
    let is_shared = group == TerraformGroup::Shared;
    match (signal, origin) {
        (Signal::SIGCHLD, _) => Route::LookAtChildren,
        (Signal::SIGINT, SignalOrigin::Kernel) if is_shared => Route::Ask(StopEvent::KeyboardAtTerraform),
        (Signal::SIGINT, SignalOrigin::Kernel) => Route::Ask(StopEvent::Keyboard),
        (Signal::SIGHUP | Signal::SIGTSTP, _) if was_ignored => Route::Ignore,
        (Signal::SIGTERM, _) if may_be_for_unit => Route::AskGuardian,
        (Signal::SIGINT | Signal::SIGTERM | Signal::SIGHUP, _) => Route::Ask(StopEvent::Request),
        (Signal::SIGTSTP, _) => Route::Suspend,
        (Signal::SIGTTIN | Signal::SIGTTOU, SignalOrigin::Kernel) => Route::NoteStoppedReader,
        // The terminal sends these signals to its whole foreground group. Without `tf`, that would be terraform's
        // group, so the whole group gets them.
        (Signal::SIGQUIT | Signal::SIGWINCH, SignalOrigin::Kernel) | (Signal::SIGCONT, _) if !is_shared => {
            Route::PassToGroup
        }
        // In a shared group, the terminal has sent the signal to terraform as well.
        (Signal::SIGQUIT | Signal::SIGWINCH, SignalOrigin::Kernel) => Route::Ignore,
        (Signal::SIGQUIT | Signal::SIGABRT | Signal::SIGWINCH | Signal::SIGUSR1 | Signal::SIGUSR2, _) => {
            Route::PassToTerraform
        }
        _ => Route::Ignore,
    }
}

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;

    use super::*;
    use crate::sys::signals::HEARD;

    fn all() -> impl Iterator<Item = (Signal, SignalOrigin, Circumstances)> {
        HEARD.into_iter().flat_map(|signal| {
            (0..16_u8).map(move |bits| {
                let bit = |place: u8| bits & (1 << place) != 0;
                let origin = if bit(0) { SignalOrigin::Kernel } else { SignalOrigin::Process };
                let group = if bit(1) { TerraformGroup::Shared } else { TerraformGroup::Own };
                (signal, origin, Circumstances { group, was_ignored: bit(2), may_be_for_unit: bit(3) })
            })
        })
    }

    #[test]
    fn int_term_and_hup_ask_for_an_end_and_no_other_signal_does() {
        for (signal, origin, circumstances) in all() {
            let route = route(signal, origin, circumstances);
            let asks = matches!(route, Route::Ask(_) | Route::AskGuardian);
            let is_request = matches!(signal, Signal::SIGINT | Signal::SIGTERM | Signal::SIGHUP);
            let is_nohup = signal == Signal::SIGHUP && circumstances.was_ignored;
            assert_eq!(asks, is_request && !is_nohup, "{signal} {origin:?} {circumstances:?}: {route:?}");
        }
    }

    #[test]
    fn only_the_kernels_int_is_a_key() {
        for (signal, origin, circumstances) in all() {
            let is_key = matches!(
                route(signal, origin, circumstances),
                Route::Ask(StopEvent::Keyboard | StopEvent::KeyboardAtTerraform)
            );
            assert_eq!(is_key, signal == Signal::SIGINT && origin == SignalOrigin::Kernel);
        }
    }

    /// Terraform counts INT and TERM as interrupts, and is killed by HUP. So `tf` never passes these signals on
    /// unchanged.
    #[test]
    fn a_request_to_stop_is_never_passed_on_as_it_came() {
        for (signal, origin, circumstances) in all() {
            let passed = matches!(route(signal, origin, circumstances), Route::PassToGroup | Route::PassToTerraform);
            if matches!(signal, Signal::SIGINT | Signal::SIGTERM | Signal::SIGHUP) {
                assert!(!passed, "{signal} {origin:?} {circumstances:?}");
            }
        }
    }

    #[test]
    fn what_the_terminal_sends_to_a_shared_group_is_not_sent_twice() {
        for (signal, origin, circumstances) in all() {
            if origin == SignalOrigin::Kernel && circumstances.group == TerraformGroup::Shared {
                let route = route(signal, origin, circumstances);
                // Terraform is in the foreground group, so the terminal sends it these three signals. The terminal
                // sends no other signal that `tf` passes on.
                let sent = matches!(signal, Signal::SIGINT | Signal::SIGQUIT | Signal::SIGWINCH);
                let passes = matches!(route, Route::PassToGroup | Route::PassToTerraform)
                    || route == Route::Ask(StopEvent::Keyboard);
                assert!(!(sent && passes), "{signal}: {route:?}");
            }
        }
    }

    #[test]
    fn only_a_term_may_be_a_stop_of_the_whole_unit() {
        for (signal, origin, circumstances) in all() {
            let asks_guardian = route(signal, origin, circumstances) == Route::AskGuardian;
            assert_eq!(asks_guardian, signal == Signal::SIGTERM && circumstances.may_be_for_unit);
        }
    }

    fn described(route: Route) -> &'static str {
        match route {
            Route::Ask(StopEvent::Keyboard) => "a ^C",
            Route::Ask(StopEvent::KeyboardAtTerraform) => "a ^C that terraform has got already",
            Route::Ask(_) => "a request to stop",
            Route::AskGuardian => "a request to stop; the guardian knows whether terraform has got it",
            Route::Suspend => "terraform stops, then `tf`",
            Route::NoteStoppedReader => "a background job that needs the terminal: stopped until `fg`",
            Route::PassToGroup => "passed on to terraform's group",
            Route::PassToTerraform => "passed on to terraform",
            Route::LookAtChildren => "a child has stopped or exited: `tf` checks which",
            Route::Ignore => "nothing",
        }
    }

    fn table() -> String {
        let mut table =
            "| signal | from the terminal or the kernel | from a process | with `TFW_TTY=shared`, from the terminal \
                         |\n|---|---|---|---|\n"
                .to_owned();
        for signal in HEARD {
            let cell = |origin, group| {
                described(route(signal, origin, Circumstances { group, was_ignored: false, may_be_for_unit: false }))
            };
            let _ = writeln!(
                table,
                "| {} | {} | {} | {} |",
                signal.as_str().trim_start_matches("SIG"),
                cell(SignalOrigin::Kernel, TerraformGroup::Own),
                cell(SignalOrigin::Process, TerraformGroup::Own),
                cell(SignalOrigin::Kernel, TerraformGroup::Shared),
            );
        }
        table
    }

    /// Checks the table in docs/signals.md. `make generated` writes it.
    #[test]
    fn what_is_generated_in_docs_signals_is_what_is_done() {
        const BEGIN: &str = "<!-- generated from src/supervise/routing.rs by `make generated` -->\n";
        const END: &str = "<!-- end of what is generated -->";
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/signals.md");
        let text = std::fs::read_to_string(&path).unwrap();
        let (before, rest) = text.split_once(BEGIN).unwrap();
        let (_, after) = rest.split_once(END).unwrap();
        let expected = format!("{before}{BEGIN}\n{}\n{END}{after}", table());
        if std::env::var_os("TF_WRITE_GENERATED").is_some() {
            std::fs::write(&path, &expected).unwrap();
        }
        assert!(
            std::fs::read_to_string(&path).unwrap() == expected,
            "docs/signals.md is not what is done: make generated"
        );
    }
}
