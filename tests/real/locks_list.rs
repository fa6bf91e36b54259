//! `tf locks list` shows each lock as what it is, to people, to scripts and to programs.

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use nix::sys::signal::{Signal, kill};
use serde_json::{Value, json};

use super::given_back::{is_dynamodb, through};
use super::locks_doctor::denied;
use super::locks_release::locks;
use super::survived::start_recorded;
use crate::support::cloud::{cloud, tool};
use crate::support::http::Message;
use crate::support::process::Run;
use crate::support::processes::kill_all;
use crate::support::proxy::{Proxy, ProxyAction};
use crate::support::terminal::Terminal;
use crate::support::test_env::{WAITS, lock_json};
use crate::support::{Ended, Lock, Subject, TestEnv};

const A: &str = "aaaaaaaa-3333-4444-5555-666666666666";
const B: &str = "bbbbbbbb-3333-4444-5555-666666666666";

fn of_anna(id: &str, path: &str) -> String {
    let mut info: Value = serde_json::from_str(&lock_json(id, path)).unwrap();
    info["Who"] = "anna@elsewhere".into();
    info.to_string()
}

fn table<'a>(env: &'a TestEnv, more: &[&'a str]) -> Vec<&'a str> {
    [&["list", "--table", env.table.as_str(), "--region", "us-east-1"], more].concat()
}

fn parsed(env: &TestEnv, end: &Ended) -> Value {
    let read = serde_json::from_str(&end.out);
    assert!(read.is_ok(), "{read:?} {}", env.dump(end));
    read.unwrap()
}

/// Checks JSON with a real validator against the schema in the repository.
fn assert_fits_the_schema(env: &TestEnv, text: &str) {
    assert_fits(env, "locks", text);
}

/// The same with another schema, by its name.
pub fn assert_fits(env: &TestEnv, name: &str, text: &str) {
    let schema = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("docs/{name}.schema.json"));
    env.write("shown.json", text);
    let mut python = env.command(tool("python3"));
    let script = "import sys, json, jsonschema\nschema = json.load(open(sys.argv[1]))\n\
                  jsonschema.Draft202012Validator.check_schema(schema)\n\
                  jsonschema.Draft202012Validator(schema).validate(json.load(open('shown.json')))";
    python.args(["-c", script]).arg(schema);
    let end = Run::start(python).wait();
    assert_eq!(end.code(), Some(0), "{}\n{text}", end.err);
}

/// The pages of a table are read by several threads, and each of them looks at the dead run in the journal.
#[test]
fn every_list_of_a_table_judges_a_dead_run_alike() {
    let env = TestEnv::new(Lock::DynamoDb, WAITS);
    let run = start_recorded(&env);
    kill_all(&env);
    run.wait();
    // Some in each segment.
    for number in 0..64 {
        let path = format!("{}-{number}", env.path());
        cloud().put_item(&env.table, &path, &of_anna(&format!("{number:08}-3333-4444-5555-666666666666"), &path));
    }
    let listed = || {
        let end = locks(&env, &table(&env, &["--json"]));
        let all = parsed(&env, &end)["locks"].as_array().unwrap().clone();
        assert_eq!(all.len(), 65, "{}", env.dump(&end));
        let mut lock = all.into_iter().find(|lock| lock["path"] == env.path()).unwrap();
        // The age of a lease grows.
        lock["evidence"].as_array_mut().unwrap().retain(|seen| !seen["seen"].as_str().unwrap().contains(" lease "));
        ["verdict", "reason", "evidence"].map(|name| lock[name].take())
    };
    let first = listed();
    assert_eq!((&first[0], first[2].as_array().unwrap().len()), (&json!("dead"), 2), "{first:?}");
    for _ in 0..40 {
        assert_eq!(listed(), first);
    }
}

#[test]
fn every_workspace_of_the_backend_is_listed_from_both_services() {
    let env = TestEnv::new(Lock::Both, "true");
    env.put_lock(&of_anna(A, &env.path()));
    let green = format!("{}/env:/green/dir/prod.tfstate", env.bucket);
    cloud().s3("PUT", &format!("{green}.tflock"), of_anna(B, &green).as_bytes());
    let end = locks(&env, &["list", "--json"]);
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    assert_fits_the_schema(&env, &end.out);
    let all = parsed(&env, &end);
    let seen: Vec<_> = all["locks"].as_array().unwrap().iter().map(|lock| (&lock["id"], &lock["workspace"])).collect();
    assert_eq!(seen, [(&json!(A), &json!("default")), (&json!(B), &json!("green"))], "{all}");
    assert_eq!(all["locks"][0]["halves"].as_array().unwrap().len(), 2);
    // A single part is reported as such.
    assert!(!all["locks"][1]["notes"].as_array().unwrap().is_empty(), "{all}");
    assert_eq!(all["locks"][0]["verdict"], "unknown");
}

