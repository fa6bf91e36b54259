//! The commands for `TFW_ON_EVENT` in `examples/`, with a stand-in for the service. `examples/check` checks the forms
//! of their messages.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::locks_release::locks;
use crate::support::http::Message;
use crate::support::process::Run;
use crate::support::proxy::{Proxy, ProxyAction};
use crate::support::test_env::{id_of, lock_json, which};
use crate::support::{Lock, TestEnv, system, wait_for};

/// Each command, and the variable with its URL.
const EXAMPLES: [(&str, &str); 3] =
    [("notify-slack", "NOTIFY_SLACK_URL"), ("notify-teams", "NOTIFY_TEAMS_URL"), ("notify-webhook", "NOTIFY_URL")];

fn example(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples").join(name)
}

fn can_run() -> bool {
    which("jq").is_some() && which("curl").is_some()
}

/// Returns the command lines of all processes, as `ps` shows them.
fn command_lines() -> String {
    system::pids().into_iter().map(|pid| system::arguments(pid) + "\n").collect()
}

/// The posts that arrived, and the command lines at that moment.
type Posts = Arc<Mutex<Vec<(Message, String)>>>;

#[test]
fn each_example_delivers_an_event_at_the_second_try_and_shows_its_secret_to_nobody() {
    if !can_run() {
        return;
    }
    for (name, variable) in EXAMPLES {
        let mut env = TestEnv::new(Lock::DynamoDb, "true");
        let posts = Posts::default();
        let service_has = Arc::clone(&posts);
        let service = Proxy::start(0, move |request| {
            let mut posts = service_has.lock().unwrap();
            posts.push((request.clone(), command_lines()));
            let status = if posts.len() == 1 { "503 Service Unavailable" } else { "200 OK" };
            ProxyAction::Answer(Message::answer(status, "ok"))
        });
        let secret = format!("secret-of-{name}-{}", std::process::id());
        // Neither ends the value, and the braces do not stand for two URLs.
        let (token, path) = (format!("token-\"\\n{secret}"), format!("/{secret}?filter[a]={{b,c}}"));
        env.set("TFW_ON_EVENT", example(name)).set("NOTIFY_TOKEN", &token);
        env.set(variable, format!("http://127.0.0.1:{}{path}", service.port));
        let mut info: Value =
            serde_json::from_str(&lock_json("44444444-3333-4444-5555-666666666666", &env.path())).unwrap();
        info["Who"] = format!("<!channel> & \"\u{202e}{}", "w".repeat(40_000)).into();
        let text = info.to_string();
        env.put_lock(&text);
        let forced = locks(&env, &["release", "--force", &id_of(&text), "--reason", "it's $HOME \\ \"hers\""]);
        assert_eq!(forced.code(), Some(0), "{}", env.dump(&forced));
        let second = || posts.lock().unwrap().get(1).cloned();
        let (post, _) = wait_for("a second post", second, || format!("{:?} {}", posts.lock().unwrap(), env.trace()));
        assert_eq!(post.start, format!("POST {path} HTTP/1.1"));
        assert_eq!(post.header("content-type"), Some("application/json"));
        for (other, lines) in &*posts.lock().unwrap() {
            assert_eq!(other.body, post.body);
            assert!(lines.contains("curl") && !lines.contains(&secret), "{lines}");
        }
        let body: Value = serde_json::from_slice(&post.body).unwrap();
        match name {
            "notify-slack" => {
                let blocks = &body["blocks"];
                let title = "State lock deleted by force";
                assert_eq!(body["text"], format!("{title}: {}", env.path()));
                assert_eq!(
                    (&blocks[0]["type"], &blocks[0]["text"]["text"]),
                    (&"header".into(), &title.into()),
                    "{body}"
                );
                let fields = blocks[1]["fields"].as_array().unwrap();
                let holder =
                    fields.iter().find(|field| field["text"].as_str().unwrap().starts_with("held by: ")).unwrap();
                // In plain text, Slack notifies nobody.
                assert_eq!(holder["type"], "plain_text");
                let holder = holder["text"].as_str().unwrap();
                assert!(holder.starts_with("held by: <!channel> & \"?www") && holder.len() == 300, "{holder}");
                let reason = "reason: it's $HOME \\ \"hers\"";
                assert!(fields.iter().any(|field| field["text"] == reason), "{body}");
            }
            "notify-teams" => {
                let card = &body["attachments"][0]["content"];
                assert_eq!((&body["type"], &card["type"]), (&"message".into(), &"AdaptiveCard".into()), "{body}");
                let values = card["body"].as_array().unwrap().iter().skip(1);
                // Teams interprets Markdown in every other kind of element.
                let runs: Vec<_> = values
                    .map(|one| {
                        assert_eq!(one["type"], "RichTextBlock");
                        (one["inlines"][0]["text"].as_str().unwrap(), one["inlines"][1]["text"].as_str().unwrap())
                    })
                    .collect();
                assert!(runs.contains(&("path: ", env.path().as_str())), "{runs:?}");
                assert!(runs.contains(&("reason: ", "it's $HOME \\ \"hers\"")), "{runs:?}");
            }
            _ => {
                assert_eq!(post.header("authorization"), Some(format!("Bearer {token}").as_str()));
                let history: Value = serde_json::from_str(&locks(&env, &["history", "--json"]).out).unwrap();
                assert_eq!(body, history["events"][0]);
            }
        }
    }
}

