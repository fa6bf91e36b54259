//! Decides which effects a request to stop has. The decision depends only on the events and their times, and this
//! module signals no process.
//!
//! Terraform counts interrupts, INT and TERM alike. The first interrupt starts a graceful stop. The second interrupt
//! makes terraform exit within 5 s. If terraform was planning an apply, it exits without releasing its lock
//! (internal/command/meta.go, `RunOperation`; internal/backend/local/backend_apply.go). So `tf` sends terraform one
//! interrupt, whatever the source and the number of the requests. `tf` sends a second interrupt only if a person
//! presses ^C three times.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::cleanup::end_of_run::{EndOfRun, Why};
use crate::lease::fence::EndReason;
use crate::sys::wait::Ended;

/// How long after the second ^C a third ^C forces the stop.
pub(crate) const THIRD_KEY_WINDOW: Duration = Duration::from_secs(3);

/// How long terraform may take to exit after its second interrupt before `tf` kills it. Terraform normally exits within
/// 5 s.
const SECOND_INTERRUPT_TIMEOUT: Duration = Duration::from_secs(6);

/// A request to stop, or a deadline that may have passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) enum StopEvent {
    /// A ^C that the terminal sent to `tf`.
    Keyboard,
    /// A ^C that the terminal sent to terraform, because terraform is in the foreground group. Terraform counts it as
    /// an interrupt, so `tf` does not send another one.
    KeyboardAtTerraform,
    /// A ^C that the terminal sent to `tf` while terraform is stopped because of its lease. Terraform handles an
    /// interrupt when it goes on. The keys that end the stopped terraform are counted elsewhere
    /// ([`crate::supervise::run_lease::RunLease::note_key`]), so this event never leads to a second interrupt.
    KeyboardWhileStopped,
    /// An INT, TERM or HUP that a process sent, or a hangup.
    Request,
    /// A TERM that a service manager sent to every process of the unit. Terraform has got it and counts it as an
    /// interrupt, so `tf` does not send another one.
    RequestToAll,
    /// The parent of `tf` has exited in a CI job, so no process is left that could ask `tf` to stop. This event is also
    /// used if a shim was killed and, in the guardian, if `tf` was killed.
    ParentGone,
    /// The reader of terraform's output has exited or closed its pipe or socket.
    ReaderGone,
    /// Terraform needs the terminal, but no person can answer at the terminal.
    NobodyCanAnswer,
    /// The lease of terraform's lock cannot be renewed, or somebody has deleted the lock. Terraform can still save its
    /// state.
    LeaseEnds,
    /// The cloud has announced that this host is about to end.
    HostEnds,
    /// The kernel has stopped terraform because of its lease, and it must not go on.
    LeaseEnded(EndReason),
    /// This is not a request. The time of [`Stop::deadline`] may have passed.
    Time,
}

/// An action that follows from an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Effect {
    /// Sends one SIGINT to terraform's process group, as the terminal does for a ^C. Providers ignore SIGINT. The
    /// commands of a provisioner must get it for every kind of request: terraform kills only the shell of a
    /// `local-exec`, releases the lock and exits. Without the SIGINT, the processes that the shell has started would
    /// continue to work after the lock is released. `tf` does not send TERM or HUP to the group, because they would
    /// kill the providers.
    InterruptGroup,
    /// Sends the second SIGINT. Only terraform gets it.
    InterruptTerraform,
    /// Sends SIGKILL to terraform and to every process below it.
    Kill(Why),
    /// Reports that terraform is stopping, the time since its first interrupt, and the effect of a third ^C.
    SayStopping(Duration),
    /// Reports that terraform got its second interrupt.
    SayForcing,
}