#[test]
fn two_ids_at_one_path_are_two_locks() {
    let env = TestEnv::new(Lock::Both, "true");
    cloud().put_item(&env.table, &env.path(), &of_anna(A, &env.path()));
    cloud().s3("PUT", &format!("{}.tflock", env.path()), of_anna(B, &env.path()).as_bytes());
    let end = locks(&env, &["list", "--json"]);
    let all = parsed(&env, &end);
    assert_fits_the_schema(&env, &end.out);
    assert_eq!(all["locks"].as_array().unwrap().len(), 2, "{all}");
    assert!(all["locks"].as_array().unwrap().iter().all(|lock| !lock["notes"].as_array().unwrap().is_empty()), "{all}");
}

/// Untrusted text with escape sequences, line ends, direction overrides and a Who of 300 kB, on a terminal of any
/// width, in a pipe and as JSON.
#[test]
fn a_strangers_text_cannot_do_anything() {
    let env = TestEnv::new(Lock::File, "true");
    let mut info: Value = serde_json::from_str(&of_anna(A, &env.path())).unwrap();
    info["Who"] = format!("\u{1b}]0;owned\u{7}\u{1b}[2J\n\r\u{202e}evil\u{9b}31m{}", "w".repeat(300_000)).into();
    info["Operation"] = "a\nb\u{2067}".into();
    env.put_lock(&info.to_string());
    let is_plain =
        |text: &str| text.chars().all(|character| matches!(character, '\n' | '…') || (' '..='~').contains(&character));
    for words in [&["list"][..], &["list", "--json"], &["show"]] {
        let end = locks(&env, words);
        assert_eq!(end.code(), Some(0), "{words:?} {}", end.err);
        assert!(
            is_plain(&end.out),
            "{words:?} {:?}",
            end.out.chars().filter(|one| !is_plain(&one.to_string())).take(9).collect::<String>()
        );
    }
    let all = parsed(&env, &locks(&env, &["list", "--json"]));
    assert_eq!(all["locks"][0]["who"], info["Who"]);
    // One lock is one line, and the text cannot forge a line of `tf`.
    assert_eq!(locks(&env, &["list"]).out.lines().count(), 1);
    for width in [40, 80, 132] {
        let mut sized = env.command("sh");
        sized.args(["-c", &format!("stty cols {width}; exec \"$0\" locks list")]).arg(env.bin().join("tf"));
        let mut terminal = Terminal::start(sized);
        terminal.wait();
        let screen = terminal.whole_screen();
        assert!(
            !screen.contains("\u{1b}]0;") && !screen.contains('\u{202e}') && !screen.contains('\u{9b}'),
            "{screen:?}"
        );
        for line in screen.lines() {
            let shown = console_width(line);
            assert!(shown <= width, "{width}: {shown} {line:?}");
        }
    }
}

/// A repository that somebody has cloned can contain a `.terraform` with any text.
#[test]
fn a_cached_backend_with_escapes_reaches_no_terminal() {
    let env = TestEnv::new(Lock::File, "true");
    let mut cached: Value = serde_json::from_str(&env.read(".terraform/terraform.tfstate")).unwrap();
    let good = cached["backend"]["config"].clone();
    let active = "x\u{1b}]0;owned\u{7}\u{9b}31m\u{202e}";
    for name in ["profile", "key", active] {
        cached["backend"]["config"] = good.clone();
        cached["backend"]["config"][name] = active.into();
        env.write(".terraform/terraform.tfstate", &cached.to_string());
        for words in [&["list"][..], &["show"], &["doctor"], &["release", "--dry-run"]] {
            let end = locks(&env, words);
            let shown = end.out.clone() + &end.err;
            // A pipe gets nothing if there is no lock, and `doctor` does not show a profile.
            let is_shown = name == active || words == ["show"];
            assert!(shown.contains("]0;owned") || !is_shown, "{name:?} {words:?} {shown}");
            let is_active = |one: char| one.is_control() && one != '\n' || one == '\u{202e}';
            assert!(!shown.contains(is_active), "{name:?} {words:?} {shown:?}");
        }
    }
}

/// An env file from Windows ends each line with a carriage return.
#[test]
fn credentials_that_cannot_be_sent_are_an_error_and_not_a_panic() {
    for (variable, what) in [("AWS_ACCESS_KEY_ID", "access key ID"), ("AWS_SESSION_TOKEN", "session token")] {
        let mut env = TestEnv::new(Lock::Both, "true");
        env.set(variable, "AKIAXXXX\r");
        for words in [&["list"][..], &["show"], &table(&env, &[]), &["doctor"]] {
            let end = locks(&env, words);
            let shown = end.out.clone() + &end.err;
            assert!(shown.contains(&format!("the {what} contains a space, a line break")), "{words:?} {shown}");
            assert_eq!(end.code(), Some(if words == ["doctor"] { 2 } else { 1 }), "{words:?} {shown}");
            assert!(!shown.contains("AKIAXXXX") && !shown.contains("panicked"), "{shown}");
        }
    }
}

