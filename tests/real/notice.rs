//! "With a lease, `tf` hears that its host is about to end, and interrupts terraform in time."

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};
use nix::sys::signal::{Signal, kill};
use serde_json::{Value, json};

use super::given_back::{through, writes_state};
use super::leased::{leased, record, suspended_at_a_terminal, wait_for_renewal_after};
use super::locks_release::locks;
use crate::support::http::Message;
use crate::support::metadata::{Metadata, Reply, address_of_this_machine};
use crate::support::process::Run;
use crate::support::processes::{named, tf_of, wait_until_all_is_gone, wait_until_gone, wait_until_unlocked};
use crate::support::proxy::{Proxy, ProxyAction};
use crate::support::system::is_root_on_linux;
use crate::support::test_env::UNSET;
use crate::support::{Lock, Subject, TestEnv, wait_for};

const TOKEN: &str = "/latest/api/token";
const SPOT: &str = "/latest/meta-data/spot/instance-action";
const LIFECYCLE: &str = "/latest/meta-data/autoscaling/target-lifecycle-state";

/// What EC2's metadata says.
#[derive(Clone, Debug, Default)]
struct Instance {
    /// `None`: the instance is not interrupted.
    action: Option<String>,
    /// `None`: the instance is in no group.
    lifecycle: Option<String>,
    /// The number of the only token that is valid.
    token: u32,
}

type Shared<T> = Arc<Mutex<T>>;

/// Answers as EC2's metadata service does, which requires a token.
fn imds(instance: &Shared<Instance>) -> impl Fn(&Message) -> Reply + Send + Sync + 'static + use<> {
    let instance = Arc::clone(instance);
    move |request| {
        let instance = instance.lock().unwrap().clone();
        if request.start.starts_with(&format!("PUT {TOKEN} ")) {
            let has_ttl = request.header("x-aws-ec2-metadata-token-ttl-seconds") == Some("21600");
            return if has_ttl {
                Reply::ok(&format!("TOKEN-{}==", instance.token))
            } else {
                Reply::status("400 Bad Request")
            };
        }
        if request.header("x-aws-ec2-metadata-token") != Some(&format!("TOKEN-{}==", instance.token)) {
            return Reply::status("401 Unauthorized");
        }
        let item = match request.start.split(' ').nth(1) {
            Some(SPOT) => instance.action,
            Some(LIFECYCLE) => instance.lifecycle,
            _ => None,
        };
        item.map_or_else(|| Reply::status("404 Not Found"), |item| Reply::ok(&item))
    }
}

/// Makes the runs of a [`TestEnv`] ask this stand-in for EC2's metadata service.
fn ask_ec2<'a>(env: &'a mut TestEnv, metadata: &Metadata) -> &'a mut TestEnv {
    env.set("TFW_NOTICE", "ec2")
        .set("AWS_EC2_METADATA_DISABLED", UNSET)
        .set("AWS_EC2_METADATA_SERVICE_ENDPOINT", format!("http://127.0.0.1:{}", metadata.port))
}

/// Returns a directory whose runs have a lease, and a proxy that holds the writes of the state. An interrupted
/// terraform ends its provisioner and writes its state, so it has its lock until [`Proxy::let_go`].
fn leased_for_long(lock: Lock) -> (TestEnv, Proxy) {
    let mut env = leased(lock, "15s");
    let writes = through(&mut env, |request| if writes_state(request) { ProxyAction::Hold } else { ProxyAction::Pass });
    (env, writes)
}

/// Like [`leased_for_long`], with a stand-in for EC2's metadata service that the runs ask, and what it says.
fn on_ec2(lock: Lock) -> (TestEnv, Metadata, Shared<Instance>, Proxy) {
    let instance = Shared::<Instance>::default();
    let metadata = Metadata::start(imds(&instance));
    let (mut env, writes) = leased_for_long(lock);
    ask_ec2(&mut env, &metadata);
    (env, metadata, instance, writes)
}

/// Starts an apply, and waits until its lease was renewed and its metadata service has answered.
#[track_caller]
fn start(env: &TestEnv) -> Run {
    let run = env.start_apply(Subject::Tf);
    wait_for_renewal_after(env, &Value::Null);
    env.wait_for_trace(" answers");
    run
}

/// Returns what another host sees of the lock of a [`TestEnv`]: its lease, as JSON.
fn lease_seen_elsewhere(env: &TestEnv) -> Value {
    let mut command = env.command(env.bin().join("tf"));
    let elsewhere = env.directory.join("elsewhere");
    command.args(["locks", "show", "--json"]).env("TFW_STATE_DIR", elsewhere).env("TFW_LOG", "");
    let shown = Run::start(command).wait();
    let shown: Value = serde_json::from_str(&shown.out).unwrap_or_default();
    shown["locks"][0]["lease"].clone()
}

#[track_caller]
fn wait_for_interrupted(env: &TestEnv) -> Value {
    let interrupted = || Some(lease_seen_elsewhere(env)["interrupted"].take()).filter(Value::is_object);
    wait_for("an interrupted run", interrupted, || format!("{:?}\n{}", record(env), env.trace()))
}

