//! Checks the protocol in every interleaving of its processes: `make model`.
//!
//! This program includes the modules of `tf`, so that the model makes its decisions with the functions of `tf` itself.
//! A change of such a function changes what is checked. docs/protocol.md describes the protocol, its assumptions and
//! the invariants.

#![expect(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

// The modules of the program, as in src/main.rs. Most of their items are not used here.
macro_rules! modules {
    ($($name:ident $path:literal)*) => {
        $(#[allow(dead_code, unused_imports, clippy::allow_attributes)] #[path = $path] mod $name;)*
    };
}

modules! {
    another_tf "../src/another_tf.rs"
    aws "../src/aws/mod.rs"
    cleanup "../src/cleanup/mod.rs"
    commands "../src/commands/mod.rs"
    console "../src/console.rs"
    crash_point "../src/crash_point.rs"
    generated_input "../src/generated_input.rs"
    holder "../src/holder/mod.rs"
    journal "../src/journal/mod.rs"
    json "../src/json.rs"
    lease "../src/lease/mod.rs"
    lock "../src/lock/mod.rs"
    panics "../src/panics.rs"
    settings "../src/settings.rs"
    supervise "../src/supervise/mod.rs"
    sys "../src/sys/mod.rs"
    terraform "../src/terraform/mod.rs"
    time "../src/time.rs"
    trace "../src/trace.rs"
}

#[path = "model/interrupts.rs"]
mod interrupts;
#[path = "model/protocol.rs"]
mod protocol;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Failed, Trial};
use stateright::{Checker, HasDiscoveries, Model};

use interrupts::Interrupts;
use protocol::{Broken, ChildKind, Fault, Parts, Protocol, Setup};

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

/// Searches for a counterexample to the program with `fault`, and prints the shortest one. Its last step must break
/// `expected`.
fn finds(fault: Fault, expected: Broken) -> Result<(), Failed> {
    let (parts, child) = match fault {
        Fault::SurvivorsForgotten => (Parts::Object, ChildKind::Untouchable),
        Fault::ExitCodeDecides | Fault::RecoveryDoesNotLook => (Parts::Object, ChildKind::Ordinary),
        Fault::HalfIsWhole => (Parts::Both, ChildKind::None),
        _ => (Parts::Object, ChildKind::None),
    };
    let setup = Setup { parts, child, kills: 2, fault: Some(fault) };
    let checker = Protocol::new(setup).checker().finish_when(HasDiscoveries::Any).spawn_bfs().join();
    let Some(path) = checker.discovery(HOLDS) else {
        return Err(format!("no counterexample in {} states", checker.unique_state_count()).into());
    };
    let broken = path.last_state().broken();
    let steps = steps(&path.into_actions());
    println!("{fault:?}: {broken:?} after these steps:\n{steps}");
    if broken == Some(expected) {
        Ok(())
    } else {
        Err(format!("expected {expected:?}, not {broken:?}:\n{steps}").into())
    }
}

fn main() -> ExitCode {
    // Each trial uses both processors.
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    let mut trials = Vec::new();
    for parts in [Parts::Object, Parts::Item, Parts::Both] {
        for child in [ChildKind::None, ChildKind::Ordinary, ChildKind::Detached, ChildKind::Untouchable] {
            let kills = if parts == Parts::Both { 2 } else { 3 };
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
        trials.push(Trial::test(name, move || finds(fault, broken)));
    }
    for (ignores_interrupts, has_timeout) in [(false, false), (false, true), (true, false), (true, true)] {
        let name = format!(
            "interrupts::terraform_gets_a_second_interrupt_only_if_a_person_forces_it::{}_{}",
            if ignores_interrupts { "ignoring" } else { "reacting" },
            if has_timeout { "with_timeout" } else { "without_timeout" },
        );
        trials.push(Trial::test(name, move || holds(Interrupts { ignores_interrupts, has_timeout })));
    }
    libtest_mimic::run(&arguments, trials).exit_code()
}