/// Returns the width of a line without its colors.
fn console_width(line: &str) -> usize {
    let mut width = 0;
    let mut rest = line.trim_end_matches('\r').chars();
    while let Some(character) = rest.next() {
        if character == '\u{1b}' {
            for character in rest.by_ref() {
                if character.is_ascii_alphabetic() {
                    break;
                }
            }
        } else {
            width += 1;
        }
    }
    width
}

#[test]
fn what_is_no_lock_is_listed_as_that_and_digests_are_not_listed() {
    let env = TestEnv::new(Lock::DynamoDb, "true");
    let put = |item: Value| {
        cloud().dynamodb("PutItem", &json!({ "TableName": env.table, "Item": item }));
    };
    put(json!({ "LockID": { "S": "a" }, "Info": { "S": of_anna(A, "a") } }));
    put(json!({ "LockID": { "S": "broken" }, "Info": { "S": "{\"ID\":" } }));
    put(json!({ "LockID": { "S": "number" }, "Info": { "N": "7" } }));
    put(json!({ "LockID": { "S": "without" } }));
    put(json!({ "LockID": { "S": "foreign" }, "Colour": { "S": "green" } }));
    put(json!({ "LockID": { "S": "a-md5" }, "Digest": { "S": "0" } }));
    let end = locks(&env, &table(&env, &["--json"]));
    assert_eq!(end.code(), Some(2), "it keeps runs out: {}", env.dump(&end));
    assert_fits_the_schema(&env, &end.out);
    let all = parsed(&env, &end);
    assert_eq!(all["locks"].as_array().unwrap().len(), 1, "{all}");
    let mut junk: Vec<_> =
        all["unreadable"].as_array().unwrap().iter().map(|one| one["place"]["key"].as_str().unwrap()).collect();
    junk.sort_unstable();
    assert_eq!(junk, ["broken", "foreign", "number", "without"]);
    assert_eq!((&all["complete"], &all["scanned"]), (&json!(true), &json!(6)));
    // The same again. If the reader of the pipe stops reading, that is not an error.
    let first = locks(&env, &table(&env, &[])).out;
    assert_eq!(first.lines().count(), 5, "{first}");
    let mut head = env.command("bash");
    let tf = env.bin().join("tf");
    let line = format!(
        "'{}' locks list --table {} --region us-east-1 | head -n 1; echo ${{PIPESTATUS[0]}}",
        tf.display(),
        env.table
    );
    head.args(["-c", &line]);
    let end = Run::start(head).wait();
    assert!(end.err.is_empty(), "{}", end.err);
}

#[test]
fn a_lock_whose_key_ends_like_a_digest_is_shown_and_a_digest_is_not_a_lock() {
    let env = TestEnv::new(Lock::DynamoDb, "true");
    let path = format!("{}/x-md5", env.bucket);
    let show = |path: &str| locks(&env, &["show", "--table", &env.table, "--region", "us-east-1", path]);
    let end = show(&path);
    assert!(end.code() == Some(1) && end.err.contains("there is no lock at"), "{}", env.dump(&end));
    let put = |item: Value| {
        cloud().dynamodb("PutItem", &json!({ "TableName": env.table, "Item": item }));
    };
    put(json!({ "LockID": { "S": path }, "Digest": { "S": "0" } }));
    let end = show(&path);
    assert!(end.code() == Some(1) && end.err.contains("is the digest of a state"), "{}", env.dump(&end));
    put(json!({ "LockID": { "S": path }, "Info": { "S": of_anna(A, &path) } }));
    let end = show(&path);
    assert!(end.err.is_empty() && end.out.contains(A), "{}", env.dump(&end));
}

#[test]
fn a_bucket_is_listed_below_a_prefix() {
    let env = TestEnv::new(Lock::File, "true");
    for (key, id) in [("prod/a.tfstate", A), ("test/b.tfstate", B)] {
        let path = format!("{}/{key}", env.bucket);
        cloud().s3("PUT", &format!("{path}.tflock"), of_anna(id, &path).as_bytes());
        cloud().s3("PUT", &path, b"{}");
    }
    let words = [
        "list",
        "--bucket",
        &env.bucket,
        "--prefix",
        "prod/",
        "--region",
        "us-east-1",
        "--endpoint-url",
        &url(),
        "--json",
    ];
    let end = locks(&env, &words);
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    assert_fits_the_schema(&env, &end.out);
    let all = parsed(&env, &end);
    assert_eq!(all["locks"].as_array().unwrap().len(), 1, "{all}");
    assert_eq!(
        all["locks"][0]["place"],
        json!({ "kind": "s3", "bucket": env.bucket, "key": "prod/a.tfstate.tflock", "region": "us-east-1" })
    );
}