/// Lets terraform end, and checks that it got one interrupt, has released its lock, and that `tf` has said `line` once.
#[track_caller]
fn ends_interrupted(env: &TestEnv, run: Run, writes: &Proxy, line: &str) {
    run.wait_for_out("Interrupt received");
    writes.let_go();
    let end = run.wait();
    assert_eq!(end.code(), Some(1), "{}", env.dump(&end));
    assert_eq!(end.out.matches("Interrupt received").count(), 1, "{}", env.dump(&end));
    assert!(!end.out.contains("Two interrupts"), "{}", env.dump(&end));
    assert_eq!(
        end.err.lines().filter(|told| told.starts_with("tf: ")).collect::<Vec<_>>(),
        [line],
        "{}",
        env.dump(&end)
    );
    env.assert_unlocked();
    wait_until_all_is_gone(env);
}

const NEXT: &str = "terraform is interrupted so that it can release its lock";

fn in_two_minutes() -> Timestamp {
    Timestamp::from_second(Timestamp::now().as_second()).unwrap() + SignedDuration::from_mins(2)
}

fn spot(action: &str, at: Timestamp) -> String {
    json!({ "action": action, "time": at.to_string() }).to_string()
}

fn a_spot_interruption_is_one_interrupt_and_every_host_sees_it(lock: Lock) {
    let (env, metadata, instance, writes) = on_ec2(lock);
    let run = start(&env);
    assert_eq!(lease_seen_elsewhere(&env)["interrupted"], Value::Null);
    let at = in_two_minutes();
    instance.lock().unwrap().action = Some(spot("terminate", at));
    let expected = json!({ "host": "terminated", "why": "EC2 spot interruption", "at": at.to_string() });
    assert_eq!(wait_for_interrupted(&env), expected);
    let text = format!("interrupted: its host is to be terminated at {at} (EC2 spot interruption)");
    let list = locks(&env, &["list"]);
    assert!(list.out.contains(&text), "{}", env.dump(&list));
    let line =
        format!("tf: this host will be terminated at {} (EC2 spot interruption); {NEXT}", at.strftime("%H:%M:%SZ"));
    ends_interrupted(&env, run, &writes, &line);
    // One token is enough for all questions.
    assert_eq!(metadata.asked_for(TOKEN).len(), 1);
}
for_each_lock!(a_spot_interruption_is_one_interrupt_and_every_host_sees_it);

#[test]
fn a_stop_a_hibernation_and_the_end_of_a_lifecycle_are_heard_too() {
    let at = in_two_minutes();
    let time = at.strftime("%H:%M:%SZ");
    for (action, lifecycle, begin) in [
        (Some("stop"), None, format!("stopped at {time} (EC2 spot interruption)")),
        (Some("hibernate"), Some("InService"), format!("hibernated at {time} (EC2 spot interruption)")),
        (None, Some("Terminated"), "terminated (EC2 Auto Scaling)".to_owned()),
    ] {
        let (env, _metadata, instance, writes) = on_ec2(Lock::DynamoDb);
        instance.lock().unwrap().lifecycle = Some("InService".to_owned());
        let run = start(&env);
        *instance.lock().unwrap() =
            Instance { action: action.map(|action| spot(action, at)), lifecycle: lifecycle.map(Into::into), token: 0 };
        wait_for_interrupted(&env);
        ends_interrupted(&env, run, &writes, &format!("tf: this host will be {begin}; {NEXT}"));
    }
}

#[test]
fn two_notices_are_one_interrupt_even_if_another_keeper_hears_the_second_one() {
    let (env, metadata, instance, writes) = on_ec2(Lock::Both);
    let run = start(&env);
    instance.lock().unwrap().lifecycle = Some("Terminated".to_owned());
    wait_for_interrupted(&env);
    instance.lock().unwrap().action = Some(spot("terminate", in_two_minutes()));
    let keeper = named(&env, "tf-keeper");
    let asked = metadata.asked().len();
    kill(keeper, Signal::SIGKILL).unwrap();
    wait_until_gone(&env, keeper);
    let last = record(&env).unwrap();
    wait_for_renewal_after(&env, &last);
    // The new keeper knows that terraform was interrupted, and has nothing to ask.
    assert_eq!(wait_for_interrupted(&env)["why"], "EC2 Auto Scaling");
    assert_eq!(metadata.asked().len(), asked);
    ends_interrupted(&env, run, &writes, &format!("tf: this host will be terminated (EC2 Auto Scaling); {NEXT}"));
}

#[test]
fn a_notice_after_a_request_to_stop_is_said_and_interrupts_nothing() {
    let (env, _metadata, instance, writes) = on_ec2(Lock::File);
    let run = start(&env);
    run.send(Signal::SIGTERM);
    run.wait_for_out("Interrupt received");
    instance.lock().unwrap().lifecycle = Some("Terminated".to_owned());
    wait_for_interrupted(&env);
    let line = "tf: this host will be terminated (EC2 Auto Scaling); terraform is being stopped already";
    ends_interrupted(&env, run, &writes, line);
}