/// Returns a service that answers every request, and the posts that it got.
fn service() -> (Posts, Proxy) {
    let posts = Posts::default();
    let service_has = Arc::clone(&posts);
    let service = Proxy::start(0, move |request| {
        service_has.lock().unwrap().push((request.clone(), String::new()));
        ProxyAction::Answer(Message::answer("200 OK", "ok"))
    });
    (posts, service)
}

#[test]
fn an_example_sends_nothing_with_a_secret_of_several_lines() {
    if !can_run() {
        return;
    }
    let (posts, service) = service();
    let url = format!("http://127.0.0.1:{}/", service.port);
    for (name, variable) in EXAMPLES.into_iter().chain([("notify-webhook", "NOTIFY_TOKEN")]) {
        for ending in ["\nurl = \"file:///etc/passwd\"", "\n", "\r", "\rX: y"] {
            let mut env = TestEnv::empty(Lock::DynamoDb);
            env.set("NOTIFY_URL", &url).set(variable, format!("{url}{ending}"));
            env.write("event", EVENT);
            let end = env.run_in_shell(&format!("exec {} <event", example(name).display()));
            assert_eq!(end.code(), Some(1), "{ending:?} {}", env.dump(&end));
            assert_eq!(end.err, format!("{name}: {variable} contains a line break\n"), "{ending:?}");
        }
    }
    assert_eq!(posts.lock().unwrap().len(), 0);
}

/// docs/notifications.md says how to try a command. Without an event, `jq` prints `null`.
#[test]
fn the_documented_command_posts_the_last_event_and_says_if_there_is_none() {
    if !can_run() {
        return;
    }
    let document = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/notifications.md")).unwrap();
    let line = document.lines().find(|line| line.trim_start().starts_with("tf locks history")).unwrap();
    let (posts, service) = service();
    for (name, variable) in EXAMPLES {
        let mut env = TestEnv::new(Lock::DynamoDb, "true");
        env.set(variable, format!("http://127.0.0.1:{}/", service.port));
        let directory = example("");
        let typed = line.replace("/usr/local/libexec/", directory.to_str().unwrap()).replace("notify-slack", name);
        let none = env.run_in_shell(&typed);
        assert_eq!(none.code(), Some(1), "{}", env.dump(&none));
        assert_eq!(none.err, format!("{name}: there is no event on stdin\n"));
        assert_eq!(posts.lock().unwrap().len(), 0);
        let text = lock_json("44444444-3333-4444-5555-666666666666", &env.path());
        env.put_lock(&text);
        assert_eq!(locks(&env, &["release", "--force", &id_of(&text)]).code(), Some(0));
        let end = env.run_in_shell(&typed);
        assert_eq!((end.code(), end.err.as_str()), (Some(0), ""), "{}", env.dump(&end));
        let posts: Vec<_> = posts.lock().unwrap().drain(..).collect();
        let [(post, _)] = &posts[..] else { panic!("{posts:?}") };
        assert!(String::from_utf8_lossy(&post.body).contains(&env.path()), "{post:?}");
    }
}

