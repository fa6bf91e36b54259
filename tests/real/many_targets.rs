//! `tf locks list` and `audit` of several tables and buckets, from the command line and from a file.

use std::sync::{Arc, Mutex};

use nix::sys::signal::{Signal, kill};
use serde_json::{Value, json};

use super::given_back::{is_dynamodb, through};
use super::locks_list::assert_fits;
use super::locks_release::locks;
use crate::support::cloud::{cloud, tool};
use crate::support::http::Message;
use crate::support::process::Run;
use crate::support::proxy::{Proxy, ProxyAction};
use crate::support::test_env::lock_json;
use crate::support::{Ended, Lock, TestEnv};

const OLD: &str = "aaaaaaaa-3333-4444-5555-666666666666";
const NEW: &str = "bbbbbbbb-3333-4444-5555-666666666666";

fn lock(id: &str, path: &str, created: &str) -> String {
    let mut info: Value = serde_json::from_str(&lock_json(id, path)).unwrap();
    info["Who"] = "anna@elsewhere".into();
    if !created.is_empty() {
        info["Created"] = created.into();
    }
    info.to_string()
}

/// A table with an old lock, and a bucket with a new one. The file `targets.txt` names them, and a table that does not
/// exist.
fn fleet() -> TestEnv {
    let mut env = TestEnv::new(Lock::Both, "true");
    env.set("AWS_REGION", "us-east-1");
    cloud().put_item(&env.table, "b/old", &lock(OLD, "b/old", "2026-01-01T00:00:00Z"));
    let new = format!("{}/new", env.bucket);
    cloud().s3("PUT", &format!("{new}.tflock"), lock(NEW, &new, "").as_bytes());
    let lines = format!(
        "# the fleet\n--table {} --region us-east-1\n\n--table no-such-table\n--bucket {} --endpoint-url http://127.0.0.1:{}\n",
        env.table,
        env.bucket,
        cloud().port
    );
    env.write("targets.txt", &lines);
    env
}

fn parsed(env: &TestEnv, end: &Ended) -> Value {
    serde_json::from_str(&end.out).unwrap_or_else(|error| panic!("{error} {}", env.dump(end)))
}

/// Each line has a service, a region and a profile of its own. One more table is named on the command line.
#[test]
fn each_target_is_reached_with_its_own_options() {
    let mut env = TestEnv::new(Lock::DynamoDb, "true");
    env.write("credentials", "[one]\naws_access_key_id=ONE\naws_secret_access_key=s\n[two]\naws_access_key_id=TWO\naws_secret_access_key=s\n");
    env.set("AWS_SHARED_CREDENTIALS_FILE", env.directory.join("credentials")).set("AWS_REGION", "us-east-1");
    let asked = Arc::<Mutex<Vec<(u8, String)>>>::default();
    let service = |number| {
        let asked = Arc::clone(&asked);
        Proxy::start(0, move |request| {
            let signed = request.header("authorization").unwrap_or_default();
            let credential = signed.split(['=', ',']).nth(1).unwrap_or_default();
            let parts: Vec<_> = credential.split('/').collect();
            let table = serde_json::from_slice::<Value>(&request.body).unwrap_or_default()["TableName"].clone();
            let table = table.as_str().unwrap_or_default();
            asked.lock().unwrap().push((number, format!("{table} {} {}", parts[0], parts[2])));
            let key = json!([{ "AttributeName": "LockID", "KeyType": "HASH" }]);
            let body = if request.asks_for("DescribeTable") {
                json!({ "Table": { "TableName": table, "KeySchema": key } })
            } else {
                json!({ "Count": 0, "ScannedCount": 0, "Items": [] })
            };
            ProxyAction::Answer(Message::answer("200 OK", &body.to_string()))
        })
    };
    let services = [1, 2].map(service);
    let line = |table: &str, region: &str, profile: &str, service: &Proxy| {
        let endpoint = format!("http://127.0.0.1:{}", service.port);
        format!("--table {table} --region {region} --profile {profile} --endpoint-url {endpoint}\n")
    };
    let lines = line("a", "eu-west-1", "one", &services[0]) + &line("b", "ap-south-1", "two", &services[1]);
    env.write("targets.txt", &lines);
    // The keys of the environment are not those of a profile.
    let endpoint = format!("http://127.0.0.1:{}", services[1].port);
    env.set("AWS_ENDPOINT_URL", &endpoint);
    let end = locks(&env, &["audit", "--older-than", "2h", "--table", "c", "--from", "targets.txt"]);
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    assert!(end.err.contains("tf: total: 0 locks, 0 stale in 3 targets\n"), "{}", env.dump(&end));
    let mut asked = asked.lock().unwrap().clone();
    asked.sort();
    asked.dedup();
    let expected =
        [(1, "a ONE eu-west-1".to_owned()), (2, "b TWO ap-south-1".to_owned()), (2, "c test us-east-1".to_owned())];
    assert_eq!(asked, expected, "{}", env.dump(&end));
}