#[test]
fn a_request_to_stop_after_a_notice_interrupts_nothing() {
    let (env, _metadata, instance, writes) = on_ec2(Lock::File);
    let run = start(&env);
    instance.lock().unwrap().lifecycle = Some("Terminated".to_owned());
    run.wait_for_out("Interrupt received");
    run.send(Signal::SIGTERM);
    run.send(Signal::SIGINT);
    env.wait_for_trace("got SIGINT");
    ends_interrupted(&env, run, &writes, &format!("tf: this host will be terminated (EC2 Auto Scaling); {NEXT}"));
}

#[test]
fn the_guardian_interrupts_once_and_its_keeper_hears_the_notice_too() {
    let (env, _metadata, instance, writes) = on_ec2(Lock::DynamoDb);
    let run = start(&env);
    kill(tf_of(&env), Signal::SIGKILL).unwrap();
    env.wait_for_trace("guardian: interrupted terraform: true");
    instance.lock().unwrap().lifecycle = Some("Terminated".to_owned());
    wait_for_interrupted(&env);
    writes.let_go();
    drop(run);
    wait_until_unlocked(&env);
    wait_until_all_is_gone(&env);
    assert_eq!(env.trace().matches("guardian: interrupted terraform: true").count(), 1, "{}", env.trace());
}

/// Nobody has interrupted it, and nobody does before it goes on. So other hosts do not wait for its end.
#[test]
fn a_suspended_run_is_interrupted_when_it_goes_on_and_says_so_only_then() {
    let (env, _metadata, instance, writes) = on_ec2(Lock::DynamoDb);
    let (mut terminal, _) = suspended_at_a_terminal(&env);
    env.wait_for_trace("guardian: tf is suspended, and the guardian renews the lease, too");
    // The keeper of `tf`, which writes other records.
    kill(named(&env, "tf-keeper"), Signal::SIGKILL).unwrap();
    instance.lock().unwrap().action = Some(spot("terminate", in_two_minutes()));
    env.wait_for_trace("guardian: the keeper: Report(Notice");
    let mut last = record(&env).unwrap();
    for _ in 0..3 {
        last = wait_for_renewal_after(&env, &last);
        assert!(last.get("interrupted").is_none(), "{last}\n{}", env.trace());
    }
    terminal.type_in("fg\n");
    terminal.wait_for("Interrupt received");
    wait_for_interrupted(&env);
    writes.let_go();
    wait_until_unlocked(&env);
    assert!(!terminal.screen().contains("Two interrupts"), "{}", terminal.screen());
    drop(terminal);
    wait_until_all_is_gone(&env);
}

#[test]
fn a_terraform_that_is_stopped_for_its_lease_is_interrupted_when_it_goes_on() {
    let (mut env, _metadata, instance, _) = on_ec2(Lock::DynamoDb);
    let is_away = Arc::new(AtomicBool::new(false));
    let away = Arc::clone(&is_away);
    let writes = through(&mut env, move |request| match away.load(Ordering::SeqCst) {
        true => ProxyAction::Close,
        false if writes_state(request) => ProxyAction::Hold,
        false => ProxyAction::Pass,
    });
    let run = start(&env);
    is_away.store(true, Ordering::SeqCst);
    kill(named(&env, "tf-fuse"), Signal::SIGKILL).unwrap();
    run.wait_for_err("terraform was stopped, because it is not certain");
    instance.lock().unwrap().lifecycle = Some("Terminated".to_owned());
    run.wait_for_err(
        "(EC2 Auto Scaling); terraform is stopped because of its lease, and is interrupted when it goes on",
    );
    assert!(!run.out().contains("Interrupt received"), "{}", env.trace());
    is_away.store(false, Ordering::SeqCst);
    run.wait_for_err("terraform goes on");
    run.wait_for_out("Interrupt received");
    wait_for_interrupted(&env);
    writes.let_go();
    let end = run.wait();
    assert_eq!(end.code(), Some(1), "{}", env.dump(&end));
    assert_eq!(end.out.matches("Interrupt received").count(), 1, "{}", env.dump(&end));
    env.assert_unlocked();
    wait_until_all_is_gone(&env);
}

#[test]
fn a_token_that_has_expired_is_replaced() {
    let (env, metadata, instance, writes) = on_ec2(Lock::DynamoDb);
    let run = start(&env);
    instance.lock().unwrap().token = 1;
    metadata.wait_for(TOKEN, 2);
    let asked = metadata.asked_for(LIFECYCLE).len();
    metadata.wait_for(LIFECYCLE, asked + 2);
    assert!(!env.trace().contains("is useless"), "{}", env.trace());
    instance.lock().unwrap().lifecycle = Some("Terminated".to_owned());
    ends_interrupted(&env, run, &writes, &format!("tf: this host will be terminated (EC2 Auto Scaling); {NEXT}"));
    assert_eq!(metadata.asked_for(TOKEN).len(), 2);
}

