//! What terraform itself makes of the texts that `tf` reads by Go's rules: exceptions of a proxy and durations. The
//! answers are in `tests/golden`, and the unit tests of `tf`'s own parsers compare themselves with the same files.

use std::path::Path;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

use crate::support::cloud::cloud;
use crate::support::http::Message;
use crate::support::proxy::{Proxy, ProxyAction};
use crate::support::{Lock, Subject, TestEnv};

/// A directory whose backend is configured anew for each question, and a proxy that refuses every request and
/// remembers it.
struct Terraform {
    env: TestEnv,
    proxy: Proxy,
    seen: Arc<Mutex<Vec<String>>>,
}

impl Terraform {
    fn new() -> Self {
        let seen: Arc<Mutex<Vec<String>>> = Arc::default();
        let proxy = {
            let seen = Arc::clone(&seen);
            Proxy::start(cloud().port, move |request| {
                seen.lock().unwrap().push(format!("{} {}", request.start, request.text()));
                ProxyAction::Answer(Message::answer("403 Forbidden", ""))
            })
        };
        Self { env: TestEnv::empty(Lock::File), proxy, seen }
    }

    /// Returns the requests that `terraform init` sends with these lines in its block, and its error.
    fn init(&self, lines: &str) -> (Vec<String>, String) {
        let _ = std::fs::remove_dir_all(self.env.directory.join(".terraform"));
        self.env.write(
            "main.tf",
            &format!(
                "terraform {{\nbackend \"s3\" {{\nbucket = \"b\"\nkey = \"k\"\nregion = \"us-east-1\"\naccess_key = \"a\"\n\
                 secret_key = \"s\"\nskip_requesting_account_id = true\nskip_credentials_validation = true\n\
                 use_path_style = true\nmax_retries = 1\n{lines}\n}}\n}}\n"
            ),
        );
        self.seen.lock().unwrap().clear();
        let end = self.env.run(Subject::Bare, &["init", "-no-color", "-input=false"]);
        assert_ne!(end.code(), Some(0), "{}", self.env.dump(&end));
        (self.seen.lock().unwrap().clone(), end.err)
    }
}

/// Compares terraform's answers with a file of `tests/golden`: a list of questions, each with its answer at the end.
/// With TF_WRITE_GENERATED, terraform's answers are written into it.
fn compare(name: &str, mut ask: impl FnMut(&[Value]) -> Value) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    let golden: Vec<Vec<Value>> = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let mut asked = golden.clone();
    for case in &mut asked {
        let last = case.len() - 1;
        case[last] = ask(&case[..last]);
    }
    if std::env::var_os("TF_WRITE_GENERATED").is_some() {
        let lines: Vec<String> = asked.iter().map(|case| format!("  {}", json!(case))).collect();
        std::fs::write(&path, format!("[\n{}\n]\n", lines.join(",\n"))).unwrap();
    } else {
        assert_eq!(asked, golden, "terraform's answers are no longer those of {}", path.display());
    }
}

#[test]
fn the_exceptions_of_a_proxy_are_terraforms() {
    let mut terraform = Terraform::new();
    let proxy = format!("http://127.0.0.1:{}", terraform.proxy.port);
    terraform.env.set("HTTP_PROXY", proxy);
    compare("no_proxy.json", |question| {
        let [no_proxy, host, port] = question else { panic!("{question:?}") };
        terraform.env.set("NO_PROXY", no_proxy.as_str().unwrap());
        let url = format!("http://{}:{port}", host.as_str().unwrap());
        let (seen, error) = terraform.init(&format!("endpoints = {{ s3 = \"{url}\" }}"));
        // Nothing listens on these ports, and no name server knows these names.
        let direct = error.contains("dial tcp");
        assert_eq!(seen.is_empty(), direct, "{question:?}: {seen:?} {error}");
        json!(direct)
    });
}

#[test]
fn the_length_of_a_roles_session_is_terraforms() {
    let terraform = Terraform::new();
    let sts = format!("endpoints = {{ sts = \"http://127.0.0.1:{}\" }}", terraform.proxy.port);
    compare("durations.json", |question| {
        let role = json!({ "role_arn": "arn:aws:iam::000000000000:role/r", "duration": question[0] });
        let (seen, error) = terraform.init(&format!("{sts}\nassume_role = {role}"));
        let seconds = seen.iter().find_map(|request| {
            let (_, rest) = request.split_once("DurationSeconds=")?;
            rest.split('&').next()?.parse::<u64>().ok()
        });
        assert!(seconds.is_some() || error.contains("Invalid Duration"), "{question:?}: {seen:?} {error}");
        json!(seconds)
    });
}