const AUDIT: [&str; 5] = ["audit", "--older-than", "2h", "--from", "targets.txt"];

#[test]
fn an_audit_of_several_targets_counts_each_and_all_and_goes_on_after_one_that_fails() {
    let env = fleet();
    let end = locks(&env, &AUDIT);
    assert_eq!(end.code(), Some(3), "{}", env.dump(&end));
    assert!(end.out.contains(OLD) && end.out.lines().count() == 1, "{}", end.out);
    for expected in [
        format!("tf: table {}, region us-east-1: 1 lock, 1 stale\n", env.table),
        "tf: table no-such-table: not read completely\n".to_owned(),
        format!("tf: bucket {}, endpoint url http://127.0.0.1:{}: 1 lock, 0 stale\n", env.bucket, cloud().port),
        "tf: total: 2 locks, 1 stale in 3 targets, 1 of them not read completely\n".to_owned(),
    ] {
        assert!(end.err.contains(&expected), "{expected} {}", end.err);
    }
    let end = locks(&env, &[&AUDIT[..], &["--json"]].concat());
    assert_eq!(end.code(), Some(3), "{}", env.dump(&end));
    assert_fits(&env, "audit", &end.out);
    let count = parsed(&env, &end);
    assert_eq!((&count["stale"], &count["unknown"], &count["complete"]), (&json!(1), &json!(2), &json!(false)));
    let targets = count["targets"].as_array().unwrap();
    let seen: Vec<_> = targets.iter().map(|one| (&one["unknown"], &one["stale"], &one["complete"])).collect();
    let (zero, one) = (json!(0), json!(1));
    assert_eq!(seen, [(&one, &one, &json!(true)), (&zero, &zero, &json!(false)), (&one, &zero, &json!(true))]);
    assert!(targets[1]["error"].as_str().unwrap().contains("there is no table no-such-table"), "{count}");
    assert_eq!((&targets[0]["error"], &count["bad_lines"]), (&Value::Null, &json!([])));
}

/// Each sample has the labels of its target. A target that could not be read has no counts, because they are not known.
#[test]
fn metrics_of_several_targets_have_labels_and_a_real_parser_reads_them() {
    let env = fleet();
    let end = locks(&env, &[&AUDIT[..], &["--prometheus"]].concat());
    assert_eq!(end.code(), Some(3), "{}", env.dump(&end));
    env.write("metrics", &end.out);
    let mut parser = env.command(tool("python3"));
    let script = "import json\nfrom prometheus_client.parser import text_string_to_metric_families as parse\n\
                  print(json.dumps([[s.name, s.labels.get('name'), s.labels.get('verdict'), s.value]\n\
                  for f in parse(open('metrics').read()) for s in f.samples]))";
    parser.args(["-c", script]);
    let parsed = Run::start(parser).wait();
    let samples: Vec<(String, Option<String>, Option<String>, f64)> =
        serde_json::from_str(&parsed.out).unwrap_or_else(|_| panic!("{}", parsed.err));
    let value = |metric: &str, name: Option<&str>, verdict: Option<&str>| {
        let mut found = samples
            .iter()
            .filter(|(one, of, which, _)| one == metric && of.as_deref() == name && which.as_deref() == verdict);
        let value = found.next().map(|sample| sample.3);
        assert!(found.next().is_none(), "{samples:?}");
        value
    };
    let (table, bucket) = (Some(env.table.as_str()), Some(env.bucket.as_str()));
    for (metric, name, verdict, expected) in [
        ("tf_locks", table, Some("unknown"), Some(1.0)),
        ("tf_locks_stale", table, None, Some(1.0)),
        ("tf_locks_stale", bucket, None, Some(0.0)),
        ("tf_locks_stale", Some("no-such-table"), None, None),
        ("tf_locks_scan_complete", Some("no-such-table"), None, Some(0.0)),
        ("tf_locks_scan_complete", bucket, None, Some(1.0)),
        ("tf_locks_targets", None, None, Some(3.0)),
        ("tf_locks_targets_failed", None, None, Some(1.0)),
        ("tf_locks_bad_lines", None, None, Some(0.0)),
    ] {
        assert_eq!(value(metric, name, verdict), expected, "{metric} {name:?} {}", end.out);
    }
}