/// Checks that a run ends well although its metadata service gives no useful answer, and that the run asks it ever more
/// rarely. `first` is in the first line of the first request of each question.
#[track_caller]
fn costs_nothing(env: &TestEnv, metadata: &Metadata, first: &str) {
    let run = env.start_apply(Subject::Tf);
    let mut last = wait_for_renewal_after(env, &Value::Null);
    let asked = metadata.wait_for(first, 5);
    let gaps: Vec<Duration> = asked.windows(2).map(|pair| pair[1].at - pair[0].at).collect();
    // Half a second, 1 s, 2 s, 4 s, and the time of each question, of which Azure's first one may take longer. A debug
    // build asks ten times as often.
    assert!(gaps[3] > gaps[1] + Duration::from_secs(1), "{gaps:?}\n{}", env.trace());
    for _ in 0..2 {
        last = wait_for_renewal_after(env, &last);
    }
    assert!(env.trace().contains("is useless: "), "{}", env.trace());
    assert_eq!(run.err(), "", "{}", env.trace());
    env.unblock();
    let end = run.wait();
    assert_eq!((end.code(), end.err.as_str()), (Some(0), ""), "{}", env.dump(&end));
    env.assert_unlocked();
    wait_until_all_is_gone(env);
}

/// What a service of the metadata answers.
type Rule = Box<dyn Fn(&Message) -> Reply + Send + Sync>;

/// Checks each rule with [`costs_nothing`]. `ask` makes the runs of a [`TestEnv`] ask a service. `good` is the service
/// to which a rule redirects: no run may ask it. `and_then` is in the first line of the requests that only a useful
/// answer to `first` leads to.
#[track_caller]
fn each_costs_nothing(
    ask: impl Fn(&mut TestEnv, &Metadata),
    good: &Metadata,
    (first, and_then): (&str, Option<&str>),
    rules: Vec<Rule>,
) {
    for rule in rules {
        let metadata = Metadata::start(rule);
        let mut env = leased(Lock::DynamoDb, "10s");
        ask(&mut env, &metadata);
        costs_nothing(&env, &metadata, first);
        if let Some(and_then) = and_then {
            assert_eq!(metadata.asked_for(and_then).len(), 0, "{:?}", metadata.asked());
        }
        // What the kernel has buffered counts too. A whole answer would be 1 GB.
        let (accepted, answers) = (metadata.accepted(), metadata.asked().len() as u64);
        assert!(accepted < answers << 24, "{accepted} bytes of {answers} answers");
    }
    assert_eq!(good.asked().len(), 0);
}

#[test]
fn a_service_that_hangs_or_redirects_or_fails_costs_nothing_and_is_asked_ever_more_rarely() {
    let instance = Shared::<Instance>::default();
    instance.lock().unwrap().action = Some(spot("terminate", in_two_minutes()));
    let good = Metadata::start(imds(&instance));
    let port = good.port;
    let ask = |env: &mut TestEnv, metadata: &Metadata| {
        ask_ec2(env, metadata);
    };
    let rules: Vec<Rule> = vec![
        Box::new(|_| Reply::Hang),
        Box::new(move |request| Reply::redirect(request, port, [], "TOKEN-0==")),
        Box::new(|_| Reply::status("500 Internal Server Error")),
        Box::new(|_| Reply::Huge),
        // Only the first version of the service: it has no tokens, and answers without one.
        Box::new(|request| match request.start.split(' ').next() {
            Some("GET") => Reply::ok(&spot("terminate", in_two_minutes())),
            _ => Reply::status("405 Method Not Allowed"),
        }),
    ];
    each_costs_nothing(ask, &good, ("PUT ", Some("GET ")), rules);
}

#[test]
fn garbage_costs_nothing_and_is_asked_for_ever_more_rarely() {
    let (env, metadata, instance, writes) = on_ec2(Lock::File);
    writes.let_go();
    instance.lock().unwrap().action = Some(r#"{"action":["terminate"#.to_owned());
    costs_nothing(&env, &metadata, SPOT);
    // The token was good.
    assert_eq!(metadata.asked_for(TOKEN).len(), 1);
}

#[test]
fn after_a_useful_answer_the_service_is_asked_as_often_as_before() {
    let instance = Shared::<Instance>::default();
    let (failures, good) = (AtomicU32::new(0), imds(&instance));
    let metadata = Metadata::start(move |request| match failures.fetch_add(1, Ordering::SeqCst) {
        0..4 => Reply::status("503 Service Unavailable"),
        _ => good(request),
    });
    let (mut env, writes) = leased_for_long(Lock::DynamoDb);
    ask_ec2(&mut env, &metadata);
    let run = start(&env);
    instance.lock().unwrap().lifecycle = Some("Terminated".to_owned());
    ends_interrupted(&env, run, &writes, &format!("tf: this host will be terminated (EC2 Auto Scaling); {NEXT}"));
}

#[test]
fn the_metadata_are_not_asked_for_through_a_proxy() {
    let (mut env, metadata, instance, writes) = on_ec2(Lock::DynamoDb);
    let through = Arc::new(AtomicU32::new(0));
    let counted = Arc::clone(&through);
    let proxy = Proxy::start(metadata.port, move |_| {
        counted.fetch_add(1, Ordering::SeqCst);
        ProxyAction::Pass
    });
    for name in ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"] {
        env.set(name, format!("http://127.0.0.1:{}", proxy.port));
    }
    let address = format!("http://{}:{}", address_of_this_machine(), metadata.port);
    env.set("AWS_EC2_METADATA_SERVICE_ENDPOINT", address);
    let run = start(&env);
    instance.lock().unwrap().lifecycle = Some("Terminated".to_owned());
    ends_interrupted(&env, run, &writes, &format!("tf: this host will be terminated (EC2 Auto Scaling); {NEXT}"));
    assert_eq!(through.load(Ordering::SeqCst), 0);
}