const EVENT: &str = r#"{"event":"released","by":"tf","who":"a@b","path":"b/k","id":"5e75","why":"x"}"#;

/// Starts a command with an event and this URL.
fn start_example(env: &TestEnv, (name, variable): (&str, &str), url: &str) -> Run {
    let mut shell = env.command("sh");
    shell.args(["-c", &format!("printf '%s\\n' \"$EVENT\" | {}", example(name).display())]).env("EVENT", EVENT);
    shell.env(variable, url).env("NOTIFY_TOKEN", "token-of-a-secret");
    Run::start(shell)
}

/// After 30 s, `tf` kills the command. A receiver that has been restarted in the meantime would not notice that.
#[test]
fn an_example_whose_receiver_is_gone_gives_up_in_time() {
    if !can_run() {
        return;
    }
    let env = TestEnv::empty(Lock::DynamoDb);
    let begun = Instant::now();
    // Nothing listens there (RFC 863), and no server of another test gets this port.
    let runs = EXAMPLES.map(|of| start_example(&env, of, "http://127.0.0.1:9/secret"));
    for run in runs {
        let end = run.wait();
        assert_eq!(end.code(), Some(7), "{}", env.dump(&end));
        assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
        assert!(!format!("{}{}", end.out, end.err).contains("secret"), "{}", env.dump(&end));
    }
}

/// Each pause between two tries is twice as long as the one before it: 1, 2, 4 and 8 s. A status that says that the
/// message is wrong is not tried again.
#[test]
fn an_example_tries_five_times_at_growing_distances_and_then_says_why_it_failed() {
    if !can_run() {
        return;
    }
    let env = TestEnv::empty(Lock::DynamoDb);
    let runs: Vec<_> = ["503 Service Unavailable", "429 Too Many Requests", "400 Bad Request", "404 Not Found"]
        .into_iter()
        .flat_map(|status| EXAMPLES.map(|of| (status, of)))
        .map(|(status, of)| {
            let posts = Arc::<Mutex<Vec<(Instant, Vec<u8>, String)>>>::default();
            let service_has = Arc::clone(&posts);
            let service = Proxy::start(0, move |request| {
                service_has.lock().unwrap().push((Instant::now(), request.body.clone(), command_lines()));
                ProxyAction::Answer(Message::answer(status, "no"))
            });
            let run = start_example(&env, of, &format!("http://127.0.0.1:{}/secret-of-the-url", service.port));
            (status, posts, service, run)
        })
        .collect();
    for (status, posts, _service, run) in runs {
        let end = run.wait();
        let code = &status[..3];
        let message = format!("The requested URL returned error: {code}");
        assert!(end.code() == Some(22) && end.err.contains(&message), "{}", env.dump(&end));
        let posts = posts.lock().unwrap();
        let pauses: Vec<u64> = posts.windows(2).map(|two| (two[1].0 - two[0].0).as_secs()).collect();
        let expected = if ["503", "429"].contains(&code) { &[1, 2, 4, 8][..] } else { &[] };
        assert_eq!(pauses.len(), expected.len(), "{pauses:?} {}", env.dump(&end));
        // The machine may be busy, so a pause may be longer.
        assert!(pauses.iter().zip(expected).all(|(pause, least)| pause >= least), "{pauses:?}");
        assert!(posts.iter().all(|(_, body, lines)| *body == posts[0].1 && lines.contains("curl")), "{posts:?}");
        for text in posts.iter().map(|(.., lines)| lines).chain([&end.out, &end.err]) {
            assert!(!text.contains("secret-of-the-url") && !text.contains("token-of-a-secret"), "{text}");
        }
    }
}

