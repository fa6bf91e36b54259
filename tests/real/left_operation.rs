//! "A terraform that leaves its operation has died, whatever its exit code": two interrupts end it with code 1, and its
//! provisioners and requests go on.

use nix::sys::signal::{Signal, kill};

use super::given_back::{is_dynamodb, takes_file, takes_item, through};
use super::interrupted_once::slow_to_plan;
use crate::support::http::Message;
use crate::support::process::{Run, terraform_below};
use crate::support::proxy::Deed;
use crate::support::{Ended, Lock, Subject, World, wait_for};

const APPLY: [&str; 3] = ["apply", "-auto-approve", "-no-color"];

fn writes_state(request: &Message) -> bool {
    request.start.starts_with("PUT ") && request.start.contains("prod.tfstate") && !request.start.contains(".tflock")
}

/// Terraform's own deletes: they carry no condition, and those of `tf` do.
fn unlocks(request: &Message) -> bool {
    let item = is_dynamodb(request, ".DeleteItem") && !request.text().contains("ConditionExpression");
    item || (request.start.starts_with("DELETE ") && request.header("if-match").is_none())
}

/// Tries every kind of lock at the same time: what terraform and `tf` wait for adds up.
fn for_each(kinds: &[Lock], promise: impl Fn(Lock) + Sync) {
    std::thread::scope(|scope| {
        for lock in kinds {
            let promise = &promise;
            scope.spawn(move || promise(*lock));
        }
    });
}

/// Two interrupts that do not come through `tf`, as from `killall terraform` typed twice.
fn interrupt_twice(run: &Run) {
    let terraform = terraform_below(run.pid());
    kill(terraform, Signal::SIGTERM).unwrap();
    run.wait_for_out("Interrupt received");
    kill(terraform, Signal::SIGTERM).unwrap();
    run.wait_for_err("Two interrupts");
}

#[track_caller]
fn assert_colleague_is_refused(world: &World) {
    let end = world.run(Subject::Bare, &["plan", "-no-color"]);
    assert_eq!(end.code(), Some(1), "{}", world.story(&end));
    assert!(end.err.contains("Error acquiring the state lock"), "{}", world.story(&end));
}

#[track_caller]
fn assert_released(world: &World, end: &Ended) {
    assert_eq!(end.code(), Some(1), "{}", world.story(end));
    assert!(end.err.contains("released the lock"), "{}", world.story(end));
    world.assert_unlocked();
}

#[test]
fn its_lock_stands_until_its_write_of_the_state_has_landed_and_its_workers_are_dead() {
    for_each(&Lock::ALL, |lock| {
        let mut world = World::empty(lock);
        world.write("worker", "trap '' TERM INT HUP\nwhile :; do echo work >> work; sleep 0.02; done\n");
        world.write_main("", "bash worker > /dev/null 2>&1 & while ! test -e work; do sleep 0.02; done");
        world.init();
        let proxy = through(&mut world, |request| if writes_state(request) { Deed::Hold } else { Deed::Pass });
        let run = world.start(Subject::Tf, &APPLY);
        proxy.wait_until_held();
        interrupt_twice(&run);
        world.wait_for_trace("waiting for a write that may be on its way");
        let work = world.read("work").len();
        world.assert_locked();
        assert_colleague_is_refused(&world);
        assert_eq!(world.read("work").len(), work, "a worker lives on\n{}", world.trace());
        proxy.let_go();
        assert!(proxy.wait_until_delivered().contains("200"));
        assert!(world.state().is_some(), "{}", world.trace());
        assert_released(&world, &run.wait());
    });
}

#[test]
fn its_lock_stands_until_its_own_unlock_has_landed() {
    for_each(&[Lock::DynamoDb, Lock::File], |lock| {
        let mut world = World::new(lock, "true");
        let proxy = through(&mut world, |request| if unlocks(request) { Deed::Hold } else { Deed::Pass });
        let run = world.start(Subject::Tf, &APPLY);
        proxy.wait_until_held();
        interrupt_twice(&run);
        world.wait_for_trace("waiting for a write that may be on its way");
        world.assert_locked();
        assert_colleague_is_refused(&world);
        // It lands before anybody else can have taken the lock.
        proxy.let_go();
        proxy.wait_until_delivered();
        let end = run.wait();
        assert_eq!(end.code(), Some(1), "{}", world.story(&end));
        world.assert_unlocked();
    });
}

#[test]
fn a_lock_that_was_never_begun_to_be_unlocked_is_released_once_all_is_dead() {
    let (world, proxy) = slow_to_plan();
    let run = world.start(Subject::Tf, &APPLY);
    proxy.wait_until_held();
    interrupt_twice(&run);
    let end = run.wait();
    assert!(world.trace().contains("died: true"), "{}", world.story(&end));
    assert!(!world.trace().contains("waiting for a write"), "nothing was written: {}", world.story(&end));
    assert_released(&world, &end);
}