/// Such an object is there while a run tests the service. It stays if that run is killed then, or may not delete it.
#[test]
fn an_object_of_a_test_of_the_service_is_no_lock_and_one_note_says_how_to_remove_it() {
    let env = TestEnv::new(Lock::File, "true");
    let path = format!("{}.5e75cb05-d70c-4132-39e0-d2abba1b3077", env.path());
    cloud().s3("PUT", &format!("{path}.tflock"), b"tf locks doctor: this can be deleted");
    let bucket = url();
    let bucket = ["--bucket", &env.bucket, "--region", "us-east-1", "--endpoint-url", &bucket];
    let with = |words: &[&str]| locks(&env, &[words, &bucket].concat());
    let listed = with(&["list"]);
    assert_eq!((listed.code(), listed.out.as_str()), (Some(0), ""), "{}", env.dump(&listed));
    assert!(listed.err.starts_with("tf: 1 object in the bucket is not a lock"), "{}", env.dump(&listed));
    for more in [&[][..], &["--json"], &["--prometheus"]] {
        let end = with(&[&["audit", "--older-than", "1s"], more].concat());
        assert_eq!((end.code(), end.err.as_str()), (Some(0), ""), "{}", env.dump(&end));
        assert!(more.is_empty() || end.out.contains("tf_locks_unreadable 0") || end.out.contains("\"unreadable\":0"));
    }
    let mut command = env.command("sh");
    let remove = listed.err.lines().last().unwrap().split_once("type: ").unwrap().1;
    command.args(["-c", &format!("{remove} --yes")]);
    let end = Run::start(command).wait();
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    let listed = with(&["list"]);
    assert_eq!((listed.code(), listed.err.as_str()), (Some(0), ""), "{}", env.dump(&listed));
    // Anything else at such a key is in the place of a lock.
    cloud().s3("PUT", &format!("{path}.tflock"), b"tf locks doctor");
    assert_eq!(with(&["list"]).code(), Some(2));
    assert_eq!(with(&["audit", "--older-than", "1s"]).code(), Some(2));
}

fn url() -> String {
    format!("http://127.0.0.1:{}", cloud().port)
}

/// Each error is a sentence with a next step, and the exit code is 1.
#[test]
fn bad_input_is_a_sentence_and_a_next_step() {
    let env = TestEnv::new(Lock::DynamoDb, "true");
    let nobody = "http://127.0.0.1:9";
    let empty = env.directory.join("empty");
    std::fs::create_dir(&empty).unwrap();
    let backends = [("local", "the kernel releases"), ("cloud", "HCP Terraform"), ("http", "force-unlock")];
    for (kind, _) in backends {
        let data = env.directory.join(kind).join(".terraform");
        std::fs::create_dir_all(&data).unwrap();
        let cached = json!({ "version": 3, "backend": { "type": kind, "config": {}, "hash": 1 } });
        std::fs::write(data.join("terraform.tfstate"), cached.to_string()).unwrap();
    }
    let no_table = ["list", "--table", "no-such-table", "--region", "us-east-1"];
    let mut cases: Vec<(Vec<&str>, &str)> = vec![
        (no_table.to_vec(), "check the name, the region and the profile"),
        (vec!["list", "--table", "t", "--region", "us-east-1", "--endpoint-url", nobody], "check the network"),
        (
            vec!["list", "--bucket", "no-such-bucket", "--region", "us-east-1", "--endpoint-url"],
            "check the name, the region and the profile",
        ),
        (vec!["--chdir", "empty"], "terraform init"),
        (vec!["show", "nothing-like-it"], "there is no lock at"),
        (vec!["lits"], "list"),
        (vec!["release", "--force", "5e75"], "there is no lock at"),
    ];
    let here = url();
    cases[2].0.push(&here);
    cases.extend(backends.map(|(kind, expected)| (vec!["--chdir", kind], expected)));
    for (words, expected) in cases {
        let end = locks(&env, &words);
        assert_eq!(end.code(), Some(1), "{words:?} {}", env.dump(&end));
        assert!(end.err.contains(expected) && end.out.is_empty(), "{words:?} {}", end.err);
        assert!(!end.err.contains("panicked") && end.err.lines().count() < 12, "{words:?} {}", end.err);
    }
}

#[test]
fn what_is_asked_of_a_service_that_says_no_is_a_sentence_too() {
    let mut env = TestEnv::new(Lock::File, "true");
    let unknown = locks(&env, &["list", "--table", "t"]);
    assert_eq!(unknown.code(), Some(1), "{}", env.dump(&unknown));
    assert!(unknown.err.contains("no region is set") && unknown.err.contains("--region"), "{}", unknown.err);
    let _proxy = through(&mut env, denied);
    for words in [
        &["list", "--table", "t", "--region", "us-east-1"][..],
        &["list", "--bucket", &env.bucket, "--region", "us-east-1"],
        &["list"],
        &["show"],
        &["release", "--yes"],
    ] {
        let end = locks(&env, words);
        assert_eq!(end.code(), Some(1), "{words:?} {}", env.dump(&end));
        assert!(end.err.contains("is not authorized"), "{words:?} {}", end.err);
        assert!(end.err.contains("get-caller-identity"), "{words:?} {}", end.err);
    }
}

/// The scans that arrived, each with its time.
type Asked = Arc<Mutex<Vec<(Instant, Value)>>>;

