//! S3, DynamoDB and STS on loopback: MiniStack, started once, ended with the tests.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;

use serde_json::{Value, json};

use super::clean::clean;
use super::http::{self, Message};
use super::proxy::{Proxy, ProxyAction};
use super::wait_for;

/// A port that nobody listens on.
pub fn free_port() -> u16 {
    TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port()
}

/// A program of the tests' own virtual environment, which `make test` sets up.
pub fn tool(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/tools/bin").join(name);
    assert!(path.exists(), "{} is missing: run `make tools` first, or `make test`, which does", path.display());
    path
}

/// Starts a server that ends when the tests end, however they do: its keeper waits for the end of a pipe that we hold.
pub fn keep(command: &[&str], environment: &[(&str, &str)]) -> Server {
    let keeper = r#"
import os, signal, subprocess, sys
log = open(sys.argv[1], "ab")
child = subprocess.Popen(sys.argv[2:], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
sys.stdin.read()
child.send_signal(signal.SIGKILL)
"#;
    // Another user may have run the tests before.
    let log = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("servers-{}.log", nix::unistd::geteuid()));
    clean(&mut Command::new(tool("python3")))
        .args(["-c", keeper])
        .arg(log)
        .args(command)
        .envs(environment.iter().copied())
        .stdin(Stdio::piped())
        .spawn()
        .map(Server)
        .unwrap()
}

/// A server and its keeper, which end when this is dropped.
pub struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

/// The loopback cloud.
pub struct Cloud {
    pub port: u16,
    _server: Server,
    _front: Proxy,
}

static CLOUD: OnceLock<Cloud> = OnceLock::new();

/// The one that all tests share; each has buckets and tables of its own.
pub fn cloud() -> &'static Cloud {
    CLOUD.get_or_init(|| Cloud::start(&[]))
}

impl Cloud {
    /// With more environment for MiniStack. With `AUTH=true` it checks signatures and permissions, so what the tests ask
    /// of it themselves must be signed.
    pub fn start(environment: &[(&str, &str)]) -> Self {
        let port = free_port();
        let text = port.to_string();
        let mut all = vec![("BIND_HOST", "127.0.0.1"), ("GATEWAY_PORT", text.as_str())];
        all.extend(environment);
        let server = keep(&[tool("ministack").to_str().unwrap()], &all);
        wait_for(
            "MiniStack",
            || http::ask(port, "GET", "/_ministack/health", &[], b"").filter(|answer| answer.status() == 200),
            || format!("nothing on port {port}"),
        );
        // MiniStack's HTTP server loses the answer to about one request in a thousand that reuses a connection (a
        // PutItem that had its effect, and terraform's SDK then retries into its own lock). A proxy in front asks it
        // on a connection of its own for each request. What is lost in these tests is lost on purpose.
        // In the conformance run DynamoDB is AWS's own DynamoDB Local, on a port that the caller names.
        let dynamodb: Option<u16> = std::env::var("TF_TEST_DYNAMODB_PORT").ok().and_then(|port| port.parse().ok());
        let front = Proxy::start(port, move |request| match dynamodb {
            Some(port) if request.header("x-amz-target").is_some_and(|target| target.starts_with("DynamoDB")) => {
                ProxyAction::PassTo(port)
            }
            _ => ProxyAction::Pass,
        });
        let port = front.port;
        Self { port, _server: server, _front: front }
    }

