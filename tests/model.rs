//! Checks the protocol in every interleaving of its processes: `make model`.
//!
//! This program includes the modules of `tf`, so that the model makes its decisions with the functions of `tf` itself.
//! A change of such a function changes what is checked. docs/protocol.md describes the protocol, its assumptions and
//! the invariants.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]
#![expect(clippy::disallowed_macros, clippy::print_stdout, reason = "this is not tf")]
#![expect(
    clippy::format_collect,
    clippy::needless_pass_by_value,
    clippy::option_option,
    clippy::single_match_else,
    clippy::too_many_lines,
    clippy::unnecessary_wraps,
    clippy::unused_self,
    reason = "a step of the model has the form of its transition, and a result the form of that of tf"
)]

#[macro_use]
#[path = "support/program.rs"]
mod program;

modules_of_the_program!();

#[path = "model/interrupts.rs"]
mod interrupts;
#[path = "model/lease.rs"]
mod lease_at_the_service;
#[path = "model/lease_host.rs"]
mod lease_host;
#[path = "model/protocol.rs"]
mod protocol;

use std::process::ExitCode;

use interrupts::Interrupts;
use libtest_mimic::{Arguments, Failed, Trial};
use protocol::{Broken, ChildKind, Fault, Parts, Protocol, Setup, State};
use stateright::{Checker, HasDiscoveries, Model};

/// The name of the only property of each model.
const HOLDS: &str = "every invariant holds";

/// Visits every state of `model`.
fn holds<M>(model: M) -> Result<(), Failed>
where
    M: Model + Send + Sync + 'static,
    M::State: Send + Sync + Clone + std::hash::Hash + std::fmt::Debug + PartialEq,
    M::Action: std::fmt::Debug + Clone + PartialEq,
{
    let checker = model.checker().threads(THREADS).spawn_bfs().join();
    if let Some(path) = checker.discovery(HOLDS) {
        let last = format!("{:?}", path.last_state());
        return Err(format!("{last}\n{}", steps(&path.into_actions())).into());
    }
    assert!(checker.is_done(), "states were left out");
    println!("{} states", checker.unique_state_count());
    Ok(())
}

const THREADS: usize = 2;

fn steps(actions: &[impl std::fmt::Debug]) -> String {
    actions.iter().enumerate().map(|(number, action)| format!("{:3}. {action:?}\n", number + 1)).collect()
}

/// Searches for a counterexample to `model`, and prints the shortest one. Its last step must break `expected`.
fn finds<M, B>(model: M, broken: fn(&M::State) -> Option<B>, expected: B) -> Result<(), Failed>
where
    M: Model + Send + Sync + 'static,
    M::State: Send + Sync + Clone + std::hash::Hash + std::fmt::Debug + PartialEq,
    M::Action: std::fmt::Debug + Clone + PartialEq,
    B: std::fmt::Debug + PartialEq,
{
    let checker = model.checker().finish_when(HasDiscoveries::Any).spawn_bfs().join();
    let Some(path) = checker.discovery(HOLDS) else {
        return Err(format!("no counterexample in {} states", checker.unique_state_count()).into());
    };
    let broken = broken(path.last_state());
    let steps = steps(&path.into_actions());
    println!("{broken:?} after these steps:\n{steps}");
    if broken.as_ref() == Some(&expected) {
        Ok(())
    } else {
        Err(format!("expected {expected:?}, not {broken:?}:\n{steps}").into())
    }
}

/// The smallest setting in which a fault of the protocol can do harm.
fn with_fault(fault: Fault) -> Protocol {
    let (parts, child) = match fault {
        Fault::SurvivorsForgotten => (Parts::Object, ChildKind::Untouchable),
        Fault::ExitCodeDecides | Fault::RecoveryDoesNotLook => (Parts::Object, ChildKind::Ordinary),
        Fault::HalfIsWhole => (Parts::Both, ChildKind::None),
        _ => (Parts::Object, ChildKind::None),
    };
    Protocol::new(Setup { parts, child, kills: 2, fault: Some(fault) })
}