/// The requests and interrupts so far. All times are counted from the start of the run.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Stop {
    /// Whether terraform's command ignores interrupts, so that a second one would have no effect.
    ignores_interrupts: bool,
    /// The time from the first request to stop until terraform is killed (`TFW_STOP_TIMEOUT`). `None` if it is not set.
    timeout: Option<Duration>,
    /// The number of interrupts that terraform has got.
    interrupts: u32,
    /// When terraform got its first interrupt. `None` if it got none.
    since: Option<Duration>,
    /// Until when a third ^C forces the stop. `None` if there was no second ^C.
    offer_until: Option<Duration>,
    /// When terraform will be killed, and why. `None` if no kill is due.
    kill: Option<(Duration, Why)>,
    /// Why `tf` has decided to kill terraform. `None` if `tf` has not decided to kill it.
    killed: Option<Why>,
    /// Whether terraform got a second interrupt, or a person forced the stop.
    forced: bool,
}

impl Stop {
    /// Creates the state before any request. `timeout` is `TFW_STOP_TIMEOUT`, or `None` if that is not set.
    pub(crate) fn new(ignores_interrupts: bool, timeout: Option<Duration>) -> Self {
        Self {
            ignores_interrupts,
            timeout,
            interrupts: 0,
            since: None,
            offer_until: None,
            kill: None,
            killed: None,
            forced: false,
        }
    }

    /// Whether terraform was interrupted at least once.
    pub(crate) fn was_interrupted(&self) -> bool {
        self.interrupts > 0
    }

    /// Whether terraform got a second interrupt or was killed. If so, it may have exited with its work unfinished.
    pub(crate) fn was_forced(&self) -> bool {
        self.forced || self.killed.is_some()
    }

    /// Returns why `tf` has decided to kill terraform and its tree. `None` if `tf` has not decided to kill them.
    pub(crate) fn killed(&self) -> Option<Why> {
        self.killed
    }

    /// Returns how the run ended. `ended` is how terraform ended, and `out_of_memory` whether the kernel killed a
    /// process because memory ran out.
    pub(crate) fn end_of_run(&self, ended: Option<Ended>, out_of_memory: bool) -> EndOfRun {
        EndOfRun {
            ended,
            killed: self.killed(),
            forced: self.was_forced(),
            interrupted: self.was_interrupted(),
            out_of_memory,
        }
    }

    /// Returns when the caller must pass [`StopEvent::Time`] to [`Stop::decide`], counted from the start of the run.
    /// `None` if no kill is due, so that this event has no effect.
    pub(crate) fn deadline(&self) -> Option<Duration> {
        self.kill.map(|(at, _)| at)
    }

    /// Updates the state for `event` at the time `now`, counted from the start of the run. Returns the effects to carry
    /// out, in order.
    pub(crate) fn decide(&mut self, event: StopEvent, now: Duration) -> Vec<Effect> {
        match event {
            StopEvent::Keyboard => self.keyboard(now),
            StopEvent::KeyboardAtTerraform => {
                self.forced |= self.interrupts > 0;
                self.interrupted(now);
                vec![]
            }
            StopEvent::Request | StopEvent::ParentGone => {
                self.start_timeout(now);
                self.graceful(now)
            }
            StopEvent::RequestToAll => {
                self.start_timeout(now);
                if self.interrupts == 0 {
                    self.interrupted(now);
                }
                vec![]
            }
            StopEvent::ReaderGone
            | StopEvent::NobodyCanAnswer
            | StopEvent::LeaseEnds
            | StopEvent::HostEnds
            | StopEvent::KeyboardWhileStopped => self.graceful(now),
            StopEvent::LeaseEnded(reason) => self.lease_ended(reason),
            StopEvent::Time => match self.kill {
                Some((at, why)) if at <= now => self.kill_now(why),
                _ => vec![],
            },
        }
    }

    fn interrupted(&mut self, now: Duration) {
        self.interrupts += 1;
        self.since.get_or_insert(now);
    }

    /// Starts the stop timeout. Does nothing if no timeout is set, or if a kill is already due or was already decided.
    fn start_timeout(&mut self, now: Duration) {
        if let (Some(timeout), None) = (self.timeout, self.kill)
            && self.killed.is_none()
        {
            self.kill = Some((now.saturating_add(timeout), Why::StopTimeout));
        }
    }

