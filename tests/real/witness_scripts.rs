//! The commands for `TFW_WITNESS` in `shell/witness`: which answers of a platform prove that a holder is dead, and
//! which do not. Each test is with the platform's real client, if that is installed, or with a stand-in for the client.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::locks_release::locks;
use crate::support::cloud::{Server, free_port, keep};
use crate::support::http::{self, Message};
use crate::support::lease::record;
use crate::support::process::Run;
use crate::support::proxy::{Proxy, ProxyAction};
use crate::support::test_env::which;
use crate::support::{Lock, TestEnv, wait_for};

const INSTANCE: &str = "i-0123456789abcdef0";
const TASK: &str = "0123456789abcdef0123456789abcdef";
const UID: &str = "11111111-2222-3333-4444-555555555555";
const CONTAINER: &str = "c0ffee0123456789c0ffee0123456789c0ffee0123456789c0ffee0123456789";
const JOB: &str = "https://github.localhost/o/r/actions/runs/7/attempts/2";

fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("shell/witness").join(name)
}

/// Asks a script about a holder, and returns its verdict and its reason.
fn ask(env: &TestEnv, name: &str, holder: &Value) -> (String, String) {
    ask_at(env, name, holder, "2026-01-02T00:00:00.5Z")
}

/// Asks about a holder that has created its lock at this time.
fn ask_at(env: &TestEnv, name: &str, holder: &Value, created: &str) -> (String, String) {
    let lock = json!({ "id": "a", "who": "\"cloud\":\"Amazon EC2 i-00000000", "created": created });
    env.write("question", &(json!({ "lock": lock, "holder": holder }).to_string() + "\n"));
    let mut command = env.command("/bin/sh");
    command.args(["-c", "exec \"$0\" < question"]).arg(script(name));
    let end = Run::start(command).wait();
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    let answer: Result<Value, _> = serde_json::from_str(&end.out);
    assert!(answer.is_ok(), "{holder} {}", env.dump(&end));
    let text = |name: &str| answer.as_ref().unwrap()[name].as_str().unwrap().to_owned();
    (text("verdict"), text("reason"))
}

/// Asks a script about a holder with this `cloud`.
fn ask_about(env: &TestEnv, name: &str, cloud: &str) -> (String, String) {
    ask(env, name, &json!({ "user": "runner", "cloud": cloud }))
}

fn assert_answer((verdict, reason): &(String, String), expected: &str, text: &str) {
    assert_eq!(verdict, expected, "{reason}");
    assert!(reason.contains(text), "{verdict}: {reason}");
}

/// Puts a program before every other of its name.
fn put_program(env: &TestEnv, name: &str, text: &str) {
    fs::write(env.bin().join(name), text).unwrap();
    fs::set_permissions(env.bin().join(name), fs::Permissions::from_mode(0o755)).unwrap();
}

/// moto's services, and a [`TestEnv`] whose `aws` uses them: the one on PATH, or else the one that `make conformance`
/// installs together with moto. `None` if moto or `aws` is not installed.
fn moto() -> Option<(Server, TestEnv)> {
    let tools = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/tools/moto/bin");
    let (program, installed) = (tools.join("moto_server"), tools.join("aws"));
    if !program.exists() || (which("aws").is_none() && !installed.exists()) {
        return None;
    }
    let port = free_port();
    let server = keep(&[program.to_str().unwrap(), "-H", "127.0.0.1", "-p", &port.to_string()], &[]);
    let is_up = || http::ask(port, "GET", "/moto-api/data.json", &[], b"").filter(|answer| answer.status() == 200);
    wait_for("moto", is_up, || format!("port {port}"));
    let mut env = TestEnv::new(Lock::DynamoDb, "true");
    if which("aws").is_none() {
        symlink(installed, env.bin().join("aws")).unwrap();
    }
    for service in ["EC2", "ECS"] {
        env.set(&format!("AWS_ENDPOINT_URL_{service}"), format!("http://127.0.0.1:{port}"));
    }
    env.set("AWS_REGION", "us-east-1").set("AWS_DEFAULT_REGION", "us-east-1").set("TFW_LEASE", "off");
    Some((server, env))
}

/// Runs the real `aws` and returns what it prints.
fn aws(env: &TestEnv, words: &str) -> String {
    let mut command = env.command("aws");
    command.args(words.split_whitespace());
    let end = Run::start(command).wait();
    assert_eq!(end.code(), Some(0), "aws {words}: {}", env.dump(&end));
    end.out.trim().to_owned()
}

fn new_instance(env: &TestEnv) -> String {
    aws(env, "ec2 run-instances --image-id ami-12c6146b --query Instances[0].InstanceId --output text")
}

/// A hibernated instance is `stopped`, and goes on when it starts. An instance that is not found may be elsewhere.
#[test]
fn only_a_terminated_instance_is_dead() {
    let env = TestEnv::new(Lock::DynamoDb, "true");
    for (state, verdict) in [
        ("terminated", "dead"),
        ("stopped", "unknown"),
        ("stopping", "unknown"),
        ("shutting-down", "unknown"),
        ("running", "unknown"),
        ("pending", "unknown"),
    ] {
        put_program(&env, "aws", &format!("#!/bin/sh\nprintf '{INSTANCE}\\t{state}\\n'\n"));
        assert_answer(&ask_about(&env, "ec2", &format!("Amazon EC2 {INSTANCE}")), verdict, state);
    }
    let about_instance = || ask_about(&env, "ec2", &format!("pod a/b, Amazon EC2 {INSTANCE}"));
    for (text, reason) in [
        ("printf 'i-99999999\\tterminated\\n'", "not found"),
        (":", "not found"),
        ("printf 'AccessDenied \"\\\\ \\033[31m' >&2; exit 254", "aws: AccessDenied  [31m"),
        ("exit 1", "aws: "),
    ] {
        put_program(&env, "aws", &format!("#!/bin/sh\n{text}\n"));
        assert_answer(&about_instance(), "unknown", reason);
    }
    put_program(&env, "aws", "#!/bin/sh\ntouch asked\n");
    for cloud in ["", "Azure", "Amazon EC2", "Amazon EC2 --help", "Amazon EC2 i-0123456789abcdef0; x", "ECS task 7"] {
        assert_answer(&ask_about(&env, "ec2", cloud), "unknown", "no EC2 instance");
    }
    assert!(!env.exists("asked"));
}