    /// A call by AWS's own client, signed. `call` is Python: `s3`, `dynamodb` and `iam` are clients.
    #[track_caller]
    pub fn signed(&self, call: &str) -> Value {
        let script = format!(
            "import json, botocore.session\n\
             session = botocore.session.get_session()\n\
             make = lambda name: session.create_client(name, region_name='us-east-1', endpoint_url='http://127.0.0.1:{}',\n\
             \u{20}aws_access_key_id='test', aws_secret_access_key='test')\n\
             s3, dynamodb, iam = make('s3'), make('dynamodb'), make('iam')\n\
             print(json.dumps({call}, default=str))\n",
            self.port
        );
        let output = clean(&mut Command::new(tool("python3"))).args(["-c", &script]).output().unwrap();
        assert!(output.status.success(), "{call}: {}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// A DynamoDB call.
    pub fn dynamodb(&self, operation: &str, body: &Value) -> Value {
        self.dynamodb_as("test", operation, body)
    }

    /// The same with another key. One that is an account's number reaches that account's tables.
    pub fn dynamodb_as(&self, key: &str, operation: &str, body: &Value) -> Value {
        self.dynamodb_with(&authorization(key, "dynamodb"), operation, body)
    }

    /// The same in another region, which has tables of its own.
    pub fn dynamodb_in(&self, region: &str, operation: &str, body: &Value) -> Value {
        self.dynamodb_with(&authorization("test", "dynamodb").replace("us-east-1", region), operation, body)
    }

    fn dynamodb_with(&self, authorization: &str, operation: &str, body: &Value) -> Value {
        let target = format!("DynamoDB_20120810.{operation}");
        let headers = [
            ("X-Amz-Target", target.as_str()),
            ("Content-Type", "application/x-amz-json-1.0"),
            ("Authorization", authorization),
            ("X-Amz-Date", "20260101T000000Z"),
        ];
        let answer = http::ask(self.port, "POST", "/", &headers, body.to_string().as_bytes()).unwrap();
        serde_json::from_slice(&answer.body).unwrap_or(Value::Null)
    }

    /// An S3 call; `path` begins with the bucket.
    pub fn s3(&self, method: &str, path: &str, body: &[u8]) -> Message {
        self.s3_as("test", method, path, body)
    }

    pub fn s3_as(&self, key: &str, method: &str, path: &str, body: &[u8]) -> Message {
        let headers = [("Authorization", authorization(key, "s3")), ("X-Amz-Date", "20260101T000000Z".into())];
        let headers: Vec<_> = headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
        http::ask(self.port, method, &format!("/{path}"), &headers, body).unwrap()
    }

    pub fn create_table(&self, table: &str) {
        self.create_table_as("test", table);
    }

    /// Makes a table anew whose key is not LockID.
    pub fn give_another_key(&self, table: &str) {
        self.dynamodb("DeleteTable", &json!({ "TableName": table }));
        let answer = self.dynamodb(
            "CreateTable",
            &json!({
                "TableName": table, "BillingMode": "PAY_PER_REQUEST",
                "AttributeDefinitions": [{ "AttributeName": "Id", "AttributeType": "S" }],
                "KeySchema": [{ "AttributeName": "Id", "KeyType": "HASH" }],
            }),
        );
        assert!(answer["TableDescription"].is_object(), "{answer}");
    }

    pub fn create_table_as(&self, key: &str, table: &str) {
        let answer = self.dynamodb_as(
            key,
            "CreateTable",
            &json!({
                "TableName": table, "BillingMode": "PAY_PER_REQUEST",
                "AttributeDefinitions": [{"AttributeName": "LockID", "AttributeType": "S"}],
                "KeySchema": [{"AttributeName": "LockID", "KeyType": "HASH"}],
            }),
        );
        assert!(answer["TableDescription"].is_object(), "{answer}");
    }

    /// The `Info` of a lock item.
    pub fn item(&self, table: &str, path: &str) -> Option<String> {
        self.item_as("test", table, path)
    }

    pub fn item_as(&self, key: &str, table: &str, path: &str) -> Option<String> {
        let answer = self.dynamodb_as(
            key,
            "GetItem",
            &json!({"TableName": table, "Key": {"LockID": {"S": path}}, "ConsistentRead": true}),
        );
        answer["Item"]["Info"]["S"].as_str().map(ToOwned::to_owned)
    }

    pub fn put_item(&self, table: &str, path: &str, info: &str) {
        self.dynamodb("PutItem", &json!({"TableName": table, "Item": {"LockID": {"S": path}, "Info": {"S": info}}}));
    }

    pub fn delete_item(&self, table: &str, path: &str) {
        self.dynamodb("DeleteItem", &json!({"TableName": table, "Key": {"LockID": {"S": path}}}));
    }

    /// The body of an object.
    pub fn object(&self, path: &str) -> Option<String> {
        let answer = self.s3("GET", path, b"");
        (answer.status() == 200).then(|| answer.text())
    }
}

fn authorization(key: &str, service: &str) -> String {
    format!(
        "AWS4-HMAC-SHA256 Credential={key}/20260101/us-east-1/{service}/aws4_request, SignedHeaders=host, Signature=0"
    )
}