    fn graceful(&mut self, now: Duration) -> Vec<Effect> {
        if self.interrupts > 0 {
            return vec![];
        }
        self.interrupted(now);
        vec![Effect::InterruptGroup]
    }

    fn keyboard(&mut self, now: Duration) -> Vec<Effect> {
        if self.interrupts == 0 {
            return self.graceful(now);
        }
        if self.forced || self.killed.is_some() {
            return vec![];
        }
        if self.offer_until.is_none_or(|until| until < now) {
            self.offer_until = Some(now + THIRD_KEY_WINDOW);
            return vec![Effect::SayStopping(now.saturating_sub(self.since.unwrap_or(now)))];
        }
        self.forced = true;
        if self.ignores_interrupts {
            return self.kill_now(Why::Forced);
        }
        self.interrupted(now);
        let at = now + SECOND_INTERRUPT_TIMEOUT;
        if self.kill.is_none_or(|(earlier, _)| earlier > at) {
            self.kill = Some((at, Why::Forced));
        }
        vec![Effect::SayForcing, Effect::InterruptTerraform]
    }

    fn lease_ended(&mut self, reason: EndReason) -> Vec<Effect> {
        if self.killed.is_some() {
            return vec![];
        }
        self.kill_now(match reason {
            EndReason::LockLost => Why::LockLost,
            EndReason::Person => Why::Forced,
            EndReason::TimedOut => Why::LeaseUnknown,
        })
    }