#[test]
fn the_real_aws_says_of_an_instance_what_the_witness_reads() {
    let Some((_server, env)) = moto() else { return };
    let instance = new_instance(&env);
    let about = |instance: &str| ask_about(&env, "ec2", &format!("Amazon EC2 {instance}"));
    assert_answer(&about(&instance), "unknown", "is running");
    aws(&env, &format!("ec2 stop-instances --instance-ids {instance}"));
    assert_answer(&about(&instance), "unknown", "is stopped, and may be hibernated");
    assert_answer(&about(INSTANCE), "unknown", "NotFound");
    let mut lapsed = record(2820, 300);
    lapsed["holder"]["cloud"] = format!("Amazon EC2 {instance}").into();
    env.lock_with_lease(&lapsed);
    let mut env = env;
    env.set("TFW_WITNESS", script("all"));
    let end = locks(&env, &["release"]);
    assert_eq!(end.code(), Some(1), "{}", env.dump(&end));
    env.assert_locked();
    aws(&env, &format!("ec2 terminate-instances --instance-ids {instance}"));
    let end = locks(&env, &["release"]);
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    assert!(end.out.contains(&format!("instance {instance} is terminated")), "{}", env.dump(&end));
    env.assert_unlocked();
}

/// ECS calls a task on an instance stopped when the instance was deregistered by force, and its containers run on.
#[test]
fn only_a_stopped_fargate_task_is_dead() {
    let mut env = TestEnv::new(Lock::DynamoDb, "true");
    let arn = format!("arn:aws:ecs:us-east-1:123456789012:task/default/{TASK}");
    let about = |env: &TestEnv| ask_about(env, "ecs", &format!("ECS task {TASK} (Fargate)"));
    for (launch_type, status, verdict, reason) in [
        ("FARGATE", "STOPPED", "dead", "has stopped"),
        ("EC2", "STOPPED", "unknown", "its containers may run on"),
        ("EXTERNAL", "STOPPED", "unknown", "its containers may run on"),
        ("None", "STOPPED", "unknown", "its containers may run on"),
        ("FARGATE", "STOPPING", "unknown", "is STOPPING"),
        ("FARGATE", "DEPROVISIONING", "unknown", "is DEPROVISIONING"),
        ("FARGATE", "RUNNING", "unknown", "is RUNNING"),
    ] {
        put_program(&env, "aws", &format!("#!/bin/sh\nprintf '{arn}\\t{launch_type}\\t{status}\\n'\n"));
        assert_answer(&about(&env), verdict, reason);
    }
    // It is searched for in each cluster, and may be in none of them.
    let only_in_b =
        format!("#!/bin/sh\ncase \"$*\" in *'--cluster b '*) printf '{arn}\\tFARGATE\\tSTOPPED\\n' ;; esac\n");
    put_program(&env, "aws", &only_in_b);
    assert_answer(&about(&env), "unknown", "not found in the clusters default");
    env.set("WITNESS_ECS_CLUSTERS", "a * b");
    assert_answer(&about(&env), "dead", "has stopped");
    put_program(&env, "aws", "#!/bin/sh\necho AccessDenied >&2\nexit 254\n");
    assert_answer(&about(&env), "unknown", "aws: AccessDenied");
    for cloud in ["", "ECS task 7", "ECS task $(touch x)", "Amazon EC2 i-0123456789abcdef0"] {
        assert_answer(&ask_about(&env, "ecs", cloud), "unknown", "no ECS task");
    }
}