/// A table with a lock on its first page. `rest` says how the later pages are answered. No real service is slow on
/// demand.
fn table_of_pages(env: &mut TestEnv, capacity: i64, rest: fn() -> ProxyAction) -> (Proxy, Asked) {
    let name = env.table.clone();
    let asked = Asked::default();
    let scans = Arc::clone(&asked);
    let proxy = through(env, move |request| {
        if is_dynamodb(request, ".DescribeTable") {
            let described = json!({ "Table": {
                "TableName": name, "ItemCount": 1000,
                "KeySchema": [{ "AttributeName": "LockID", "KeyType": "HASH" }],
                "BillingModeSummary": { "BillingMode": if capacity > 0 { "PROVISIONED" } else { "PAY_PER_REQUEST" } },
                "ProvisionedThroughput": { "ReadCapacityUnits": capacity, "WriteCapacityUnits": capacity },
            } });
            return ProxyAction::Answer(Message::answer("200 OK", &described.to_string()));
        }
        if !is_dynamodb(request, ".Scan") {
            return ProxyAction::Pass;
        }
        let mut scans = scans.lock().unwrap();
        scans.push((Instant::now(), serde_json::from_slice(&request.body).unwrap()));
        let goes_on = scans.last().unwrap().1.get("ExclusiveStartKey").is_some();
        if goes_on && !matches!(rest(), ProxyAction::Pass) {
            return rest();
        }
        let mut page = json!({
            "Count": 3, "ScannedCount": 3, "ConsumedCapacity": { "TableName": name, "CapacityUnits": CONSUMED },
            // The other items are digests, which the filter leaves out.
            "Items": [{ "LockID": { "S": "a" }, "Info": { "S": of_anna(A, "a") } }],
        });
        if scans.len() < PAGES {
            page["LastEvaluatedKey"] = json!({ "LockID": { "S": "b-md5" } });
        }
        ProxyAction::Answer(Message::answer("200 OK", &page.to_string()))
    });
    (proxy, asked)
}

/// What each page consumes, in read capacity units.
const CONSUMED: f64 = 2.0;
const PAGES: usize = 4;

/// A scan requests a page only after enough time has passed for the capacity that it has consumed so far.
#[test]
fn a_scan_takes_a_quarter_of_a_provisioned_table_or_what_it_is_told() {
    for (capacity, told, rate) in [(80, None, 20.0), (80, Some("40"), 40.0), (0, Some("10"), 10.0)] {
        let mut env = TestEnv::new(Lock::DynamoDb, "true");
        let (_proxy, asked) = table_of_pages(&mut env, capacity, || ProxyAction::Pass);
        let more = told.map_or_else(Vec::new, |told| vec!["--rate", told]);
        let begun = Instant::now();
        let end = locks(&env, &table(&env, &more));
        assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
        let asked = asked.lock().unwrap();
        assert_eq!(asked.len(), PAGES, "{asked:?}");
        assert!(asked.iter().all(|(_, scan)| scan["TotalSegments"] == 1 && scan["Limit"].is_number()), "{asked:?}");
        #[expect(clippy::cast_possible_truncation, reason = "a rate of this test")]
        let first = rate as i64;
        assert_eq!(asked[0].1["Limit"], first, "{asked:?}");
        // A request is seen here some time after it was sent, one later than the other, so on a busy machine the time
        // between two requests shows nothing. But none can be sent before the time for all earlier ones has passed.
        let mut paid = 0.0;
        for (at, _) in asked.iter() {
            let after = at.duration_since(begun).as_secs_f64();
            assert!(after >= paid, "asked after {after} s, and {paid} s were to be paid at {rate} units a second");
            paid += CONSUMED / rate;
        }
    }
}

#[test]
fn a_scan_that_a_key_stops_shows_what_it_has_and_says_that_it_is_not_all() {
    let mut env = TestEnv::new(Lock::DynamoDb, "true");
    let (proxy, _) = table_of_pages(&mut env, 0, || ProxyAction::Hold);
    let mut command = env.command(env.bin().join("tf"));
    command.arg("locks").args(table(&env, &["--rate", "1000"]));
    let mut terminal = Terminal::start(command);
    proxy.wait_until_held();
    // The progress bar, with its counts.
    terminal.wait_for("3 of about 1000 items, 1 locks, 0 stale");
    terminal.type_in("\x03");
    let status = terminal.wait();
    let screen = terminal.whole_screen();
    assert_eq!(status.signal(), Some(2), "{screen}");
    assert!(screen.contains("stopped after 3 of about 1000 items, so the list is incomplete"), "{screen}");
    assert!(screen.contains(A) && screen.contains("anna@elsewhere"), "{screen}");
    // The same in a script: the output is complete JSON, and says that it is not all.
    let mut command = env.command(env.bin().join("tf"));
    command.arg("locks").args(table(&env, &["--rate", "1000", "--json"]));
    let run = Run::start(command);
    proxy.wait_until_held_times(2);
    kill(run.pid(), Signal::SIGTERM).unwrap();
    let end = run.wait();
    assert_eq!(end.signal(), Some(15), "{}", env.dump(&end));
    assert_fits_the_schema(&env, &end.out);
    let all = parsed(&env, &end);
    assert_eq!(
        (&all["complete"], &all["scanned"], &all["locks"][0]["id"]),
        (&json!(false), &json!(3), &json!(A)),
        "{all}"
    );
}