    fn kill_now(&mut self, why: Why) -> Vec<Effect> {
        self.kill = None;
        self.killed = Some(why);
        vec![Effect::Kill(why)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every event. If a new event is added, the match in [`number`] does not compile until it has that event too.
    const ALL: [StopEvent; 12] = [
        StopEvent::Keyboard,
        StopEvent::KeyboardAtTerraform,
        StopEvent::Request,
        StopEvent::RequestToAll,
        StopEvent::ParentGone,
        StopEvent::ReaderGone,
        StopEvent::NobodyCanAnswer,
        StopEvent::Time,
        StopEvent::LeaseEnds,
        StopEvent::HostEnds,
        StopEvent::LeaseEnded(EndReason::LockLost),
        StopEvent::KeyboardWhileStopped,
    ];

    fn number(event: StopEvent) -> usize {
        match event {
            StopEvent::Keyboard => 0,
            StopEvent::KeyboardAtTerraform => 1,
            StopEvent::Request => 2,
            StopEvent::RequestToAll => 3,
            StopEvent::ParentGone => 4,
            StopEvent::ReaderGone => 5,
            StopEvent::NobodyCanAnswer => 6,
            StopEvent::Time => 7,
            StopEvent::LeaseEnds => 8,
            StopEvent::HostEnds => 9,
            StopEvent::LeaseEnded(_) => 10,
            StopEvent::KeyboardWhileStopped => 11,
        }
    }

    #[test]
    fn the_list_of_events_has_each_of_them_once() {
        assert!(ALL.into_iter().map(number).eq(0..ALL.len()));
    }

    /// `tf` sends the events to the guardian as JSON, so each must be deserialized to the same event.
    #[test]
    fn an_event_is_read_as_it_was_sent() {
        for event in ALL {
            let sent = serde_json::to_vec(&event).unwrap();
            assert_eq!(serde_json::from_slice::<StopEvent>(&sent).unwrap(), event);
        }
        assert!(serde_json::from_slice::<StopEvent>(b"").is_err());
        assert!(serde_json::from_slice::<StopEvent>(b"\"EventOfTomorrow\"").is_err());
    }

    const fn ms(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    fn interrupts(effects: &[Effect]) -> usize {
        effects.iter().filter(|effect| matches!(effect, Effect::InterruptGroup | Effect::InterruptTerraform)).count()
    }

    /// Passes `events` to `stop` at intervals of `apart`, and returns all effects.
    fn play(stop: &mut Stop, events: &[StopEvent], apart: Duration) -> Vec<Effect> {
        (1..).zip(events).flat_map(|(step, &event)| stop.decide(event, apart * step)).collect()
    }

    /// Returns every sequence of `length` events.
    fn sequences(length: u32) -> impl Iterator<Item = Vec<StopEvent>> {
        (0..ALL.len().pow(length))
            .map(move |number| (0..length).map(|place| ALL[number / ALL.len().pow(place) % ALL.len()]).collect())
    }

    #[test]
    fn whatever_comes_first_terraform_gets_one_interrupt_at_once() {
        for event in ALL {
            let effects = Stop::new(false, None).decide(event, ms(1));
            let expected = match event {
                StopEvent::KeyboardAtTerraform | StopEvent::RequestToAll | StopEvent::Time => vec![],
                StopEvent::LeaseEnded(_) => vec![Effect::Kill(Why::LockLost)],
                _ => vec![Effect::InterruptGroup],
            };
            assert_eq!(effects, expected, "{event:?}");
        }
    }

    /// So the guardian must know of one event only (`guardian/message.rs`).
    #[test]
    fn after_any_event_the_death_of_tf_interrupts_nobody() {
        for event in ALL.into_iter().filter(|event| *event != StopEvent::Time) {
            let mut stop = Stop::new(false, None);
            stop.decide(event, ms(1));
            let effects = stop.decide(StopEvent::ParentGone, ms(2));
            assert!(stop.killed().is_some() || effects.is_empty(), "{event:?}: {effects:?}");
        }
    }

    #[test]
    fn no_sequence_without_three_keys_gives_a_second_interrupt_or_a_kill() {
        for apart in [ms(20), ms(7500)] {
            for ignores in [false, true] {
                for events in sequences(5) {
                    let keys = events.iter().filter(|event| **event == StopEvent::Keyboard).count();
                    let is_ended = events.iter().any(|event| matches!(event, StopEvent::LeaseEnded(_)));
                    if is_ended || keys >= 3 || (keys == 2 && events[0] != StopEvent::Keyboard) {
                        continue;
                    }
                    let mut stop = Stop::new(ignores, None);
                    let effects = play(&mut stop, &events, apart);
                    assert!(interrupts(&effects) <= 1, "{events:?}: {effects:?}");
                    assert!(!effects.iter().any(|effect| matches!(effect, Effect::Kill(_))), "{events:?}");
                }
            }
        }
    }

    #[test]
    fn the_end_of_the_run_says_what_terraform_got() {
        let (ended, out_of_memory) = (Some(Ended::Exited(1)), true);
        for (ignores, timeout) in [(false, None), (false, Some(ms(30))), (true, None), (true, Some(ms(30)))] {
            for events in sequences(5) {
                let mut stop = Stop::new(ignores, timeout);
                let (mut got, mut killed) = (0, None);
                for (step, &event) in (1..).zip(&events) {
                    match event {
                        StopEvent::KeyboardAtTerraform => got += 1,
                        // The guardian gets this event twice: it sees the TERM, and `tf` then passes the event on. So
                        // only the first interrupt can be such a TERM.
                        StopEvent::RequestToAll => got = got.max(1),
                        _ => {}
                    }
                    for effect in stop.decide(event, ms(20) * step) {
                        match effect {
                            Effect::InterruptGroup | Effect::InterruptTerraform => got += 1,
                            Effect::Kill(why) => killed = Some(why),
                            Effect::SayStopping(_) | Effect::SayForcing => {}
                        }
                    }
                }
                let expected = EndOfRun {
                    ended,
                    killed,
                    forced: killed.is_some() || got > 1,
                    interrupted: got > 0,
                    out_of_memory,
                };
                assert_eq!(stop.end_of_run(ended, out_of_memory), expected, "{ignores} {timeout:?} {events:?}");
            }
        }
    }

    #[test]
    fn what_terraform_got_itself_is_not_sent_again() {
        for events in sequences(4) {
            if matches!(events[0], StopEvent::KeyboardAtTerraform | StopEvent::RequestToAll)
                && !events[1..].contains(&StopEvent::Keyboard)
            {
                assert_eq!(interrupts(&play(&mut Stop::new(false, None), &events, ms(20))), 0, "{events:?}");
            }
        }
    }

    #[test]
    fn the_third_key_in_time_forces_and_later_it_is_offered_anew() {
        let mut stop = Stop::new(false, None);
        assert_eq!(stop.decide(StopEvent::Keyboard, ms(0)), [Effect::InterruptGroup]);
        assert_eq!(stop.decide(StopEvent::Keyboard, ms(9000)), [Effect::SayStopping(ms(9000))]);
        assert_eq!(stop.decide(StopEvent::Keyboard, ms(12_001)), [Effect::SayStopping(ms(12_001))]);
        assert_eq!(stop.decide(StopEvent::Keyboard, ms(15_001)), [Effect::SayForcing, Effect::InterruptTerraform]);
        assert_eq!(stop.decide(StopEvent::Keyboard, ms(15_100)), []);
        assert_eq!(stop.deadline(), Some(ms(21_001)));
        assert_eq!(stop.decide(StopEvent::Time, ms(21_000)), []);
        assert_eq!(stop.decide(StopEvent::Time, ms(21_001)), [Effect::Kill(Why::Forced)]);
        assert!(stop.was_forced());
        assert_eq!(stop.deadline(), None);
    }

    /// The keeper may report a notice again, and another keeper the same one. A service manager stops the run as well,
    /// before the host ends.
    #[test]
    fn two_notices_and_whatever_else_asks_to_stop_are_one_interrupt() {
        for events in sequences(2) {
            let [first, second] = events[..] else { panic!() };
            let is_left_alone = |event| !matches!(event, StopEvent::Keyboard | StopEvent::LeaseEnded(_));
            if !is_left_alone(first) || !is_left_alone(second) {
                continue;
            }
            for events in [
                [StopEvent::HostEnds, StopEvent::HostEnds, first, second],
                [first, StopEvent::HostEnds, second, StopEvent::HostEnds],
                [first, second, StopEvent::HostEnds, StopEvent::HostEnds],
            ] {
                let mut stop = Stop::new(false, None);
                let effects = play(&mut stop, &events, ms(20));
                let has_own = |event| matches!(event, StopEvent::KeyboardAtTerraform | StopEvent::RequestToAll);
                let begins = events.into_iter().find(|event| *event != StopEvent::Time);
                let expected: &[Effect] = if begins.is_some_and(has_own) { &[] } else { &[Effect::InterruptGroup] };
                assert_eq!(effects, expected, "{events:?}");
            }
        }
    }

    /// While terraform is stopped, `tf` says how many keys end it. It must not offer to force terraform as well.
    #[test]
    fn keys_while_terraform_is_stopped_are_one_interrupt_and_force_nothing() {
        for events in sequences(3) {
            for ignores in [false, true] {
                let mut stop = Stop::new(ignores, None);
                play(&mut stop, &events, ms(20));
                let (was_interrupted, was_forced) = (stop.was_interrupted(), stop.was_forced());
                let effects = play(&mut stop, &[StopEvent::KeyboardWhileStopped; 5], ms(70));
                let expected: &[Effect] = if was_interrupted { &[] } else { &[Effect::InterruptGroup] };
                assert_eq!(effects, expected, "{events:?}");
                assert!(stop.was_interrupted() && stop.was_forced() == was_forced, "{events:?}");
            }
        }
    }

    #[test]
    fn a_command_that_ignores_interrupts_is_killed_at_the_third_key() {
        let effects = play(&mut Stop::new(true, None), &[StopEvent::Keyboard; 3], ms(500));
        assert_eq!(effects, [Effect::InterruptGroup, Effect::SayStopping(ms(500)), Effect::Kill(Why::Forced)]);
    }

    #[test]
    fn the_stop_timeout_runs_from_the_first_request_and_never_from_a_key() {
        for events in sequences(3) {
            let mut stop = Stop::new(false, Some(ms(25_000)));
            play(&mut stop, &events, ms(1));
            let first = events.iter().position(|event| {
                matches!(event, StopEvent::Request | StopEvent::RequestToAll | StopEvent::ParentGone)
            });
            let ended = events.iter().any(|event| matches!(event, StopEvent::LeaseEnded(_)));
            let forced = ended || (stop.was_forced() && stop.kill.is_some_and(|(_, why)| why == Why::Forced));
            let expected = first.map(|place| ms(25_001 + place as u64));
            if !forced {
                assert_eq!(stop.deadline(), expected, "{events:?}");
            }
        }
    }

    /// A timeout of 584 million years or more never kills terraform, and no sum with such a timeout panics.
    #[test]
    fn a_stop_timeout_may_be_as_long_as_a_number_can_say() {
        for timeout in
            [u64::MAX, i64::MAX as u64, u64::MAX / 1000].map(Duration::from_secs).into_iter().chain([Duration::MAX])
        {
            for events in sequences(3) {
                let mut stop = Stop::new(false, Some(timeout));
                let effects = play(&mut stop, &events, Duration::from_hours(1));
                assert!(!effects.contains(&Effect::Kill(Why::StopTimeout)), "{timeout:?} {events:?}");
            }
        }
    }

    #[test]
    fn after_the_stop_timeout_the_tree_is_killed_once() {
        let mut stop = Stop::new(false, Some(ms(100)));
        assert_eq!(stop.decide(StopEvent::Request, ms(0)), [Effect::InterruptGroup]);
        assert_eq!(stop.decide(StopEvent::Time, ms(100)), [Effect::Kill(Why::StopTimeout)]);
        assert_eq!(stop.decide(StopEvent::Request, ms(150)), []);
        assert_eq!(stop.decide(StopEvent::Time, ms(500)), []);
    }

    /// The terminal has sent terraform a second interrupt, so terraform may exit with its work unfinished.
    #[test]
    fn a_key_that_terraform_gets_as_its_second_interrupt_forces_it() {
        for first in [StopEvent::Keyboard, StopEvent::KeyboardAtTerraform, StopEvent::Request, StopEvent::RequestToAll]
        {
            let mut stop = Stop::new(false, None);
            assert!(stop.decide(StopEvent::Time, Duration::ZERO).is_empty() && !stop.was_forced());
            stop.decide(first, Duration::ZERO);
            assert!(!stop.was_forced(), "{first:?}: the first interrupt");
            assert!(stop.decide(StopEvent::KeyboardAtTerraform, Duration::from_secs(1)).is_empty());
            assert!(stop.was_forced(), "{first:?}: the second one");
            stop.decide(StopEvent::Request, Duration::from_secs(2));
            assert!(stop.was_forced(), "{first:?}: that does not change any more");
        }
    }

    #[test]
    fn of_the_stop_timeout_and_the_second_interrupts_the_earlier_one_kills() {
        let second = |seconds| Duration::from_secs(seconds);
        // The second interrupt comes after 2 s, and terraform has 6 s for it.
        for (timeout, at, why) in [(5, 5, Why::StopTimeout), (8, 8, Why::StopTimeout), (60, 8, Why::Forced)] {
            let mut stop = Stop::new(false, Some(second(timeout)));
            stop.decide(StopEvent::Request, second(0));
            stop.decide(StopEvent::Keyboard, second(1));
            assert_eq!(stop.decide(StopEvent::Keyboard, second(2)), [Effect::SayForcing, Effect::InterruptTerraform]);
            assert_eq!(stop.deadline(), Some(second(at)), "timeout {timeout}");
            assert_eq!(stop.decide(StopEvent::Time, second(at)), [Effect::Kill(why)], "timeout {timeout}");
        }
    }
}