#[test]
fn the_real_aws_says_of_a_task_what_the_witness_reads() {
    let Some((_server, env)) = moto() else { return };
    aws(&env, "ecs create-cluster --cluster-name default");
    env.write("containers", r#"[{"name":"c","image":"i","memory":512,"cpu":256}]"#);
    let definition = "ecs register-task-definition --family f --container-definitions file://containers";
    aws(&env, &format!("{definition} --requires-compatibilities FARGATE --network-mode awsvpc --cpu 256 --memory 512"));
    let subnet = aws(&env, "ec2 describe-subnets --query Subnets[0].SubnetId --output text");
    let start = |launch_type: &str| {
        let network = format!("awsvpcConfiguration={{subnets=[{subnet}],securityGroups=[sg-1]}}");
        let words =
            format!("ecs run-task --task-definition f --launch-type {launch_type} --network-configuration {network}");
        let arn = aws(&env, &format!("{words} --query tasks[0].taskArn --output text"));
        arn.rsplit_once('/').unwrap().1.to_owned()
    };
    let about = |task: &str, more: &str| ask_about(&env, "all", &format!("ECS task {task}{more}"));
    let task = start("FARGATE");
    assert_answer(&about(&task, " (Fargate)"), "unknown", &format!("task {task} is "));
    aws(&env, &format!("ecs stop-task --task {task}"));
    assert_answer(&about(&task, " (Fargate)"), "dead", "has stopped");
    assert_answer(&about(TASK, ""), "unknown", "not found");
    // Its instance was deregistered by force: the instance must be asked.
    let instance = new_instance(&env);
    env.write("identity", &json!({ "instanceId": instance }).to_string());
    let register = "ecs register-container-instance --instance-identity-document file://identity";
    let registered = aws(&env, &format!("{register} --query containerInstance.containerInstanceArn --output text"));
    let task = start("EC2");
    aws(&env, &format!("ecs deregister-container-instance --container-instance {registered} --force"));
    let is_called_stopped = || {
        let (verdict, reason) = about(&task, "");
        assert_eq!(verdict, "unknown", "{reason}");
        reason.contains("its containers may run on").then_some(())
    };
    wait_for("a task that is called stopped", is_called_stopped, String::new);
    aws(&env, &format!("ec2 terminate-instances --instance-ids {instance}"));
    assert_answer(&about(&task, &format!(", Amazon EC2 {instance}")), "dead", "is terminated");
}

/// A stand-in for the API server of a cluster, with one pod and one node. They are not found if they are null.
fn cluster(env: &mut TestEnv) -> (Proxy, Arc<Mutex<[Value; 2]>>) {
    let stored = Arc::new(Mutex::new([Value::Null, Value::Null]));
    let objects = Arc::clone(&stored);
    let server = Proxy::start(0, move |request| {
        let path = request.start.split(' ').nth(1).unwrap().split('?').next().unwrap().to_owned();
        let [pod, node] = objects.lock().unwrap().clone();
        let resource = |name: &str, kind: &str, namespaced: bool| json!({ "name": name, "singularName": "", "kind": kind, "namespaced": namespaced, "verbs": ["get", "list"] });
        let found = match path.as_str() {
            "/api" => json!({ "kind": "APIVersions", "versions": ["v1"] }),
            "/apis" => json!({ "kind": "APIGroupList", "apiVersion": "v1", "groups": [] }),
            "/api/v1" => json!({ "kind": "APIResourceList", "groupVersion": "v1",
                "resources": [resource("pods", "Pod", true), resource("nodes", "Node", false)] }),
            "/api/v1/namespaces/ci/pods/runner-1" => pod,
            "/api/v1/nodes/node-1" => node,
            _ => Value::Null,
        };
        let missing = json!({ "kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound",
            "message": "not found", "code": 404 });
        let (status, body) = if found.is_null() { ("404 Not Found", missing) } else { ("200 OK", found) };
        let mut answer = Message::answer(status, &body.to_string());
        answer.headers[0].1 = "application/json".into();
        ProxyAction::Answer(answer)
    });
    let context = json!({ "name": "c", "context": { "cluster": "c", "user": "u" } });
    let config = json!({ "apiVersion": "v1", "kind": "Config", "current-context": "c", "contexts": [context],
        "clusters": [{ "name": "c", "cluster": { "server": format!("http://127.0.0.1:{}", server.port) } }],
        "users": [{ "name": "u", "user": {} }] });
    env.write("kubeconfig", &config.to_string());
    env.set("KUBECONFIG", env.directory.join("kubeconfig"));
    (server, stored)
}

/// The status of a container that terminated in the second in which `ask` says that the lock was created.
fn over(reason: &str) -> Value {
    over_at("2026-01-02T00:00:00Z", reason)
}

fn over_at(finished: &str, reason: &str) -> Value {
    json!({ "name": "c", "state": { "terminated": { "exitCode": 137, "reason": reason, "finishedAt": finished,
        "containerID": format!("containerd://{CONTAINER}") } } })
}

/// Returns a pod that never restarts a container, with one container for each state, and with an init container that
/// has completed.
fn pod(uid: &str, phase: &str, states: &[Value]) -> Value {
    let containers: Vec<Value> = states.iter().map(|_| json!({ "name": "c" })).collect();
    json!({ "kind": "Pod", "apiVersion": "v1", "metadata": { "name": "runner-1", "namespace": "ci", "uid": uid },
        "spec": { "restartPolicy": "Never", "initContainers": [{ "name": "i" }], "containers": containers },
        "status": { "phase": phase, "containerStatuses": states,
            "initContainerStatuses": [over_at("2026-01-01T23:00:00Z", "Completed")] } })
}

/// With the real `kubectl` if it is installed, and with a stand-in for it: calls `check` with an environment, and with
/// a function that asks about the pod `runner-1`, given its object and the object of its node.
fn with_each_kubectl(check: impl Fn(&TestEnv, &dyn Fn(Value, Value) -> (String, String))) {
    for is_real in [true, false] {
        if is_real && which("kubectl").is_none() {
            continue;
        }
        let mut env = TestEnv::empty(Lock::DynamoDb);
        if !is_real {
            put_program(&env, "kubectl", include_str!("../support/kubectl"));
        }
        let (_server, stored) = cluster(&mut env);
        put_program(&env, "aws", "#!/bin/sh\ntouch asked\n");
        let env = env;
        check(&env, &|pod, node| {
            *stored.lock().unwrap() = [pod, node];
            ask_about(&env, "kubernetes", &format!("pod ci/runner-1 ({UID}) on node node-1"))
        });
    }
}

/// Asserts the answer about this pod, whose node does not exist any more.
fn assert_pod(pod: &Value, verdict: &str, reason: &str) {
    with_each_kubectl(|_, ask| assert_answer(&ask(pod.clone(), Value::Null), verdict, reason));
}

fn running() -> Value {
    json!({ "name": "c", "state": { "running": {} }, "lastState": over("Error")["state"] })
}

#[test]
fn a_pod_whose_containers_have_all_terminated_is_dead() {
    assert_pod(&pod(UID, "Failed", &[over("OOMKilled")]), "dead", "have terminated");
    assert_pod(&pod(UID, "Succeeded", &[over("Completed"), over("Error")]), "dead", "ci/runner-1");
}

/// A forced delete removes the object, and the container may run on.
#[test]
fn a_pod_that_is_not_found_is_unknown() {
    assert_pod(&Value::Null, "unknown", "kubectl: ");
}

#[test]
fn a_pod_with_the_same_name_is_unknown() {
    let another = "11111111-2222-3333-4444-666666666666";
    assert_pod(&pod(another, "Failed", &[over("Error")]), "unknown", "is another pod now");
}

/// The control plane sets the phase `Failed` too, of a pod on a node that does not answer.
#[test]
fn a_failed_pod_with_a_running_container_is_unknown() {
    assert_pod(&pod(UID, "Failed", &[running()]), "unknown", "not known that it has terminated");
    assert_pod(&pod(UID, "Running", &[over("Error"), running()]), "unknown", "not known that it has terminated");
}

#[test]
fn a_pod_with_a_container_that_waits_for_its_restart_is_unknown() {
    let waiting = json!({ "name": "c", "state": { "waiting": { "reason": "CrashLoopBackOff" } } });
    assert_pod(&pod(UID, "Failed", &[waiting]), "unknown", "not known that it has terminated");
}

#[test]
fn a_pod_with_a_running_sidecar_is_unknown() {
    let mut with_sidecar = pod(UID, "Failed", &[over("Error")]);
    with_sidecar["status"]["initContainerStatuses"] = json!([running()]);
    assert_pod(&with_sidecar, "unknown", "not known that it has terminated");
}

#[test]
fn a_pod_with_a_running_debugger_is_unknown() {
    let mut debugged = pod(UID, "Failed", &[over("Error")]);
    debugged["spec"]["ephemeralContainers"] = json!([{ "name": "d" }]);
    assert_pod(&debugged, "unknown", "not known that it has terminated");
    debugged["status"]["ephemeralContainerStatuses"] = json!([running()]);
    assert_pod(&debugged, "unknown", "not known that it has terminated");
    debugged["status"]["ephemeralContainerStatuses"] = json!([over("Completed")]);
    assert_pod(&debugged, "dead", "have terminated");
}

#[test]
fn a_pod_without_the_status_of_a_container_is_unknown() {
    let mut without_status = pod(UID, "Failed", &[over("Error"), over("Error")]);
    without_status["status"]["containerStatuses"].as_array_mut().unwrap().pop();
    assert_pod(&without_status, "unknown", "not known that it has terminated");
    let without_any = json!({ "kind": "Pod", "apiVersion": "v1", "metadata": { "uid": UID } });
    assert_pod(&without_any, "unknown", "not known that it has terminated");
}

/// The kubelet has not seen this container end: the container was not there any more when the kubelet started.
#[test]
fn a_pod_with_a_container_that_the_kubelet_could_not_find_is_unknown() {
    assert_pod(&pod(UID, "Failed", &[over("ContainerStatusUnknown")]), "unknown", "not known that it has terminated");
}

/// The container has ended, and the kubelet has reported it. Then the node loses the API server, and the kubelet starts
/// the container again. The stored status says nothing of the container that runs now.
#[test]
fn a_pod_that_restarts_its_containers_is_unknown() {
    for policy in [json!("Always"), json!("OnFailure"), Value::Null] {
        // The control plane may have set the phase `Failed` meanwhile, because the node does not answer.
        for phase in ["Running", "Failed"] {
            let mut restarting = pod(UID, phase, &[over("Error")]);
            restarting["spec"]["restartPolicy"] = policy.clone();
            assert_pod(&restarting, "unknown", "may start a container again in pod ci/runner-1");
        }
        // Only the kubelet sets this phase. It never restarts a container of such a pod.
        let mut succeeded = pod(UID, "Succeeded", &[over("Completed")]);
        succeeded["spec"]["restartPolicy"] = policy;
        assert_pod(&succeeded, "dead", "have terminated");
    }
}

/// A container may have a restart policy of its own, and rules for exit codes (KEP-5307, KEP-5532).
#[test]
fn a_pod_with_a_container_that_has_its_own_restart_policy_is_unknown() {
    let always = json!("Always");
    let rules = json!([{ "action": "Restart", "exitCodes": { "operator": "In", "values": [42] } }]);
    for (list, name, value) in [
        ("containers", "restartPolicy", &always),
        ("containers", "restartPolicyRules", &rules),
        ("initContainers", "restartPolicyRules", &rules),
    ] {
        let mut restarting = pod(UID, "Failed", &[over("Error")]);
        restarting["spec"][list][0][name] = value.clone();
        assert_pod(&restarting, "unknown", "may start a container again in pod ci/runner-1");
    }
    // A sidecar is not restarted after the containers of its pod have terminated.
    let mut with_sidecar = pod(UID, "Failed", &[over("Error")]);
    with_sidecar["spec"]["initContainers"][0]["restartPolicy"] = always;
    assert_pod(&with_sidecar, "dead", "have terminated");
}

/// The phase is that of the same report in which all containers have terminated. Without it, the report is of a kubelet
/// that has not decided yet.
#[test]
fn a_pod_whose_phase_is_not_final_is_unknown() {
    for phase in ["Running", "Pending", "Unknown", ""] {
        assert_pod(&pod(UID, phase, &[over("Error")]), "unknown", "may start a container again in pod ci/runner-1");
    }
}

/// Both times are from the clock of the node. A lock that was created later is of a container that this status does not
/// show.
#[test]
fn a_pod_whose_containers_terminated_before_the_lock_was_created_is_unknown() {
    for finished in ["2026-01-01T23:59:59Z", "0001-01-01T00:00:00Z"] {
        let earlier = over_at(finished, "Error");
        assert_pod(&pod(UID, "Failed", &[earlier]), "unknown", "has terminated after the lock was created");
    }
    let mut without_time = over("Error");
    without_time["state"]["terminated"].as_object_mut().unwrap().remove("finishedAt");
    assert_pod(&pod(UID, "Failed", &[without_time]), "unknown", "has terminated after the lock was created");
    let (first, last) = (over_at("2026-01-01T23:00:00Z", "Completed"), over_at("2026-01-02T01:00:00Z", "Error"));
    assert_pod(&pod(UID, "Failed", &[last, first]), "dead", "have terminated");
}

/// The lock may name the first 12 digits of its container's ID.
#[test]
fn a_pod_that_has_no_container_with_the_id_in_the_lock_is_unknown() {
    let place = format!("pod ci/runner-1 ({UID}) on node node-1");
    with_each_kubectl(|env, ask_pod| {
        ask_pod(pod(UID, "Failed", &[over("Error")]), Value::Null);
        for (container, verdict, reason) in [
            ("c0ffee012345", "dead", "have terminated"),
            ("c0ffee012346", "unknown", "no container c0ffee012346"),
            ("0ffee0123456", "unknown", "no container 0ffee0123456"),
            (".*", "unknown", "no container .*"),
        ] {
            let answer = ask(env, "kubernetes", &json!({ "cloud": place, "container": container }));
            assert_answer(&answer, verdict, reason);
        }
    });
}

/// Only a node that existed before the lock is the node of the holder. Another node may have its name now.
#[test]
fn a_pod_is_dead_if_the_instance_of_its_node_is_terminated() {
    // The witness of EC2 says which instance was asked about.
    let terminated = "#!/bin/sh\nfor one; do case $one in i-*) printf \"$one\\tSTATE\\n\" ;; esac; done\n";
    let node = |created: &str, provider: &str| {
        json!({ "kind": "Node", "apiVersion": "v1", "metadata": { "name": "node-1", "creationTimestamp": created },
            "spec": { "providerID": provider } })
    };
    let provider = format!("aws:///eu-west-1a/{INSTANCE}");
    let old = || node("2026-01-01T00:00:00Z", &provider);
    with_each_kubectl(|env, ask| {
        for state in ["running", "stopped"] {
            put_program(env, "aws", &terminated.replace("STATE", state));
            assert_answer(&ask(Value::Null, old()), "unknown", "kubectl: ");
        }
        put_program(env, "aws", &terminated.replace("STATE", "terminated"));
        assert_answer(&ask(Value::Null, old()), "dead", &format!("instance {INSTANCE} is terminated"));
        let answer = ask(pod(UID, "Running", &[running()]), old());
        assert_answer(&answer, "dead", "the node of pod ci/runner-1 is gone");
        for created in ["2026-01-03T00:00:00Z", "2026-01-02T00:00:00Z"] {
            assert_answer(&ask(Value::Null, node(created, &provider)), "unknown", "kubectl: ");
        }
        let other_cloud = node("2026-01-01T00:00:00Z", "gce://p/z/i-0123456789abcdef0");
        assert_answer(&ask(Value::Null, other_cloud), "unknown", "kubectl: ");
        // The lock itself may name the instance.
        let named = format!("pod ci/runner-1 ({UID}) on node node-1, Amazon EC2 i-0aaaaaaa");
        assert_answer(&ask_about(env, "kubernetes", &named), "dead", "instance i-0aaaaaaa is terminated");
    });
}

#[test]
fn a_lock_that_does_not_name_its_pod_in_full_is_unknown() {
    with_each_kubectl(|env, _| {
        for cloud in ["", "pod ci/runner-1", &format!("pod ci/--all ({UID})"), "Amazon EC2 i-0aaaaaaa"] {
            assert_answer(&ask_about(env, "kubernetes", cloud), "unknown", "no pod with a namespace, a name and a UID");
        }
        assert!(!env.exists("asked"));
    });
}

/// A `gh` that has only what the witness uses.
const GH: &str = r#"#!/bin/sh
[ "$1 $2 $4 $6" = "api --hostname --paginate --jq" ] || exit 9
curl -sS -f -x "$http_proxy" "http://api.$3/$5" > gh.answer && jq -r "$7" gh.answer
"#;

/// With the real `gh` if it is installed, and with a stand-in for it.
#[test]
#[expect(clippy::too_many_lines, reason = "a table")]
fn only_completed_jobs_on_runners_of_github_are_dead() {
    for is_real in [true, false] {
        if (is_real && which("gh").is_none()) || (!is_real && (which("jq").is_none() || which("curl").is_none())) {
            continue;
        }
        let mut env = TestEnv::new(Lock::DynamoDb, "true");
        if !is_real {
            put_program(&env, "gh", GH);
        }
        let stored = Arc::new(Mutex::new(Value::Null));
        let jobs = Arc::clone(&stored);
        let requests = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&requests);
        let server = Proxy::start(0, move |request| {
            seen.lock().unwrap().push(request.start.clone());
            let jobs = jobs.lock().unwrap().clone();
            let (status, body) =
                if jobs.is_null() { ("404 Not Found", json!({ "message": "Not Found" })) } else { ("200 OK", jobs) };
            let mut answer = Message::answer(status, &body.to_string());
            answer.headers[0].1 = "application/json; charset=utf-8".into();
            ProxyAction::Answer(answer)
        });
        env.set("GH_TOKEN", "secret").set("GH_HOST", "github.localhost");
        env.set("http_proxy", format!("http://127.0.0.1:{}", server.port));
        let holder = |job: &str, cloud: &str| json!({ "ci": "GitHub Actions", "job": job, "cloud": cloud });
        let about = |jobs: Value| {
            *stored.lock().unwrap() = jobs;
            ask(&env, "github", &holder(JOB, "Azure"))
        };
        let ago = |seconds: i64| {
            (jiff::Timestamp::now() - jiff::SignedDuration::from_secs(seconds)).strftime("%FT%TZ").to_string()
        };
        let step = |status: &str, conclusion: Value| json!({ "name": "s", "status": status, "conclusion": conclusion });
        let job = |status: &str, conclusion: Option<&str>, group: Option<&str>, completed: &str| {
            let steps = [step("completed", "success".into()), step("completed", "skipped".into())];
            json!({ "status": status, "conclusion": conclusion, "runner_group_name": group, "labels": ["ubuntu-24.04"],
                "completed_at": completed, "steps": steps })
        };
        let hosted = Some("GitHub Actions");
        let done = || job("completed", Some("failure"), hosted, &ago(900));
        let skipped = job("completed", Some("skipped"), None, &ago(900));
        let with = |name: &str, value: Value| {
            let mut job = done();
            job[name] = value;
            job
        };
        let second_step =
            |step: Value| with("steps", json!([{ "status": "completed", "conclusion": "success" }, step]));
        let of = |jobs: Vec<Value>| json!({ "total_count": jobs.len(), "jobs": jobs });
        assert_answer(&about(of(vec![done(), skipped.clone(), done()])), "dead", "are completed");
        let path = "/repos/o/r/actions/runs/7/attempts/2/jobs?per_page=100";
        assert!(requests.lock().unwrap()[0].contains(path), "{requests:?}");
        for (what, jobs, reason) in [
            ("another job is running", of(vec![done(), job("in_progress", None, hosted, "")]), "is not completed"),
            ("another job waits", of(vec![done(), job("queued", None, None, "")]), "is not completed"),
            // Its runner may only have been silent, and terraform may run on.
            (
                "a runner of their own",
                of(vec![done(), job("completed", Some("failure"), Some("Default"), &ago(900))]),
                "runner of GitHub",
            ),
            ("no runner", of(vec![job("completed", Some("cancelled"), None, &ago(900))]), "runner of GitHub"),
            ("just now", of(vec![done(), job("completed", Some("cancelled"), hosted, &ago(20))]), "5 minutes"),
            ("a label of their own", of(vec![with("labels", json!(["linux", "Self-Hosted"]))]), "runner of GitHub"),
            // GitHub has lost the runner, and its machine may still work.
            (
                "a step that works",
                of(vec![done(), second_step(step("in_progress", Value::Null))]),
                "may have been lost",
            ),
            ("a step that waits", of(vec![second_step(step("queued", Value::Null)), done()]), "may have been lost"),
            ("no conclusion", of(vec![second_step(step("completed", Value::Null))]), "may have been lost"),
            ("an empty conclusion", of(vec![second_step(step("completed", "".into()))]), "may have been lost"),
            ("no steps", of(vec![done(), with("steps", json!([]))]), "may have been lost"),
            ("null steps", of(vec![done(), with("steps", Value::Null)]), "may have been lost"),
            ("only skipped", of(vec![skipped.clone()]), "did not list"),
            ("no job", of(vec![]), "did not list"),
            ("not all", json!({ "total_count": 2, "jobs": [done()] }), "did not list"),
            ("no permission", Value::Null, "gh: "),
        ] {
            let answer = about(jobs);
            assert_eq!(answer.0, "unknown", "{what}: {}", answer.1);
            assert_answer(&answer, "unknown", reason);
        }
        // The machine has outlived its job.
        *stored.lock().unwrap() = of(vec![job("completed", Some("failure"), hosted, "2026-01-02T00:00:00Z"), skipped]);
        for (created, verdict, reason) in [
            ("2026-01-02T00:00:00.999Z", "dead", "are completed"),
            ("2026-01-02T00:00:01Z", "unknown", "was created after all jobs"),
            ("", "unknown", "was created after all jobs"),
            ("2026-01-01 00:00:00 +0100", "unknown", "was created after all jobs"),
        ] {
            assert_answer(&ask_at(&env, "github", &holder(JOB, "Azure"), created), verdict, reason);
        }
        // gh sends its token to the server that it is told, so that must not be one that the lock names.
        *stored.lock().unwrap() = of(vec![done()]);
        requests.lock().unwrap().clear();
        for (holder, reason) in [
            (holder("https://evil.localhost/o/r/actions/runs/7/attempts/2", ""), "not on github.localhost"),
            (holder("https://github.localhost.evil/o/r/actions/runs/7/attempts/2", ""), "not on github.localhost"),
            (holder("https://github.localhost/../user/actions/runs/7/attempts/2", ""), "no attempt"),
            (holder("https://github.localhost/o/r/actions/runs/7", ""), "no attempt"),
            (holder("https://github.localhost/o/r/actions/runs/7/attempts/2?x", ""), "no attempt"),
            (holder("", ""), "no attempt"),
            (holder(JOB, "pod ci/runner-1"), "did not run on a runner of GitHub"),
            (holder(JOB, &format!("Amazon EC2 {INSTANCE}")), "did not run on a runner of GitHub"),
            (json!({ "ci": "Gitea Actions", "job": JOB }), "no job of GitHub"),
            (Value::Null, "no job of GitHub"),
        ] {
            assert_answer(&ask(&env, "github", &holder), "unknown", reason);
        }
        assert_eq!(*requests.lock().unwrap(), Vec::<String>::new());
    }
}