/// A scan must not take the capacity that terraform itself needs.
#[test]
fn a_scan_asks_what_the_table_can_bear_and_reads_again_what_it_calls_stale() {
    for provisioned in [true, false] {
        let mut env = TestEnv::new(Lock::DynamoDb, "true");
        cloud().dynamodb("DeleteTable", &json!({ "TableName": env.table }));
        let mut table_of_it = json!({
            "TableName": env.table, "BillingMode": "PAY_PER_REQUEST",
            "AttributeDefinitions": [{ "AttributeName": "LockID", "AttributeType": "S" }],
            "KeySchema": [{ "AttributeName": "LockID", "KeyType": "HASH" }],
        });
        if provisioned {
            table_of_it["BillingMode"] = "PROVISIONED".into();
            table_of_it["ProvisionedThroughput"] = json!({ "ReadCapacityUnits": 40, "WriteCapacityUnits": 5 });
        }
        cloud().dynamodb("CreateTable", &table_of_it);
        // A lock of this user on this host that is older than the host's boot.
        let mut info: Value = serde_json::from_str(&lock_json(A, "a")).unwrap();
        info["Created"] = "2020-01-01T00:00:00Z".into();
        cloud().put_item(&env.table, "a", &info.to_string());
        let asked: Arc<Mutex<Vec<(String, Value)>>> = Arc::default();
        let seen = Arc::clone(&asked);
        let _proxy = through(&mut env, move |request| {
            if let Some(target) = request.header("x-amz-target") {
                let operation = target.rsplit('.').next().unwrap_or_default().to_owned();
                seen.lock().unwrap().push((operation, serde_json::from_slice(&request.body).unwrap_or_default()));
            }
            ProxyAction::Pass
        });
        let end = locks(&env, &table(&env, &["--json"]));
        assert_eq!(end.code(), Some(2), "{}", env.dump(&end));
        let asked = asked.lock().unwrap();
        assert_eq!(asked[0].0, "DescribeTable", "{asked:?}");
        let scans: Vec<&Value> = asked.iter().filter(|one| one.0 == "Scan").map(|one| &one.1).collect();
        let segments = if provisioned { 1 } else { 4 };
        assert_eq!(scans.len(), segments, "{asked:?}");
        assert!(scans.iter().all(|scan| scan["TotalSegments"] == segments && scan["ConsistentRead"] != true));
        let again: Vec<&Value> = asked.iter().filter(|one| one.0 == "GetItem").map(|one| &one.1).collect();
        assert!(again.len() == 1 && again[0]["ConsistentRead"] == true && again[0]["Key"]["LockID"]["S"] == "a");
    }
}

/// DynamoDB is asked about each workspace that the bucket lists. A workspace that is locked and has no state yet is not
/// among them.
#[test]
fn a_lock_of_a_workspace_without_a_state_is_seen_in_the_table_and_where_it_is_selected() {
    let mut env = TestEnv::new(Lock::DynamoDb, "true");
    let path = format!("{}/env:/new/dir/prod.tfstate", env.bucket);
    cloud().put_item(&env.table, &path, &of_anna(A, &path));
    assert_eq!(parsed(&env, &locks(&env, &["list", "--json"]))["locks"], json!([]));
    let all = parsed(&env, &locks(&env, &table(&env, &["--json"])));
    assert_eq!(all["locks"][0]["path"], json!(path), "{all}");
    env.set("TF_WORKSPACE", "new");
    assert_eq!(parsed(&env, &locks(&env, &["list", "--json"]))["locks"][0]["id"], json!(A));
}

/// Returns a lease record of the lock `id` that was renewed `age` seconds ago, for a lock of CI.
fn lease_record(id: &str, age: i64) -> Value {
    json!({
        "v": 1, "lock": id, "renewed": jiff::Timestamp::now().as_second() - age, "beat": 7, "keeper": u64::MAX,
        "lease": 300, "fence": "stop", "region": "us-east-1", "tf": "0.2.0",
        "holder": { "user": "runner", "host": "fv-az7", "ci": "GitHub Actions",
            "job": "https://github.com/o/r/actions/runs/1", "attempt": "2", "cloud": "i-0abc" },
    })
}

/// Returns a JSON value as the attribute of an item.
fn attribute(value: &Value) -> Value {
    match value {
        Value::Null => json!({ "NULL": true }),
        Value::Bool(value) => json!({ "BOOL": value }),
        Value::Number(number) => json!({ "N": number.to_string() }),
        Value::String(text) => json!({ "S": text }),
        Value::Array(list) => json!({ "L": list.iter().map(attribute).collect::<Vec<_>>() }),
        Value::Object(map) => {
            json!({ "M": map.iter().map(|(name, value)| (name.clone(), attribute(value))).collect::<serde_json::Map<_, _>>() })
        }
    }
}