/// The trials of the lease at the service.
fn lease_trials(trials: &mut Vec<Trial>) {
    use lease_at_the_service::{Broken, Fault, Host, Lease, Parts, Setup, State};
    // Nobody takes the lock of a host that can be paused, so one taker is enough there.
    let hosts =
        [(Host::Steady, 1), (Host::Steady, 2), (Host::NoSecondFuse, 1), (Host::NoSecondFuse, 2), (Host::Pausable, 1)];
    for parts in [Parts::Item, Parts::Object, Parts::Both] {
        for (host, takers) in hosts {
            let name = format!("lease::no_lock_is_taken_from_the_living::{parts:?}_{host:?}_{takers}");
            let setup = Setup { parts, host, takers, fault: None };
            trials.push(Trial::test(name, move || holds(Lease::new(setup))));
        }
    }
    let mut finds_fault = |fault, parts, host, takers, broken| {
        let name = format!("lease::a_deliberate_fault_is_found::{fault:?}");
        let setup = Setup { parts, host, takers, fault: Some(fault) };
        trials.push(Trial::test(name, move || finds(Lease::new(setup), State::broken, broken)));
    };
    for (fault, parts, takers, broken) in [
        (Fault::RenewsByIdentityAlone, Parts::Item, 1, Broken::TakenFromTheLiving),
        (Fault::RenewsWithoutCondition, Parts::Item, 1, Broken::Resurrected),
        (Fault::CountsFromTheReply, Parts::Item, 1, Broken::TakenFromTheLiving),
        (Fault::CountsTheRefusedRenewal, Parts::Object, 1, Broken::TakenFromTheLiving),
        (Fault::RestartedKeeperArms, Parts::Item, 1, Broken::TakenFromTheLiving),
        (Fault::ClaimsByIdentityAlone, Parts::Item, 1, Broken::TakenFromTheLiving),
        (Fault::ContinuesWithoutLook, Parts::Item, 1, Broken::TakenFromTheLiving),
        (Fault::ContinuesAfterAnOlderRenewal, Parts::Object, 1, Broken::TakenFromTheLiving),
        (Fault::DeletesWithoutClaim, Parts::Item, 1, Broken::TakenFromTheLiving),
        (Fault::DeletesWithoutCondition, Parts::Item, 2, Broken::TookAnothers),
    ] {
        finds_fault(fault, parts, Host::Steady, takers, broken);
    }
    finds_fault(Fault::PromisesWithoutClock, Parts::Item, Host::Pausable, 1, Broken::TakenFromTheLiving);
}

/// The trials of the lease on the holder's host.
fn lease_host_trials(trials: &mut Vec<Trial>) {
    use lease_host::{Broken, Fault, LeaseHost, Setup, State};
    for is_orphaned in [false, true] {
        for can_rearm in [false, true] {
            for continues in [0, 1] {
                let kills = 3;
                let setup = Setup { kills, is_orphaned, can_rearm, continues, fault: None };
                let name = format!(
                    "lease_host::terraform_runs_only_with_its_lock_and_nothing_stays::{}_{}_{kills}_{continues}",
                    if is_orphaned { "orphaned" } else { "not_orphaned" },
                    if can_rearm { "new_fuse" } else { "no_new_fuse" },
                );
                trials.push(Trial::test(name, move || holds(LeaseHost::new(setup))));
            }
        }
    }
    for (fault, is_orphaned, broken) in [
        (Fault::NoKillPipe, true, Broken::StoppedForEver),
        (Fault::KillPipeBeforeRenewal, true, Broken::TakenFromTheLiving),
        (Fault::ContinuesWithoutLook, true, Broken::TakenFromTheLiving),
        (Fault::ContinuesAnUnrenewedRun, true, Broken::TakenFromTheLiving),
        (Fault::ContinuesWithoutKillSignal, true, Broken::TakenFromTheLiving),
        (Fault::CountsForTheNextFuse, true, Broken::TakenFromTheLiving),
        (Fault::KeeperWithoutEnd, true, Broken::OutlivesTheRun),
        (Fault::KeeperOfTheStopped, false, Broken::StoppedForEver),
        (Fault::EndsBeforeDisarming, true, Broken::HitsTheRest),
    ] {
        let name = format!("lease_host::a_deliberate_fault_is_found::{fault:?}");
        let setup = Setup { kills: 2, is_orphaned, can_rearm: true, continues: 0, fault: Some(fault) };
        trials.push(Trial::test(name, move || finds(LeaseHost::new(setup), State::broken, broken)));
    }
}

fn main() -> ExitCode {
    // Each trial uses both processors.
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    let mut trials = Vec::new();
    for parts in [Parts::Object, Parts::Item, Parts::Both, Parts::BothLeased] {
        for child in [ChildKind::None, ChildKind::Ordinary, ChildKind::Detached, ChildKind::Untouchable] {
            let kills = if matches!(parts, Parts::Both | Parts::BothLeased) { 2 } else { 3 };
            let name = format!("protocol::every_interleaving_keeps_every_invariant::{parts:?}_{child:?}_{kills}");
            trials.push(Trial::test(name, move || holds(Protocol::new(Setup { parts, child, kills, fault: None }))));
        }
    }
    for (fault, broken) in [
        (Fault::DeleteWithoutCondition, Broken::TookAnothers),
        (Fault::NoQuietWindow, Broken::TookLiving),
        (Fault::ExitCodeDecides, Broken::TookLiving),
        (Fault::SurvivorsForgotten, Broken::CalledDead),
        (Fault::RememberedTooLate, Broken::LeftBehind),
        (Fault::RecoveryDoesNotLook, Broken::TookLiving),
        (Fault::HalfIsWhole, Broken::LeftBehind),
    ] {
        let name = format!("protocol::a_deliberate_fault_is_found::{fault:?}");
        trials.push(Trial::test(name, move || finds(with_fault(fault), State::broken, broken)));
    }
    for (ignores_interrupts, has_timeout) in [(false, false), (false, true), (true, false), (true, true)] {
        let name = format!(
            "interrupts::terraform_gets_a_second_interrupt_only_if_a_person_forces_it::{}_{}",
            if ignores_interrupts { "ignoring" } else { "reacting" },
            if has_timeout { "with_timeout" } else { "without_timeout" },
        );
        trials.push(Trial::test(name, move || holds(Interrupts { ignores_interrupts, has_timeout })));
    }
    lease_trials(&mut trials);
    lease_host_trials(&mut trials);
    libtest_mimic::run(&arguments, trials).exit_code()
}