/// GitHub lists 100 jobs on a page. Only the real `gh` reads the next one.
#[test]
fn a_job_on_the_second_page_counts() {
    if which("gh").is_none() {
        return;
    }
    let mut env = TestEnv::new(Lock::DynamoDb, "true");
    let job = |status: &str, conclusion: Value| {
        let done = json!([{ "name": "s", "status": "completed", "conclusion": "success" }]);
        json!({ "status": status, "conclusion": conclusion, "runner_group_name": "GitHub Actions", "labels": [],
            "completed_at": "2026-01-02T00:00:00Z", "steps": done })
    };
    let done = job("completed", "success".into());
    for (last, verdict, reason) in [
        (vec![done.clone()], "dead", "are completed"),
        (vec![job("in_progress", Value::Null)], "unknown", "is not completed"),
        (vec![], "unknown", "did not list all jobs"),
    ] {
        let first = vec![done.clone(); 100];
        let server = Proxy::start(0, move |request| {
            let is_second = request.start.contains("&page=2");
            let jobs = if is_second { &last } else { &first };
            let mut answer = Message::answer("200 OK", &json!({ "total_count": 101, "jobs": jobs }).to_string());
            answer.headers[0].1 = "application/json; charset=utf-8".into();
            if !is_second {
                let next = "http://api.github.localhost/repos/o/r/actions/runs/7/attempts/2/jobs?per_page=100&page=2";
                answer.headers.push(("Link".into(), format!("<{next}>; rel=\"next\"")));
            }
            ProxyAction::Answer(answer)
        });
        env.set("GH_TOKEN", "secret").set("GH_HOST", "github.localhost");
        env.set("http_proxy", format!("http://127.0.0.1:{}", server.port));
        let holder = json!({ "ci": "GitHub Actions", "job": JOB, "cloud": "Azure" });
        assert_answer(&ask_at(&env, "github", &holder, "2026-01-01T00:00:00Z"), verdict, reason);
    }
}