/// Returns records that an attacker or a fault may leave, each with the reason why it is not believed. The reason is
/// empty if the record is believed.
fn strange_records() -> Vec<(Value, &'static str)> {
    let with = |change: &dyn Fn(&mut Value)| {
        let mut record = lease_record(A, 40);
        change(&mut record);
        record
    };
    vec![
        (with(&|record| record["holder"]["job"] = "\u{1b}]0;owned\u{7}\u{1b}[2J\n\r\u{202e}evil".into()), ""),
        (with(&|record| record["holder"]["job"] = "x".repeat(3000).into()), "too large"),
        (with(&|record| record["more"] = vec!["x"; 20_000].into()), "too large"),
        (with(&|record| record["renewed"] = "now".into()), "cannot be read"),
        (with(&|record| record["renewed"] = i64::MAX.into()), "cannot be read"),
        (with(&|record| record["holder"] = 7.into()), "cannot be read"),
        (with(&|record| record["fence"] = "steel".into()), "cannot be read"),
        (with(&|record| record["taken"] = true.into()), "cannot be read"),
        (with(&|record| record["lock"] = B.into()), "the ID of another lock"),
        (with(&|record| record["v"] = 2.into()), "a format"),
        (with(&|record| record["lease"] = (10_u64 * 365 * 86_400).into()), "a length that nobody may choose"),
        (lease_record(A, -3600), "renewed in the future"),
        (json!([]), "cannot be read"),
        (json!("text\u{1b}[2J"), "cannot be read"),
        (Value::Null, "cannot be read"),
    ]
}

fn put_leased(env: &TestEnv, path: &str, info: &str, record: &Value) {
    let item = json!({ "LockID": { "S": path }, "Info": { "S": info }, "tf": attribute(record) });
    cloud().dynamodb("PutItem", &json!({ "TableName": env.table, "Item": item }));
}

/// A lock object with a lease: the member `tf` is the last one, as `tf` writes it.
fn with_member(info: &str, record: &str) -> String {
    format!("{},\"tf\":{record}}}", info.strip_suffix('}').unwrap())
}

/// The fresh, the lapsed and the claimed lease of a lock of another host, from the table, the object and a scan.
#[test]
fn a_lease_shows_who_holds_a_lock_and_whether_the_holder_is_alive() {
    for lock in [Lock::DynamoDb, Lock::File] {
        let env = TestEnv::new(lock, "true");
        let info = of_anna(A, &env.path());
        let put = |record: &Value| match lock {
            Lock::File => drop(cloud().s3(
                "PUT",
                &format!("{}.tflock", env.path()),
                with_member(&info, &record.to_string()).as_bytes(),
            )),
            _ => put_leased(&env, &env.path(), &info, record),
        };
        let mut claimed = lease_record(A, 2820);
        claimed["taken"] = json!({ "by": "bert@ci-8", "at": jiff::Timestamp::now().as_second(), "number": 7 });
        let mut fresh = claimed.clone();
        fresh["renewed"] = lease_record(A, 40)["renewed"].clone();
        let mut weak = lease_record(A, 2820);
        weak["fence"] = "none".into();
        let bucket = ["list", "--bucket", &env.bucket, "--region", "us-east-1"];
        let scan = if lock == Lock::File { bucket.to_vec() } else { table(&env, &[]) };
        for (record, state, verdict, code, reason) in [
            (lease_record(A, 40), "fresh", "alive", 0, "by the service's clock"),
            (lease_record(A, 2820), "lapsed", "likely_dead", 2, "its 5 min lease was last renewed 47 min"),
            (weak, "lapsed", "likely_dead", 2, "does not promise to stop terraform in time"),
            (claimed, "claimed", "likely_dead", 2, "bert@ci-8 claimed the lock"),
            (fresh, "claimed", "alive", 0, "the holder stops before its lease lapses"),
        ] {
            put(&record);
            for words in [vec!["list"], scan.clone(), vec!["show"]] {
                let end = locks(&env, &[&words[..], &["--json"]].concat());
                assert_eq!(end.code(), Some(code), "{words:?} {}", env.dump(&end));
                assert_fits_the_schema(&env, &end.out);
                let found = &parsed(&env, &end)["locks"][0];
                assert_eq!((&found["verdict"], &found["lease"]["state"]), (&json!(verdict), &json!(state)), "{found}");
                assert_eq!(found["lease"]["holder"]["job"], record["holder"]["job"]);
                assert!(found["reason"].as_str().unwrap().contains(reason), "{found}");
                let end = locks(&env, &words);
                for fact in ["runner@fv-az7", "https://github.com/o/r/actions/runs/1", "i-0abc", reason] {
                    assert!(end.out.contains(fact), "{words:?} {fact} {}", env.dump(&end));
                }
            }
            let end = locks(&env, &["audit", "--older-than", "2h", "--prometheus"]);
            let lapsed = format!("\ntf_locks_lease_lapsed {}\n", u8::from(code == 2));
            assert!(end.out.contains(&lapsed), "{}", env.dump(&end));
            let end = locks(&env, &["audit", "--older-than", "0s", "--json"]);
            assert_fits(&env, "audit", &end.out);
            let expected = if code == 2 { json!(state) } else { Value::Null };
            assert_eq!(described(&env, &end)["lease"]["state"], expected, "{}", env.dump(&end));
        }
    }
}

