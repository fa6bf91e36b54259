//! The model of the interrupts of one terraform: `tf` and its guardian, each with its own [`Stop`], and the messages
//! between them. `tf` may be killed between any two of its steps.

use std::collections::VecDeque;
use std::time::Duration;

use stateright::{Model, Property};

use crate::cleanup::end_of_run::Why;
use crate::supervise::stop::{Effect, Stop, StopEvent};

/// How many requests to stop there are at most.
const MAX_EVENTS: u8 = 4;

/// The time of one step of the clock. The window for the third ^C is longer, and the other limits are longer still.
const TICK: Duration = Duration::from_secs(2);

/// How often the clock moves at most.
const MAX_TICKS: u32 = 4;

/// `TFW_STOP_TIMEOUT`, if it is set.
const TIMEOUT: Duration = Duration::from_secs(5);

/// The model and its setting.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Interrupts {
    /// Whether terraform's command ignores interrupts.
    pub(crate) ignores_interrupts: bool,
    /// Whether `TFW_STOP_TIMEOUT` is set.
    pub(crate) has_timeout: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct State {
    ticks: u32,
    tf: Stop,
    /// What `tf` has decided, but not done yet.
    decided: VecDeque<Effect>,
    is_tf_alive: bool,
    guardian: Stop,
    /// The messages that the guardian has not read yet.
    messages: VecDeque<StopEvent>,
    /// Whether the guardian has noticed the death of `tf`.
    is_guardian_alone: bool,
    events: u8,
    keys: u8,
    /// The interrupts that terraform got from `tf` and its guardian.
    ours: u8,
    /// The interrupts that it got from somebody else.
    others: u8,
    /// Whether terraform got an interrupt of ours although it had one of somebody else, and no person has forced it.
    is_doubled: bool,
    /// Whether `tf` was killed between its decision to interrupt terraform and the interrupt.
    is_lost: bool,
    killed: Option<Why>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// `tf` gets a request to stop: it decides, and tells its guardian.
    Event(StopEvent),
    /// `tf` does what it has decided.
    Effect,
    KillTf,
    GuardianReads,
    GuardianActs,
    Tick,
}

impl Interrupts {
    fn stop(self) -> Stop {
        Stop::new(self.ignores_interrupts, self.has_timeout.then_some(TIMEOUT))
    }
}

impl State {
    fn now(&self) -> Duration {
        TICK * self.ticks
    }

    fn carry_out(&mut self, effect: Effect) {
        match effect {
            Effect::InterruptGroup | Effect::InterruptTerraform => {
                self.ours += 1;
                self.is_doubled |= self.others > 0 && !self.is_forced();
            }
            Effect::Kill(why) => self.killed = Some(why),
            Effect::SayStopping(_) | Effect::SayForcing => {}
        }
    }

    /// Whether everything is done: terraform was asked to stop, and nothing of ours has anything left to do.
    fn is_over(&self) -> bool {
        self.decided.is_empty() && self.messages.is_empty() && (self.is_tf_alive || self.is_guardian_alone)
    }

    /// A second interrupt makes terraform leave its operation. So only a person may cause it: after a first request of
    /// any kind, one key shows what a further key does, and that further key does it.
    fn is_forced(&self) -> bool {
        self.keys >= 2 && self.events >= 3
    }

    fn holds(&self, model: Interrupts) -> bool {
        let is_forced = self.is_forced();
        let is_one = self.ours <= if is_forced { 2 } else { 1 };
        let kill_is_asked_for = match self.killed {
            None => true,
            Some(Why::Forced) => is_forced,
            Some(Why::StopTimeout) => model.has_timeout,
            // A run without a lease.
            Some(Why::LockLost | Why::LeaseUnknown) => false,
        };
        // A terraform whose `tf` was killed is interrupted.
        let is_asked = !self.is_over() || self.is_tf_alive || self.ours + self.others > 0 || self.is_lost;
        is_one && !self.is_doubled && kill_is_asked_for && is_asked
    }
}

impl Model for Interrupts {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![State {
            ticks: 0,
            tf: self.stop(),
            decided: VecDeque::new(),
            is_tf_alive: true,
            guardian: self.stop(),
            messages: VecDeque::new(),
            is_guardian_alone: false,
            events: 0,
            keys: 0,
            ours: 0,
            others: 0,
            is_doubled: false,
            is_lost: false,
            killed: None,
        }]
    }

    fn actions(&self, _: &State, actions: &mut Vec<Action>) {
        for event in [
            StopEvent::Keyboard,
            StopEvent::KeyboardAtTerraform,
            StopEvent::Request,
            StopEvent::RequestToAll,
            StopEvent::ParentGone,
            StopEvent::ReaderGone,
            StopEvent::NobodyCanAnswer,
        ] {
            actions.push(Action::Event(event));
        }
        actions.extend([Action::Effect, Action::KillTf, Action::GuardianReads, Action::GuardianActs, Action::Tick]);
    }

    fn next_state(&self, state: &State, action: Action) -> Option<State> {
        let mut next = state.clone();
        match action {
            Action::Event(event) => {
                // `tf` takes the next event only after it has done what it decided about the last one.
                if !state.is_tf_alive || state.events == MAX_EVENTS || !state.decided.is_empty() {
                    return None;
                }
                next.events += 1;
                next.keys += u8::from(event == StopEvent::Keyboard);
                let is_others = matches!(event, StopEvent::RequestToAll | StopEvent::KeyboardAtTerraform);
                next.others += u8::from(is_others);
                next.decided.extend(next.tf.decide(event, state.now()));
                next.messages.push_back(event);
            }
            Action::Effect => {
                if !state.is_tf_alive {
                    return None;
                }
                let effect = next.decided.pop_front()?;
                next.carry_out(effect);
            }
            Action::KillTf => {
                if !state.is_tf_alive {
                    return None;
                }
                next.is_tf_alive = false;
                let interrupts =
                    |effect: &Effect| matches!(effect, Effect::InterruptGroup | Effect::InterruptTerraform);
                next.is_lost = next.decided.iter().any(interrupts);
                next.decided.clear();
            }
            Action::GuardianReads => {
                let event = next.messages.pop_front()?;
                // The guardian only follows the decisions. `tf` carries them out.
                let _ = next.guardian.decide(event, state.now());
            }
            Action::GuardianActs => {
                if state.is_tf_alive || !state.messages.is_empty() {
                    return None;
                }
                let event = if state.is_guardian_alone { StopEvent::Time } else { StopEvent::ParentGone };
                next.is_guardian_alone = true;
                for effect in next.guardian.decide(event, state.now()) {
                    next.carry_out(effect);
                }
            }
            Action::Tick => {
                if state.ticks == MAX_TICKS || !state.decided.is_empty() {
                    return None;
                }
                next.ticks += 1;
                if next.is_tf_alive {
                    let now = next.now();
                    next.decided.extend(next.tf.decide(StopEvent::Time, now));
                }
            }
        }
        (next != *state).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![Property::always("every invariant holds", |model: &Self, state: &State| state.holds(*model))]
    }
}