/// The first witness that knows the answer answers. None is asked about a holder that it cannot know.
#[test]
fn all_asks_each_witness_that_the_holder_names() {
    let env = TestEnv::new(Lock::DynamoDb, "true");
    put_program(&env, "aws", &format!("#!/bin/sh\nprintf '{INSTANCE}\\tterminated\\n'\n"));
    put_program(&env, "kubectl", "#!/bin/sh\necho 'no access' >&2\nexit 1\n");
    put_program(&env, "gh", "#!/bin/sh\necho 'no token' >&2\nexit 4\n");
    let answer = ask_about(&env, "all", &format!("pod ci/runner-1 ({UID}), Amazon EC2 {INSTANCE}"));
    assert_answer(&answer, "dead", "is terminated");
    assert_answer(&ask_about(&env, "all", &format!("pod ci/runner-1 ({UID})")), "unknown", "no access");
    let job = json!({ "ci": "GitHub Actions", "job": "https://github.com/o/r/actions/runs/1/attempts/1" });
    assert_answer(&ask(&env, "all", &job), "unknown", "no token");
    for holder in [
        Value::Null,
        json!({ "host": "vm", "machine": "m" }),
        json!({ "host": "vm", "cloud": "Google Compute Engine 7306570268931" }),
        json!({ "ci": "GitLab CI", "job": "https://gitlab.com/g/p/-/jobs/7" }),
    ] {
        assert_answer(&ask(&env, "all", &holder), "unknown", "no witness knows this holder");
    }
}