#[test]
fn a_lock_request_that_it_left_unanswered_is_released_when_it_lands() {
    for_each(&[Lock::DynamoDb, Lock::File], |lock| {
        let mut world = World::new(lock, "true");
        let proxy =
            through(
                &mut world,
                |request| {
                    if takes_item(request) || takes_file(request) { Deed::Hold } else { Deed::Pass }
                },
            );
        let run = world.start(Subject::Tf, &APPLY);
        proxy.wait_until_held();
        interrupt_twice(&run);
        let end = run.wait();
        assert_eq!(end.code(), Some(1), "{}", world.story(&end));
        proxy.let_go();
        proxy.wait_until_delivered();
        world.wait_for_locked();
        // From any directory: its own place is in what is remembered.
        let mut recover = world.command(world.bin().join("tf"));
        recover.args(["locks", "recover"]).current_dir("/");
        let end = Run::start(recover).wait();
        assert_eq!(end.code(), Some(0), "{}", world.story(&end));
        assert!(end.out.contains("a dead terraform's request took late"), "{}", world.story(&end));
        world.assert_unlocked();
    });
}

/// A proxy's 504 is no answer of the service, and the request behind it may still land.
#[test]
fn a_lock_request_that_it_gave_up_is_released_when_it_lands() {
    let mut world = World::new(Lock::DynamoDb, "true");
    let text = world.read("main.tf").replace("use_path_style = true", "use_path_style = true\nmax_retries = 1");
    world.write("main.tf", &text);
    let end = world.run(Subject::Bare, &["init", "-reconfigure", "-no-color"]);
    assert_eq!(end.code(), Some(0), "{}", world.story(&end));
    let asked = std::sync::Arc::new(std::sync::Mutex::new(None));
    let seen = std::sync::Arc::clone(&asked);
    through(&mut world, move |request| {
        if !takes_item(request) {
            return Deed::Pass;
        }
        *seen.lock().unwrap() = Some(request.text());
        Deed::Answer(Message::answer("504 Gateway Timeout", ""))
    });
    let end = world.run(Subject::Tf, &APPLY);
    assert_eq!(end.code(), Some(1), "{}", world.story(&end));
    let request: serde_json::Value = serde_json::from_str(asked.lock().unwrap().as_ref().unwrap()).unwrap();
    world.put_lock(request["Item"]["Info"]["S"].as_str().unwrap());
    let end = world.run(Subject::Tf, &["locks", "recover"]);
    assert!(end.out.contains("a dead terraform's request took late"), "{}", world.story(&end));
    world.assert_unlocked();
}

#[test]
fn bare_terraform_leaves_its_lock_in_the_same_places() {
    let (world, proxy) = slow_to_plan();
    let run = world.start(Subject::Bare, &APPLY);
    proxy.wait_until_held();
    kill(run.pid(), Signal::SIGTERM).unwrap();
    run.wait_for_out("Interrupt received");
    kill(run.pid(), Signal::SIGTERM).unwrap();
    assert_eq!(run.wait().code(), Some(1));
    world.assert_locked();
}

/// An unlock that the service refuses is not begun again by terraform: it ends by itself, with code 1.
#[test]
fn a_lock_whose_unlock_was_refused_is_kept_as_long_as_something_of_the_run_lives() {
    let mut world = World::empty(Lock::DynamoDb);
    world.write_main("", "while ! test -e go; do sleep 0.02; done > /dev/null 2>&1 & touch began");
    world.init();
    let _proxy = through(&mut world, |request| {
        if unlocks(request) { Deed::Answer(Message::answer("400 Bad Request", REFUSED)) } else { Deed::Pass }
    });
    let run = world.start(Subject::Tf, &APPLY);
    let end = run.wait();
    assert_eq!(end.code(), Some(1), "{}", world.story(&end));
    assert!(end.err.contains("was not released") && end.err.contains("still alive"), "{}", world.story(&end));
    world.assert_locked();
    // The next one finds the same: what was left on purpose still works.
    let end = world.run(Subject::Tf, &["plan", "-no-color"]);
    assert_eq!(end.code(), Some(1), "{}", world.story(&end));
    world.assert_locked();
    world.go();
    wait_for(
        "the next tf to release it",
        || {
            let end = world.run(Subject::Tf, &["locks", "recover"]);
            (end.code() == Some(0) && world.locks().is_empty()).then_some(())
        },
        || world.trace(),
    );
}

const REFUSED: &str = r#"{"__type":"com.amazonaws.dynamodb.v20120810#AccessDeniedException","Message":"no"}"#;