const MACHINE: &str = "/metadata/instance/compute/name?";
const EVENTS: &str = "/metadata/scheduledevents?api-version=2020-07-01";

/// An event of Azure, for the machine `machine`, at `at`.
fn event(kind: &str, machine: &str, at: Timestamp) -> Value {
    json!({
        "EventId": "602d9444-d2cd-49c7-8624-8643e7171297", "EventStatus": "Scheduled", "EventType": kind,
        "ResourceType": "VirtualMachine", "Resources": [machine], "EventSource": "Platform", "DurationInSeconds": -1,
        "Description": "", "NotBefore": at.strftime("%a, %d %b %Y %H:%M:%S GMT").to_string(),
    })
}

/// Answers as Azure's metadata service does on the machine `vmss_1`.
fn azure(events: &Shared<Vec<Value>>) -> impl Fn(&Message) -> Reply + Send + Sync + 'static + use<> {
    let events = Arc::clone(events);
    move |request| {
        if request.header("metadata") != Some("true") {
            return Reply::status("400 Bad Request");
        }
        match request.start.split(' ').nth(1) {
            Some(path) if path.starts_with(MACHINE) => Reply::ok("vmss_1"),
            Some(EVENTS) => {
                let all = events.lock().unwrap().clone();
                Reply::ok(&json!({ "DocumentIncarnation": all.len(), "Events": all }).to_string())
            }
            _ => Reply::status("404 Not Found"),
        }
    }
}

/// Makes the runs of a [`TestEnv`] ask this stand-in for Azure's metadata service.
fn ask_azure(env: &mut TestEnv, metadata: &Metadata) {
    env.set("TFW_NOTICE", "azure").set("TFW_TEST_AZURE_METADATA", format!("http://127.0.0.1:{}", metadata.port));
}

#[test]
fn an_event_of_azure_counts_if_it_ends_this_machine_soon() {
    let events = Shared::<Vec<Value>>::default();
    let metadata = Metadata::start(azure(&events));
    let (mut env, writes) = leased_for_long(Lock::Both);
    ask_azure(&mut env, &metadata);
    let at = in_two_minutes();
    *events.lock().unwrap() = vec![
        event("Preempt", "vmss_2", at),
        event("Freeze", "vmss_1", at),
        event("Redeploy", "vmss_1", at + SignedDuration::from_hours(48)),
    ];
    let run = start(&env);
    metadata.wait_for(EVENTS, 4);
    assert_eq!(run.err(), "", "{}", env.trace());
    assert_eq!(lease_seen_elsewhere(&env)["interrupted"], Value::Null);
    events.lock().unwrap().push(event("Preempt", "vmss_1", at));
    let expected = json!({ "host": "preempted", "why": "Azure scheduled event", "at": at.to_string() });
    assert_eq!(wait_for_interrupted(&env), expected);
    let time = at.strftime("%H:%M:%SZ");
    ends_interrupted(
        &env,
        run,
        &writes,
        &format!("tf: this host will be preempted at {time} (Azure scheduled event); {NEXT}"),
    );
    assert_eq!(metadata.asked_for(MACHINE).len(), 1);
}

/// The first question turns the events on. Here only its answer, which takes longer than that to any other question may,
/// has an event.
#[test]
fn the_first_answer_of_azure_may_come_late() {
    let events = Shared::<Vec<Value>>::default();
    let (good, asked, at) = (azure(&events), AtomicU32::new(0), in_two_minutes());
    let metadata = Metadata::start(move |request| {
        if request.start.contains(EVENTS) && asked.fetch_add(1, Ordering::SeqCst) == 0 {
            std::thread::sleep(Duration::from_secs(4));
            return Reply::ok(
                &json!({ "DocumentIncarnation": 1, "Events": [event("Preempt", "vmss_1", at)] }).to_string(),
            );
        }
        good(request)
    });
    let (mut env, writes) = leased_for_long(Lock::DynamoDb);
    ask_azure(&mut env, &metadata);
    let run = start(&env);
    assert_eq!(wait_for_interrupted(&env)["why"], "Azure scheduled event");
    let time = at.strftime("%H:%M:%SZ");
    let said = format!("tf: this host will be preempted at {time} (Azure scheduled event); {NEXT}");
    ends_interrupted(&env, run, &writes, &said);
}