/// kubectl warns of an old kubeconfig on stderr and exits with 0, and `aws` may print a warning of Python there.
#[test]
fn a_warning_of_a_client_is_not_part_of_its_answer() {
    let env = TestEnv::empty(Lock::DynamoDb);
    let warns = |answer: &str| format!("#!/bin/sh\necho 'Warning: deprecated' >&2\n{answer}\necho Note >&2\n");
    let instance = format!("Amazon EC2 {INSTANCE}");
    let pod = format!("pod ci/runner-1 ({UID}) on node node-1");
    let about_job = json!({ "ci": "GitHub Actions", "job": JOB.replace(".localhost", ".com") });
    let aws = format!(
        "case $2 in\n\
         describe-tasks) printf 'arn:aws:ecs:us-east-1:1:task/default/{TASK}\\tFARGATE\\tSTOPPED\\n' ;;\n\
         *) printf '{INSTANCE}\\tterminated\\n' ;;\n\
         esac"
    );
    put_program(&env, "aws", &warns(&aws));
    let over = format!("over=2026-01-02T00:00:00Z=containerd://{CONTAINER}");
    put_program(&env, "kubectl", &warns(&format!("echo '{UID} Never Failed spec {over}'")));
    put_program(&env, "gh", &warns("printf 'total-1\\nover-2026-01-02T00:00:00Z\\n'"));
    for (name, holder, reason) in [
        ("ec2", json!({ "cloud": instance }), "is terminated"),
        ("ecs", json!({ "cloud": format!("ECS task {TASK} (Fargate)") }), "has stopped"),
        ("kubernetes", json!({ "cloud": pod }), "all containers of pod ci/runner-1 have terminated"),
        ("github", about_job.clone(), "are completed"),
    ] {
        assert_answer(&ask(&env, name, &holder), "dead", reason);
        assert_answer(&ask(&env, "all", &holder), "dead", reason);
    }
    // The pod is not found. The instance is in the object of the node.
    let node = format!(
        "[ \"$2\" = node ] || {{ echo 'Error: no pod' >&2; exit 1; }}\n\
         echo '2026-01-01T00:00:00Z aws:///eu-west-1a/{INSTANCE}'"
    );
    put_program(&env, "kubectl", &warns(&node));
    assert_answer(&ask_about(&env, "kubernetes", &pod), "dead", "is terminated");
    // The message of a client that fails is the reason.
    for client in ["aws", "kubectl", "gh"] {
        put_program(&env, client, &warns("echo 'Error: no access' >&2\nexit 1"));
    }
    for (name, holder, reason) in [
        ("ec2", json!({ "cloud": instance }), "aws: Warning: deprecated Error: no access"),
        ("ecs", json!({ "cloud": format!("ECS task {TASK} (Fargate)") }), "aws: Warning: deprecated Error: no access"),
        ("kubernetes", json!({ "cloud": pod }), "kubectl: Warning: deprecated Error: no access"),
        ("github", about_job, "gh: Warning: deprecated Error: no access"),
    ] {
        assert_answer(&ask(&env, name, &holder), "unknown", reason);
    }
}

