//! A table of any size is listed completely, in order and in constant memory, and a scan that fails says so.
//!
//! The table is generated page by page, because no server that the tests install is filled with 200,000 items in a
//! reasonable time.

use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::given_back::{is_dynamodb, through};
use super::locks_list::assert_fits;
use super::locks_release::locks;
use crate::support::cloud::tool;
use crate::support::http::Message;
use crate::support::process::Run;
use crate::support::proxy::{Proxy, ProxyAction};
use crate::support::{Ended, Lock, TestEnv, wait_for};

/// How many items a page has.
const PAGE: usize = 1000;

/// Every so many items is a lock. The others are digests, which the filter of `tf` leaves out.
pub(super) const ITEMS_FOR_A_LOCK: usize = 20;

/// Tables of `items` items, under whatever name. From the item `fails_at` on, a page is refused, with an error that no
/// retry resolves.
#[derive(Clone, Copy)]
pub(super) struct Generated {
    items: usize,
    fails_at: usize,
}

impl Generated {
    pub(super) fn new(items: usize) -> Self {
        Self { items, fails_at: usize::MAX }
    }

    /// Answers the requests of `tf` for tables. Each segment of a scan is a range of the items.
    pub(super) fn serve(self, env: &mut TestEnv) -> Proxy {
        self.serve_after(env, |_| true)
    }

    /// As [`Self::serve`]. Before a page is sent, `wait` is called with the number of its segment. If it returns false,
    /// the page is refused.
    fn serve_after(self, env: &mut TestEnv, wait: impl Fn(usize) -> bool + Send + Sync + 'static) -> Proxy {
        let lock_item = lock_item(&(jiff::Timestamp::now() - jiff::SignedDuration::from_hours(1)).to_string());
        through(env, move |request| {
            let asked: Value = serde_json::from_slice(&request.body).unwrap_or_default();
            if is_dynamodb(request, ".DescribeTable") {
                return ProxyAction::Answer(Message::answer("200 OK", &self.description(&asked).to_string()));
            }
            if !is_dynamodb(request, ".Scan") {
                return ProxyAction::Pass;
            }
            let number = |value: &Value| usize::try_from(value.as_u64().unwrap_or_default()).unwrap();
            let (segment, segments) = (number(&asked["Segment"]), number(&asked["TotalSegments"]));
            let after = asked["ExclusiveStartKey"]["LockID"]["S"].as_str().map(|key| key.parse::<usize>().unwrap());
            let begin = after.map_or(self.items * segment / segments, |after| after + 1);
            let end = self.items * (segment + 1) / segments;
            if !wait(segment) || begin >= self.fails_at {
                let refused = r#"{"__type":"com.amazon.coral.validate#ValidationException","message":"no more"}"#;
                return ProxyAction::Answer(Message::answer("400 Bad Request", refused));
            }
            ProxyAction::Answer(Message::answer("200 OK", &page(begin, end, &lock_item)))
        })
    }

    fn description(self, asked: &Value) -> Value {
        json!({ "Table": {
            "TableName": asked["TableName"], "ItemCount": self.items,
            "KeySchema": [{ "AttributeName": "LockID", "KeyType": "HASH" }],
            "ProvisionedThroughput": { "ReadCapacityUnits": 0, "WriteCapacityUnits": 0 },
        } })
    }

    /// Returns the IDs of the locks: the first page of each segment, then the second page of each, and so on.
    fn ids(self, segments: usize) -> Vec<String> {
        let pages = |segment: usize| {
            let (begin, end) = (self.items * segment / segments, self.items * (segment + 1) / segments);
            (begin..end).step_by(PAGE).enumerate().map(move |(turn, first)| (turn, first..end.min(first + PAGE)))
        };
        let mut pages: Vec<_> = (0..segments).flat_map(pages).collect();
        pages.sort_by_key(|(turn, _)| *turn);
        let locks = pages.into_iter().flat_map(|(_, page)| page).filter(|number| number % ITEMS_FOR_A_LOCK == 0);
        locks.map(|number| id(&format!("{number:08}"))).collect()
    }
}

fn id(number: &str) -> String {
    format!("{number}-1111-2222-3333-444444444444")
}