/// Returns the first stale lock in the JSON of an audit, or `null`. It is described as `list` describes a lock.
fn described(env: &TestEnv, end: &Ended) -> Value {
    let lock = parsed(env, end)["stale_locks"][0].clone();
    if !lock.is_null() {
        let listed = parsed(env, &locks(env, &["list", "--json"]))["locks"][0].clone();
        for member in ["id", "path", "who", "verdict", "reason", "lease"] {
            // What says for how long a lease has lapsed changes with time.
            let without_digits = |value: &Value| value.to_string().replace(|one: char| one.is_ascii_digit(), "");
            assert_eq!(without_digits(&lock[member]), without_digits(&listed[member]), "{member}");
        }
    }
    lock
}

/// A record that `tf` cannot have written changes no verdict, shows its reason, and does nothing to a terminal.
#[test]
fn a_lease_that_is_not_believed_is_shown_harmlessly() {
    let env = TestEnv::new(Lock::Both, "true");
    let info = of_anna(A, &env.path());
    let object = format!("{}.tflock", env.path());
    let mut texts: Vec<(String, &str)> =
        strange_records().into_iter().map(|(record, reason)| (record.to_string(), reason)).collect();
    let good = lease_record(A, 40).to_string();
    texts.push((good.replacen('{', "{\"renewed\":1,", 1), "cannot be read"));
    texts.push((format!("{good},\"tf\":{good}"), "cannot be read"));
    let items = strange_records().into_iter().map(|(record, reason)| (Err(record), reason));
    for (record, reason) in items.chain(texts.into_iter().map(|(text, reason)| (Ok(text), reason))) {
        cloud().delete_item(&env.table, &env.path());
        cloud().s3("DELETE", &object, b"");
        match &record {
            Err(record) => put_leased(&env, &env.path(), &info, record),
            Ok(text) => drop(cloud().s3("PUT", &object, with_member(&info, text).as_bytes())),
        }
        let end = locks(&env, &["list", "--json"]);
        assert_eq!(end.code(), Some(0), "{record:?} {}", env.dump(&end));
        assert_fits_the_schema(&env, &end.out);
        let found = &parsed(&env, &end)["locks"][0];
        let (state, verdict) = if reason.is_empty() { ("fresh", "alive") } else { ("not_believed", "unknown") };
        assert_eq!(
            (&found["lease"]["state"], &found["verdict"]),
            (&json!(state), &json!(verdict)),
            "{record:?} {found}"
        );
        assert!(found["lease"]["reason"].as_str().unwrap_or_default().contains(reason), "{record:?} {found}");
        for words in [&["list"][..], &["show"]] {
            let end = locks(&env, words);
            assert_eq!(end.code(), Some(0), "{words:?} {}", env.dump(&end));
            assert!(end.out.contains(reason) && end.out.len() < 8192, "{words:?} {}", env.dump(&end));
            let strange = |one: char| !matches!(one, '\n' | '…') && !(' '..='~').contains(&one);
            assert!(!end.out.contains(strange), "{words:?} {:?}", end.out);
        }
    }
}

/// After a refusal, the lines below terraform's error say who holds the lock by its lease, and what to type.
#[test]
fn a_refused_run_says_who_holds_the_lock_by_its_lease() {
    let mut env = TestEnv::new(Lock::DynamoDb, "true");
    // A run with a lease of its own would take over the lock whose lease has lapsed.
    env.set("TFW_LEASE", "off");
    for (age, expected) in [
        (40, ["the holder is alive: its lease was renewed", "wait until that run is over"]),
        (2820, ["the holder is likely dead: its 5 min lease was last renewed 47 min", "tf locks release"]),
    ] {
        put_leased(&env, &env.path(), &of_anna(A, &env.path()), &lease_record(A, age));
        let end = env.run(Subject::Tf, &["plan", "-no-color"]);
        assert_eq!(end.code(), Some(1), "{}", env.dump(&end));
        let (_, ours) = end.err.split_once("tf: the lock is held by anna@elsewhere").unwrap();
        assert!(ours.contains("tf: lease of 5 min, renewed"), "{}", env.dump(&end));
        for fact in ["runner@fv-az7", "https://github.com/o/r/actions/runs/1", expected[0], expected[1]] {
            assert!(ours.contains(fact), "{fact} {}", env.dump(&end));
        }
    }
}