/// The time that `tf` gives a witness.
const WITNESS_TIMEOUT: Duration = Duration::from_secs(20);

/// A client that hangs, and that leaves behind a process which keeps its output open. Without `timeout`, no one kills
/// that process.
const HANGS: &str = "#!/bin/sh\nsleep 60 &\nexec sleep 60\n";

/// Starts a script with a question about this holder.
fn start(env: &TestEnv, name: &str, holder: &Value) -> Run {
    let lock = json!({ "id": "a", "created": "2026-01-02T00:00:00.5Z" });
    let mut command = env.command("/bin/sh");
    let question = json!({ "lock": lock, "holder": holder }).to_string();
    command.args(["-c", "printf '%s\\n' \"$1\" | \"$0\""]).arg(script(name)).arg(question);
    Run::start(command)
}

/// Waits for the answer, no longer than `tf` does.
fn answer_of(run: Run, env: &TestEnv) -> (String, String) {
    let begun = Instant::now();
    let end = run.wait_at_most(WITNESS_TIMEOUT);
    // `run` has read both pipes to their end, so no process that is left keeps them open.
    assert!(begun.elapsed() < WITNESS_TIMEOUT, "{:?} {}", begun.elapsed(), env.dump(&end));
    let answer: Result<Value, _> = serde_json::from_str(&end.out);
    assert!(answer.is_ok(), "{}", env.dump(&end));
    let text = |name: &str| answer.as_ref().unwrap()[name].as_str().unwrap().to_owned();
    (text("verdict"), text("reason"))
}