/// The path of an event is also in `text` of a message for Slack, which is not plain text. There, Slack reads a mention
/// only after `<`, and a link after `<` or in a URL.
#[test]
fn untrusted_text_is_where_a_chat_reads_no_mention_and_no_link() {
    if !can_run() {
        return;
    }
    let (posts, service) = service();
    let mut env = TestEnv::empty(Lock::DynamoDb);
    let untrusted = "b/<!channel> <https://evil.example|log in> [log in](https://evil.example) <at>a</at> &lt;";
    let mut event: Value = serde_json::from_str(EVENT).unwrap();
    for name in ["path", "holder", "operation", "created", "id", "who", "reason", "time", "why"] {
        event[name] = untrusted.into();
    }
    env.write("event", &event.to_string());
    for (name, variable) in &EXAMPLES[..2] {
        env.set(variable, format!("http://127.0.0.1:{}/", service.port));
        let end = env.run_in_shell(&format!("exec {} <event", example(name).display()));
        assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
        let body: Value = serde_json::from_slice(&posts.lock().unwrap().pop().unwrap().0.body).unwrap();
        let mut texts = Vec::new();
        texts_of(&body, &mut texts);
        let untrusted_texts: Vec<_> = texts.iter().filter(|(_, text)| text.contains("channel")).collect();
        assert_eq!(untrusted_texts.len(), 9, "{body}");
        for (kind, text) in untrusted_texts {
            match kind.as_str() {
                "plain_text" | "TextRun" => {}
                // `text` of a message for Slack.
                "" => {
                    assert!(!text.contains(['<', '>']) && text.contains("&lt;!channel&gt;"), "{text}");
                    assert!(!text.contains("://") && text.contains("https: //evil.example"), "{text}");
                }
                _ => panic!("{kind}: {text}"),
            }
        }
    }
}

/// Appends each member named `text`, together with the `type` of its object.
fn texts_of(value: &Value, found: &mut Vec<(String, String)>) {
    match value {
        Value::Object(members) => {
            if let Some(text) = members.get("text").and_then(Value::as_str) {
                let kind = members.get("type").and_then(Value::as_str).unwrap_or_default();
                found.push((kind.to_owned(), text.to_owned()));
            }
            members.values().for_each(|member| texts_of(member, found));
        }
        Value::Array(items) => items.iter().for_each(|item| texts_of(item, found)),
        _ => {}
    }
}

/// `curl --fail` exits with 0 after a redirect that it does not follow. If it follows one, it sends a GET without the
/// event. The URL in `Location` may be as secret as the first one.
#[test]
fn an_example_whose_receiver_redirects_says_that_the_event_was_not_delivered() {
    if !can_run() {
        return;
    }
    for of_user in ["", "location\n"] {
        let mut env = TestEnv::empty(Lock::DynamoDb);
        env.write(".curlrc", of_user);
        let home = env.directory.clone();
        env.set("CURL_HOME", home);
        for status in
            ["301 Moved Permanently", "302 Found", "304 Not Modified", "307 Temporary Redirect", "202 Accepted"]
        {
            for (name, variable) in EXAMPLES {
                let requests = Arc::<Mutex<Vec<String>>>::default();
                let service_has = Arc::clone(&requests);
                let service = Proxy::start(0, move |request| {
                    let mut requests = service_has.lock().unwrap();
                    requests.push(request.start.clone());
                    let mut answer = Message::answer(if requests.len() == 1 { status } else { "200 OK" }, "");
                    answer.headers.push(("location".into(), "/secret-of-the-redirect".into()));
                    ProxyAction::Answer(answer)
                });
                let url = format!("http://127.0.0.1:{}/secret", service.port);
                let end = start_example(&env, (name, variable), &url).wait();
                let code = &status[..3];
                let expected = if code == "202" {
                    (Some(0), String::new())
                } else {
                    let reason = format!("the receiver answered with status {code}");
                    (Some(1), format!("{name}: the event was not delivered: {reason}\n"))
                };
                assert_eq!((end.code(), end.err.clone()), expected, "{of_user:?} {}", env.dump(&end));
                assert_eq!(end.out, "");
                assert_eq!(*requests.lock().unwrap(), ["POST /secret HTTP/1.1"]);
            }
        }
    }
}

#[test]
fn an_example_without_its_url_says_which_variable_is_missing() {
    if !can_run() {
        return;
    }
    let env = TestEnv::empty(Lock::DynamoDb);
    for (name, variable) in EXAMPLES {
        let end = env.run_in_shell(&format!("echo '{{}}' | {}", example(name).display()));
        assert_ne!(end.code(), Some(0), "{name} {}", env.dump(&end));
        assert!(end.err.contains(variable), "{name} {}", end.err);
    }
}