/// Returns an item with a lock that has long texts, so that an output that is kept in memory is large. In the place of
/// its number is `NUMBER`.
fn lock_item(created: &str) -> String {
    let path = format!("bucket/env:/{}/NUMBER/{}", "w".repeat(90), "p".repeat(90));
    let info = json!({ "ID": id("NUMBER"), "Operation": "o".repeat(190), "Info": "", "Version": "1.11.4",
        "Who": format!("{}@elsewhere", "u".repeat(180)), "Created": created, "Path": path });
    json!({ "LockID": { "S": path }, "Info": { "S": info.to_string() } }).to_string()
}

/// Returns the page that begins with the item `begin`, of a segment that ends before the item `end`.
fn page(begin: usize, end: usize, lock_item: &str) -> String {
    let last = end.min(begin + PAGE);
    let locks = (begin..last).filter(|number| number % ITEMS_FOR_A_LOCK == 0);
    let items: Vec<String> = locks.map(|number| lock_item.replace("NUMBER", &format!("{number:08}"))).collect();
    let next =
        if last < end { format!(r#","LastEvaluatedKey":{{"LockID":{{"S":"{}"}}}}"#, last - 1) } else { String::new() };
    let (count, scanned) = (items.len(), last - begin);
    format!(r#"{{"Count":{count},"ScannedCount":{scanned},"Items":[{}]{next}}}"#, items.join(","))
}

/// Starts a command with its output on a terminal or in a pipe, reads all of it, and prints the peak of the command's
/// memory in KiB, its exit code and how many lines it has written.
const MEASURE: &str = r#"
import os, pty, subprocess, sys
ours, its = pty.openpty() if sys.argv[1] == "terminal" else os.pipe()
process = subprocess.Popen(sys.argv[2:], stdin=subprocess.DEVNULL, stdout=its)
os.close(its)
lines = 0
try:
    while piece := os.read(ours, 1 << 16):
        lines += piece.count(b"\n")
except OSError:  # the end of a terminal
    pass
_, status, used = os.wait4(process.pid, 0)
print(used.ru_maxrss, os.waitstatus_to_exitcode(status), lines)
"#;

/// Returns the peak of the memory of `tf locks WORDS`, in KiB, and how many lines it has written.
fn peak(env: &TestEnv, stdout: &str, words: &[&str]) -> (u64, u64) {
    let mut python = env.command(tool("python3"));
    python.args(["-c", MEASURE, stdout, "tf", "locks"]).args(words);
    let end = Run::start(python).wait();
    let numbers: Vec<u64> = end.out.split_whitespace().filter_map(|number| number.parse().ok()).collect();
    match numbers[..] {
        [peak, 0, lines] => (peak, lines),
        _ => panic!("{words:?} {}", env.dump(&end)),
    }
}

/// Runs `tf locks WORDS` with a table of 20,000 items and with one of 200,000, and compares the peaks of its memory.
fn needs_the_same_memory(stdout: &str, words: &[&str]) {
    let measured = |items: usize| {
        let mut env = TestEnv::new(Lock::DynamoDb, "true");
        let _proxy = Generated::new(items).serve(&mut env);
        peak(&env, stdout, &[words, &["--region", "us-east-1"]].concat())
    };
    let ((small, few), (large, many)) = (measured(20_000), measured(200_000));
    // 9,000 more locks are at least 7 MB of text.
    assert!(large < small + 5_000, "{words:?}: {small} KiB, {large} KiB");
    let is_list = words[0] == "list";
    assert!(!is_list || (few >= 1_000 && many >= 10_000), "{words:?}: {few} and {many} lines");
}

#[test]
fn a_list_needs_the_same_memory_however_large_the_table_is() {
    needs_the_same_memory("pipe", &["list", "--table", "t"]);
}

#[test]
fn json_needs_the_same_memory_however_large_the_table_is() {
    needs_the_same_memory("pipe", &["list", "--table", "t", "--json"]);
    needs_the_same_memory("pipe", &["list", "--table", "t", "--table", "t2", "--json"]);
}

#[test]
fn an_audit_needs_the_same_memory_however_large_the_table_is() {
    for more in [&[][..], &["--json"], &["--prometheus"], &["--table", "t2"]] {
        needs_the_same_memory("pipe", &[&["audit", "--older-than", "1000d", "--table", "t"], more].concat());
    }
}

/// The number of segments in which `tf` reads a table without a limit.
const SEGMENTS: usize = 4;

/// Segments are read at the same time, and take turns. Two of these have one page more than the others.
#[test]
fn every_lock_of_a_large_table_is_listed_once_and_in_order() {
    let mut env = TestEnv::new(Lock::DynamoDb, "true");
    let table = Generated::new(5 * PAGE * SEGMENTS + 2);
    let _proxy = table.serve(&mut env);
    // The root of a container may be read-only.
    env.set("TMPDIR", "/nonexistent");
    let words = ["list", "--table", "t", "--region", "us-east-1"];
    let end = locks(&env, &[&words[..], &["--json"]].concat());
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    assert_fits(&env, "locks", &end.out);
    let all: Value = serde_json::from_str(&end.out).unwrap();
    assert_eq!((&all["complete"], &all["scanned"]), (&json!(true), &json!(table.items)));
    assert_eq!(ids(&all), table.ids(SEGMENTS));
    let end = locks(&env, &words);
    assert_eq!((end.code(), of_lines(&end)), (Some(0), table.ids(SEGMENTS)), "{}", env.dump(&end));
}

/// Or `tf` would have to store what the other segments contain.
#[test]
fn the_other_segments_wait_for_a_slow_one() {
    let mut env = TestEnv::new(Lock::DynamoDb, "true");
    let table = Generated::new(20_000);
    let asked = Counts::default();
    let (counts, at_the_end_of_the_wait) = (Arc::clone(&asked), Arc::new(Mutex::new(Vec::new())));
    let seen = Arc::clone(&at_the_end_of_the_wait);
    let _proxy = table.serve_after(&mut env, move |segment| {
        let is_first = counts[segment].fetch_add(1, Ordering::SeqCst) == 0;
        if segment == 0 && is_first {
            two_pages_of_the_others(&counts);
            // For a third one, which must not come.
            std::thread::sleep(Duration::from_millis(300));
            *seen.lock().unwrap() = of_the_others(&counts);
        }
        true
    });
    let end = locks(&env, &["list", "--table", "t", "--region", "us-east-1"]);
    assert_eq!((end.code(), of_lines(&end)), (Some(0), table.ids(SEGMENTS)), "{}", env.dump(&end));
    // One waits to be shown, and one waits for that.
    assert_eq!(*at_the_end_of_the_wait.lock().unwrap(), [2; SEGMENTS - 1]);
}

type Counts = Arc<[AtomicUsize; SEGMENTS]>;

/// Returns how many pages of each other segment than the first were asked for.
fn of_the_others(counts: &Counts) -> Vec<usize> {
    counts[1..].iter().map(|count| count.load(Ordering::SeqCst)).collect()
}

/// Waits until two pages of each other segment than the first were asked for, so that the first one was read.
fn two_pages_of_the_others(counts: &Counts) {
    let two_each = || of_the_others(counts).iter().all(|pages| *pages >= 2).then_some(());
    wait_for("two pages of each other segment", two_each, || format!("{:?}", of_the_others(counts)));
}

/// The first page of the first segment is refused or does not come.
#[test]
fn what_the_other_segments_have_read_is_shown_if_one_fails_or_the_scan_is_stopped() {
    let table = Generated::new(20_000);
    // The first page of each other segment.
    let read: Vec<_> =
        table.ids(SEGMENTS).into_iter().skip(PAGE / ITEMS_FOR_A_LOCK).take(3 * PAGE / ITEMS_FOR_A_LOCK).collect();
    for is_stopped in [false, true] {
        let mut env = TestEnv::new(Lock::DynamoDb, "true");
        let (counts, is_over) = (Counts::default(), Arc::new(AtomicBool::new(false)));
        let (asked, over) = (Arc::clone(&counts), Arc::clone(&is_over));
        let _proxy = table.serve_after(&mut env, move |segment| {
            asked[segment].fetch_add(1, Ordering::SeqCst);
            if segment == 0 {
                two_pages_of_the_others(&asked);
                while is_stopped && !over.load(Ordering::SeqCst) {
                    std::thread::sleep(Duration::from_millis(5));
                }
            }
            segment != 0
        });
        let mut command = env.command(env.bin().join("tf"));
        command.args(["locks", "list", "--table", "t", "--region", "us-east-1"]);
        let run = Run::start(command);
        two_pages_of_the_others(&counts);
        if is_stopped {
            run.send(Signal::SIGINT);
        }
        let end = run.wait();
        is_over.store(true, Ordering::SeqCst);
        assert!(of_lines(&end).starts_with(&read), "{}", env.dump(&end));
        let (how, end_code) = if is_stopped { ("stopped", None) } else { ("failed", Some(1)) };
        assert_eq!(end.code(), end_code, "{}", env.dump(&end));
        let shown = of_lines(&end).len() * ITEMS_FOR_A_LOCK;
        let expected = format!("{how} after {shown} of about 20000 items, so the list is incomplete");
        assert!(end.err.contains(&expected), "{expected}: {}", env.dump(&end));
    }
}

/// A terminal over a slow network, for example. A scan that is stopped shows at most two more pages of each segment, and
/// reads no more.
#[test]
fn a_scan_that_is_stopped_ends_although_its_reader_is_slow() {
    const PAGES: usize = 400;
    let mut env = TestEnv::new(Lock::DynamoDb, "true");
    let _proxy = Generated::new(PAGES * PAGE).serve(&mut env);
    let (mut reader, writer) = std::io::pipe().unwrap();
    let mut command = env.command(env.bin().join("tf"));
    command.args(["locks", "list", "--table", "t", "--region", "us-east-1"]).stdout(writer);
    let mut process = command.stderr(std::process::Stdio::null()).spawn().unwrap();
    drop(command);
    let (mut piece, mut lines, mut stopped_at) = ([0; 4096], 0, None);
    loop {
        let length = reader.read(&mut piece).unwrap();
        if length == 0 {
            break;
        }
        lines += String::from_utf8_lossy(&piece[..length]).matches('\n').count();
        if lines > PAGE / ITEMS_FOR_A_LOCK && stopped_at.is_none() {
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(process.id().cast_signed()), Signal::SIGINT).unwrap();
            stopped_at = Some(lines);
        }
        // The reader is slower than a scan.
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(process.wait().unwrap().signal(), Some(Signal::SIGINT as i32));
    // Those of the page that is shown, of two pages of each segment, and of a full pipe: a line has at least 400 bytes.
    let most = stopped_at.unwrap() + (1 + 2 * SEGMENTS) * PAGE / ITEMS_FOR_A_LOCK + (1 << 16) / 400;
    assert!(lines <= most, "{lines} lines, {stopped_at:?} at the signal");
}

fn ids(all: &Value) -> Vec<String> {
    all["locks"].as_array().unwrap().iter().map(|lock| lock["id"].as_str().unwrap().to_owned()).collect()
}

/// Returns the IDs in a list that was written to a pipe.
fn of_lines(end: &Ended) -> Vec<String> {
    let id =
        |line: &str| line.split("  ").map(str::trim).find(|field| field.ends_with("-444444444444")).map(str::to_owned);
    end.out.lines().map(|line| id(line).unwrap_or_else(|| panic!("{line}"))).collect()
}

/// The pages that were read are shown. JSON is complete as JSON, and says that the list is not.
#[test]
fn a_scan_that_fails_half_way_shows_what_it_has_and_says_that_it_is_not_all() {
    let mut env = TestEnv::new(Lock::DynamoDb, "true");
    let _proxy = Generated { fails_at: 3 * PAGE, ..Generated::new(20_000) }.serve(&mut env);
    let read = Generated::new(3 * PAGE).ids(1);
    // With a rate, the table is read in one segment.
    let words = ["list", "--table", "t", "--region", "us-east-1", "--rate", "1000000"];
    let end = locks(&env, &words);
    assert_eq!((end.code(), of_lines(&end)), (Some(1), read.clone()), "{}", env.dump(&end));
    for expected in ["failed after 3000 of about 20000 items, so the list is incomplete", "no more"] {
        assert!(end.err.contains(expected), "{expected}: {}", end.err);
    }
    let end = locks(&env, &[&words[..], &["--json"]].concat());
    assert_eq!(end.code(), Some(1), "{}", env.dump(&end));
    assert!(end.err.contains("no more"), "{}", end.err);
    assert_fits(&env, "locks", &end.out);
    let all: Value = serde_json::from_str(&end.out).unwrap();
    assert_eq!((&all["complete"], &all["scanned"], ids(&all)), (&json!(false), &json!(3000), read.clone()));
    // One of several targets: the locks of the others follow.
    let end = locks(&env, &[&words[..], &["--json", "--table", "t2"]].concat());
    assert_eq!(end.code(), Some(1), "{}", env.dump(&end));
    assert_fits(&env, "locks", &end.out);
    let all: Value = serde_json::from_str(&end.out).unwrap();
    assert_eq!(ids(&all), [read.clone(), read].concat());
    let counts: Vec<_> = all["targets"].as_array().unwrap().iter().map(|one| &one["scanned"]).collect();
    assert_eq!((counts, &all["complete"]), (vec![&json!(3000); 2], &json!(false)));
}