/// Starts a service that says that the machine `vmss_1` will be preempted.
fn azure_that_preempts() -> Metadata {
    let events = Shared::<Vec<Value>>::default();
    events.lock().unwrap().push(event("Preempt", "vmss_1", in_two_minutes()));
    Metadata::start(azure(&events))
}

/// The machine's name is good, and then the events are not.
fn if_asked_for_events(answer: impl Fn(&Message) -> Reply + Send + Sync + 'static) -> Rule {
    Box::new(move |request| if request.start.contains(EVENTS) { answer(request) } else { Reply::ok("vmss_1") })
}

#[test]
fn a_service_of_azure_without_a_name_of_the_machine_costs_nothing_and_is_asked_ever_more_rarely() {
    let good = azure_that_preempts();
    let port = good.port;
    let rules: Vec<Rule> = vec![
        Box::new(|_| Reply::Hang),
        Box::new(move |request| Reply::redirect(request, port, [], "vmss_1")),
        Box::new(|_| Reply::Huge),
        Box::new(|_| Reply::ok("<html>\n<p>Sign in</p>\n</html>")),
    ];
    each_costs_nothing(ask_azure, &good, (MACHINE, Some(EVENTS)), rules);
}

#[test]
fn a_service_of_azure_without_useful_events_costs_nothing_and_is_asked_ever_more_rarely() {
    let good = azure_that_preempts();
    let port = good.port;
    let rules = vec![
        if_asked_for_events(|_| Reply::Hang),
        if_asked_for_events(move |request| {
            Reply::redirect(request, port, [], r#"{"DocumentIncarnation":1,"Events":[]}"#)
        }),
        if_asked_for_events(|_| Reply::Huge),
        if_asked_for_events(|_| Reply::ok(r#"{"DocumentIncarnation":1,"Events":[{"EventType":"Preempt"#)),
    ];
    each_costs_nothing(ask_azure, &good, (EVENTS, None), rules);
}

/// What Google's metadata says: the value of the two keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Machine {
    preempted: &'static str,
    maintenance: &'static str,
}

/// The time for which a debug build asks Google's service to wait for a change. A release has a minute.
const HANG: Duration = Duration::from_secs(6);

/// Answers as Google's metadata service does. A request that waits for a change is answered when there is one, or after
/// [`HANG`].
fn google(machine: &Shared<Machine>) -> impl Fn(&Message) -> Reply + Send + Sync + 'static + use<> {
    let machine = Arc::clone(machine);
    move |request| {
        let path = request.start.split(' ').nth(1).unwrap_or_default();
        let value = || {
            let machine = *machine.lock().unwrap();
            let is = |key: &str| path.starts_with(&format!("/computeMetadata/v1/instance/{key}"));
            if is("preempted") { machine.preempted } else { machine.maintenance }
        };
        // The value is its own tag here.
        let etag = || {
            let digits: Vec<_> = value().bytes().map(|byte| format!("{byte:02x}")).collect();
            digits.concat()
        };
        let waits = path.split(['?', '&']).any(|part| part == "wait_for_change=true");
        let begun = Instant::now();
        while waits && path.ends_with(&format!("&last_etag={}", etag())) && begun.elapsed() < HANG {
            std::thread::sleep(Duration::from_millis(5));
        }
        if request.header("metadata-flavor") != Some("Google") {
            return Reply::status("403 Forbidden");
        }
        let headers = vec![("Metadata-Flavor", "Google".to_owned()), ("ETag", etag())];
        Reply::Answer("200 OK", headers, value().to_owned())
    }
}

/// Makes the runs of a [`TestEnv`] ask this stand-in for Google's metadata service.
fn ask_google(env: &mut TestEnv, metadata: &Metadata) {
    env.set("TFW_NOTICE", "gcp").set("GCE_METADATA_HOST", format!("127.0.0.1:{}", metadata.port));
}

#[test]
fn a_preemption_and_a_maintenance_of_google_are_heard_as_soon_as_they_are_known() {
    let calm = Machine { preempted: "FALSE", maintenance: "NONE" };
    for (end, begin) in [
        (Machine { preempted: "TRUE", ..calm }, "preempted (GCP preemption)"),
        (Machine { maintenance: "TERMINATE_ON_HOST_MAINTENANCE", ..calm }, "terminated (GCP host maintenance)"),
    ] {
        let machine = Arc::new(Mutex::new(calm));
        let metadata = Metadata::start(google(&machine));
        let (mut env, writes) = leased_for_long(Lock::DynamoDb);
        ask_google(&mut env, &metadata);
        let begun = Instant::now();
        let run = start(&env);
        for key in ["preempted?wait_for_change=true", "maintenance-event?wait_for_change=true"] {
            metadata.wait_for(key, 1);
        }
        // A live migration is the end of nothing.
        machine.lock().unwrap().maintenance = "MIGRATE_ON_HOST_MAINTENANCE";
        metadata.wait_for("maintenance-event?wait_for_change=true", 2);
        assert_eq!(run.err(), "", "{}", env.trace());
        *machine.lock().unwrap() = end;
        wait_for_interrupted(&env);
        ends_interrupted(&env, run, &writes, &format!("tf: this host will be {begin}; {NEXT}"));
        // The requests have waited.
        let most = 12 + 2 * begun.elapsed().as_secs() / HANG.as_secs();
        assert!((metadata.asked().len() as u64) < most, "{:?}", metadata.asked());
    }
}

const PREEMPTED: &str = "/computeMetadata/v1/instance/preempted ";
const MAINTENANCE: &str = "/computeMetadata/v1/instance/maintenance-event ";
const WAITS: &str = "?wait_for_change=true";

/// Says `value` as Google's metadata service does.
fn of_google(value: &str) -> Reply {
    let headers = vec![("Metadata-Flavor", "Google".to_owned()), ("ETag", "0".to_owned())];
    Reply::Answer("200 OK", headers, value.to_owned())
}

/// Starts a service that says that the machine is preempted, and that a maintenance terminates it.
fn google_that_ends() -> Metadata {
    let machine = Machine { preempted: "TRUE", maintenance: "TERMINATE_ON_HOST_MAINTENANCE" };
    Metadata::start(google(&Arc::new(Mutex::new(machine))))
}

fn flavor() -> [(&'static str, String); 1] {
    [("Metadata-Flavor", "Google".to_owned())]
}

/// The machine is not preempted, and then the answer about a maintenance is not good.
fn if_asked_for_maintenance(answer: impl Fn(&Message) -> Reply + Send + Sync + 'static) -> Rule {
    Box::new(move |request| if request.start.contains(MAINTENANCE) { answer(request) } else { of_google("FALSE") })
}

#[test]
fn a_service_of_google_that_does_not_say_whether_there_is_a_preemption_costs_nothing_and_is_asked_ever_more_rarely() {
    let good = google_that_ends();
    let port = good.port;
    let rules: Vec<Rule> = vec![
        Box::new(|_| Reply::Hang),
        Box::new(move |request| Reply::redirect(request, port, flavor(), "TRUE")),
        Box::new(|_| Reply::Huge),
        Box::new(|_| of_google("<html>")),
        // Another program than Google's service.
        Box::new(|_| Reply::ok("TRUE")),
    ];
    each_costs_nothing(ask_google, &good, (PREEMPTED, Some(MAINTENANCE)), rules);
}

#[test]
fn a_service_of_google_that_does_not_say_whether_there_is_a_maintenance_costs_nothing_and_is_asked_ever_more_rarely() {
    let good = google_that_ends();
    let port = good.port;
    let rules = vec![
        if_asked_for_maintenance(|_| Reply::Hang),
        if_asked_for_maintenance(move |request| {
            Reply::redirect(request, port, flavor(), "TERMINATE_ON_HOST_MAINTENANCE")
        }),
        if_asked_for_maintenance(|_| Reply::Huge),
        if_asked_for_maintenance(|_| Reply::ok("TERMINATE_ON_HOST_MAINTENANCE")),
    ];
    each_costs_nothing(ask_google, &good, (MAINTENANCE, None), rules);
}

/// A run asks with plain requests first. Then it asks with requests that wait for a change, and those get no answer, or
/// only a part of one, or a useless one.
#[test]
fn after_a_hanging_get_of_google_without_a_useful_answer_the_run_asks_without_waiting_and_hears_a_preemption() {
    let bad: [fn() -> Reply; 4] = [
        || Reply::Hang,
        || Reply::CutOff(""),
        || Reply::CutOff("HTTP/1.1 200 OK\r\nMetadata-Flavor: Google\r\nETag: 1\r\nContent-Length: 5\r\n\r\nTRUE"),
        || Reply::status("504 Gateway Timeout"),
    ];
    for bad in bad {
        let machine = Arc::new(Mutex::new(Machine { preempted: "FALSE", maintenance: "NONE" }));
        let good = google(&machine);
        let metadata =
            Metadata::start(move |request| if request.start.contains(WAITS) { bad() } else { good(request) });
        let (mut env, writes) = leased_for_long(Lock::DynamoDb);
        ask_google(&mut env, &metadata);
        let run = start(&env);
        let waiting = metadata.wait_for(&format!("preempted{WAITS}"), 1);
        assert!(waiting[0].request.start.contains("&timeout_sec=6&"), "{:?}", waiting[0]);
        let last = record(&env).unwrap();
        let asked = metadata.wait_for(PREEMPTED, 4);
        assert!(asked.windows(2).all(|pair| pair[1].at - pair[0].at > Duration::from_millis(100)), "{asked:?}");
        assert!(env.trace().contains("is useless: "), "{}", env.trace());
        // Every renewal was in time: terraform goes on, and nothing was said.
        wait_for_renewal_after(&env, &last);
        assert_eq!(run.err(), "", "{}", env.trace());
        machine.lock().unwrap().preempted = "TRUE";
        wait_for_interrupted(&env);
        ends_interrupted(&env, run, &writes, &format!("tf: this host will be preempted (GCP preemption); {NEXT}"));
        // One for each key, unless the answer for one key came before the request for the other one.
        assert!(metadata.asked_for(WAITS).len() <= 2, "{:?}", metadata.asked());
    }
}

/// What the firmware says of its machine. The rest of /sys/class is hidden too, because it cannot be written.
const AS_EC2: &str = "mount -t tmpfs none /sys/class && mkdir -p /sys/class/dmi/id \
                      && echo Amazon EC2 > /sys/class/dmi/id/sys_vendor && exec tf apply -auto-approve -no-color";

/// Only root can make such a machine, so this test is listed in tests/left-out.
#[test]
fn a_machine_of_ec2_is_asked_without_a_setting() {
    if !is_root_on_linux() {
        return;
    }
    let (mut env, metadata, instance, writes) = on_ec2(Lock::Both);
    env.set("TFW_NOTICE", UNSET).set("TFW_CLOCK", UNSET);
    let mut command = env.command("unshare");
    command.args(["--mount", "sh", "-c", AS_EC2]);
    let run = Run::start(command);
    env.wait_for_began(&run);
    // A machine of a cloud promises to stop terraform in time, also without TFW_CLOCK.
    assert_eq!(wait_for_renewal_after(&env, &Value::Null)["fence"], "stop", "{}", env.trace());
    env.wait_for_trace(" answers");
    let at = in_two_minutes();
    instance.lock().unwrap().action = Some(spot("terminate", at));
    wait_for_interrupted(&env);
    let at = at.strftime("%H:%M:%SZ");
    let line = format!("tf: this host will be terminated at {at} (EC2 spot interruption); {NEXT}");
    ends_interrupted(&env, run, &writes, &line);
    drop(metadata);
}

#[test]
fn nothing_is_asked_without_a_lease_or_on_another_machine_or_if_the_user_does_not_want_it() {
    let instance = Shared::<Instance>::default();
    instance.lock().unwrap().lifecycle = Some("Terminated".to_owned());
    let metadata = Metadata::start(imds(&instance));
    for (name, value) in [
        ("TFW_LEASE", "off"),
        ("TFW_NOTICE", "off"),
        // This machine is none of EC2, or else it would be asked.
        ("TFW_NOTICE", UNSET),
        ("AWS_EC2_METADATA_DISABLED", "true"),
    ] {
        if value == UNSET && std::fs::read_to_string("/sys/class/dmi/id/sys_vendor").is_ok_and(|is| is.contains("EC2"))
        {
            continue;
        }
        let mut env = leased(Lock::DynamoDb, "10s");
        ask_ec2(&mut env, &metadata).set(name, value);
        let run = env.start_apply(Subject::Tf);
        if name != "TFW_LEASE" {
            let last = wait_for_renewal_after(&env, &Value::Null);
            wait_for_renewal_after(&env, &last);
        }
        env.unblock();
        let end = run.wait();
        assert_eq!((end.code(), end.err.as_str()), (Some(0), ""), "{}", env.dump(&end));
        env.assert_unlocked();
    }
    // A run without a lock has nothing to lose.
    let mut env = leased(Lock::DynamoDb, "10s");
    ask_ec2(&mut env, &metadata);
    let end = env.run(Subject::Tf, &["plan", "-no-color", "-lock=false"]);
    assert_eq!(end.err, "", "{}", env.dump(&end));
    assert_eq!(metadata.asked().len(), 0);
}

#[test]
fn doctor_says_what_is_asked_and_what_it_answers() {
    let instance = Shared::<Instance>::default();
    let metadata = Metadata::start(imds(&instance));
    let mut env = TestEnv::new(Lock::DynamoDb, "true");
    env.set("TFW_LEASE", "5m").set("TFW_NOTICE", "off");
    let told = |env: &TestEnv| {
        let end = locks(env, &["doctor"]);
        assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
        end.out.lines().find(|line| line.contains("  host end notice: ")).unwrap_or_default().to_owned()
    };
    assert_eq!(told(&env), "ok     host end notice: no metadata is asked: TFW_NOTICE is off");
    ask_ec2(&mut env, &metadata);
    let service = format!("the EC2 metadata at http://127.0.0.1:{}", metadata.port);
    assert_eq!(told(&env), format!("ok     host end notice: {service} answers: this host is not about to end"));
    instance.lock().unwrap().lifecycle = Some("Terminated".to_owned());
    let why = "this host is to be terminated (EC2 Auto Scaling)";
    assert_eq!(told(&env), format!("note   host end notice: {service} answers: {why}"));
    instance.lock().unwrap().lifecycle = Some("<html>".to_owned());
    let why = "an answer that is not a lifecycle state";
    assert_eq!(told(&env), format!("note   host end notice: {service} gives no useful answer: {why}"));
    env.set("AWS_EC2_METADATA_DISABLED", "true");
    let why = "AWS_EC2_METADATA_DISABLED is true";
    assert_eq!(told(&env), format!("note   host end notice: no EC2 metadata is asked: {why}"));
    let asked = metadata.asked().len();
    env.set("TFW_LEASE", "off");
    assert_eq!((told(&env).as_str(), metadata.asked().len()), ("", asked));
}