#[test]
fn a_witness_whose_client_hangs_answers_in_time() {
    // macOS has no timeout.
    let envs = [true, false].map(|has_timeout| {
        let mut env = TestEnv::empty(Lock::DynamoDb);
        for client in ["aws", "kubectl", "gh"] {
            put_program(&env, client, HANGS);
        }
        if !has_timeout {
            put_program(&env, "timeout", "#!/bin/sh\nexit 127\n");
        }
        env.set("WITNESS_ECS_CLUSTERS", "a b c d e f g h i j k l m n o p q r s t u v w x y z");
        env
    });
    let pod = format!("pod ci/runner-1 ({UID}) on node node-1");
    let instance = format!("Amazon EC2 {INSTANCE}");
    let task = format!("ECS task {TASK} (Fargate)");
    let job = json!({ "ci": "GitHub Actions", "job": JOB.replace(".localhost", ".com"), "cloud": "Azure" });
    let on = |cloud: &str| json!({ "ci": "GitHub Actions", "job": job["job"], "cloud": cloud });
    let cases = [
        ("ec2", on(&instance), "aws: no answer within "),
        ("ecs", on(&task), "aws: no answer within "),
        ("kubernetes", on(&pod), "kubectl: no answer within "),
        ("kubernetes", on(&format!("{pod}, {instance}")), "kubectl: no answer within "),
        ("github", job.clone(), "gh: no answer within "),
        ("all", on(&format!("{pod}, {instance}")), "no answer within "),
        ("all", on(&format!("{task}, {instance}")), "no answer within "),
        ("all", job.clone(), "gh: no answer within "),
    ];
    let started = envs.iter().flat_map(|env| cases.iter().map(move |case| (env, case, start(env, case.0, &case.1))));
    for (env, (name, _, reason), run) in started.collect::<Vec<_>>() {
        let answer = answer_of(run, env);
        assert!(answer.1.contains(reason), "{name}: {answer:?}");
        assert_answer(&answer, "unknown", reason);
    }
}

/// A witness whose client hangs leaves time for the next one.
#[test]
fn all_asks_the_next_witness_in_time() {
    let env = TestEnv::empty(Lock::DynamoDb);
    put_program(&env, "kubectl", HANGS);
    put_program(&env, "aws", &format!("#!/bin/sh\nsleep 1\nprintf '{INSTANCE}\\tterminated\\n'\n"));
    let holder = json!({ "cloud": format!("pod ci/runner-1 ({UID}) on node node-1, Amazon EC2 {INSTANCE}") });
    let runs = ["kubernetes", "all"].map(|name| start(&env, name, &holder));
    for run in runs {
        assert_answer(&answer_of(run, &env), "dead", "is terminated");
    }
    let slow = format!(
        "#!/bin/sh\ncase $2 in describe-instances) sleep 600 ;; esac\n\
         printf 'arn:aws:ecs:us-east-1:1:task/default/{TASK}\\tFARGATE\\tSTOPPED\\n'\n"
    );
    put_program(&env, "aws", &slow);
    let holder = json!({ "cloud": format!("ECS task {TASK} (Fargate), Amazon EC2 {INSTANCE}") });
    assert_answer(&answer_of(start(&env, "all", &holder), &env), "dead", "has stopped");
}

#[test]
fn each_witness_has_fewer_than_80_lines() {
    for name in ["ec2", "ecs", "kubernetes", "github", "all", "common"] {
        let lines = fs::read_to_string(script(name)).unwrap().lines().count();
        assert!(lines < 80, "{name} has {lines} lines");
    }
}