#[test]
fn a_list_of_several_targets_says_for_each_lock_in_which_target_it_is() {
    let env = fleet();
    let end = locks(&env, &["list", "--from", "targets.txt", "--json"]);
    assert_eq!(end.code(), Some(1), "{}", env.dump(&end));
    assert_fits(&env, "locks", &end.out);
    let all = parsed(&env, &end);
    let seen: Vec<_> = all["locks"].as_array().unwrap().iter().map(|lock| (&lock["id"], &lock["target"])).collect();
    assert_eq!(seen, [(&json!(OLD), &json!(0)), (&json!(NEW), &json!(2))], "{all}");
    assert_eq!(all["targets"][2]["target"]["name"], env.bucket);
    assert_eq!((&all["complete"], &all["targets"][0]["complete"]), (&json!(false), &json!(true)));
    assert!(end.err.contains("no-such-table") && !end.err.contains("total"), "{}", end.err);
    // On stdout are only the locks.
    let end = locks(&env, &["--table", &env.table, "--bucket", &env.bucket]);
    assert_eq!((end.code(), end.out.lines().count()), (Some(0), 2), "{}", env.dump(&end));
    assert!(end.err.ends_with("tf: total: 2 locks, 0 stale in 2 targets\n"), "{}", end.err);
}

#[test]
fn of_a_bad_line_the_number_is_said_and_the_others_are_read() {
    let env = fleet();
    let lines = format!("--table {}\n--regoin x --table t\n\n# none\nterraform-locks\n--table {0}\n", env.table);
    env.write("targets.txt", &lines);
    let end = locks(&env, &[&AUDIT[..], &["--json"]].concat());
    assert_eq!(end.code(), Some(3), "{}", env.dump(&end));
    assert_fits(&env, "audit", &end.out);
    let count = parsed(&env, &end);
    let numbers: Vec<_> = count["bad_lines"].as_array().unwrap().iter().map(|bad| &bad["line"]).collect();
    assert_eq!(numbers, [&json!(2), &json!(5)], "{count}");
    // The table that two lines name is read once.
    assert_eq!((&count["stale"], count["targets"].as_array().unwrap().len()), (&json!(1), 1), "{count}");
    assert!(end.err.contains("tf: targets.txt, line 2: ") && end.err.contains("--region"), "{}", end.err);
    assert!(end.err.contains("tf: targets.txt, line 5: ") && end.err.contains("for example: --table"), "{}", end.err);
    // Without a stale lock, the bad lines alone are a failure.
    cloud().delete_item(&env.table, "b/old");
    assert_eq!(locks(&env, &AUDIT).code(), Some(1));
    assert_eq!(
        locks(&env, &["audit", "--older-than", "2h", "--table", &env.table, "--table", &env.table]).code(),
        Some(0)
    );
}

#[test]
fn a_file_without_targets_and_one_that_is_not_there_are_a_sentence_and_a_next_step() {
    let env = fleet();
    env.write("empty", "# nothing yet\n\n");
    env.write("large", &"#\n".repeat(1 << 19));
    env.write("larger", &"#\n".repeat((1 << 19) + 1));
    for (file, expected) in [
        ("empty", "empty names no target"),
        ("large", "large names no target"),
        ("larger", "larger than 1 MiB"),
        ("missing", "could not read the targets in missing: No such file"),
        (".", "Is a directory"),
    ] {
        for command in [&["audit", "--older-than", "2h"][..], &["list"]] {
            let end = locks(&env, &[command, &["--from", file]].concat());
            assert_eq!((end.code(), end.out.as_str()), (Some(1), ""), "{file} {}", env.dump(&end));
            assert!(end.err.contains(expected) && end.err.contains("for example: --table"), "{file} {}", end.err);
        }
    }
    for words in [&["list", "--chdir", ".", "--from", "empty"][..], &["list", "--bucket", "b", "--rate", "3"]] {
        assert_eq!(locks(&env, words).code(), Some(1), "{words:?}");
    }
}

#[test]
fn targets_are_read_from_stdin() {
    let env = fleet();
    let end = env.run_in_shell("tf locks audit --older-than 2h --from - --json <targets.txt; echo $? >&2");
    assert!(end.err.ends_with("3\n"), "{}", env.dump(&end));
    assert_eq!(parsed(&env, &end)["targets"].as_array().unwrap().len(), 3, "{}", end.out);
}

/// A ^C in one target stops the whole command. The first page of the list is a whole JSON object nevertheless.
#[test]
fn a_signal_stops_all_targets_and_not_only_the_current_one() {
    let mut env = fleet();
    let proxy = through(&mut env, |request| {
        let is_second = request.text().contains("no-such-table");
        if is_dynamodb(request, ".DescribeTable") && is_second { ProxyAction::Hold } else { ProxyAction::Pass }
    });
    let mut command = env.command(env.bin().join("tf"));
    command.args(["locks", "list", "--from", "targets.txt", "--json"]);
    let run = Run::start(command);
    proxy.wait_until_held();
    kill(run.pid(), Signal::SIGINT).unwrap();
    let end = run.wait();
    assert_eq!(end.signal(), Some(Signal::SIGINT as i32), "{}", env.dump(&end));
    let all = parsed(&env, &end);
    assert_fits(&env, "locks", &end.out);
    assert_eq!((all["locks"][0]["id"].as_str(), &all["complete"]), (Some(OLD), &json!(false)), "{all}");
    assert_eq!(all["targets"].as_array().unwrap().len(), 2, "{all}");
}
