//! S3, DynamoDB and STS on loopback. They are simulated by MiniStack, which is started once and exits with the tests.

use std::io::Read;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;

use serde_json::{Value, json};

use super::clean::clean;
use super::http::{self, Message};
use super::proxy::{Proxy, ProxyAction};
use super::wait_for;

/// Returns a port on 127.0.0.1 for a server that cannot choose one itself. Nothing listens on it, and for a minute only
/// a socket that asks for this very port with `SO_REUSEADDR` gets it, as servers do.
///
/// A port that was merely bound and closed again would be free for the next server that takes any port, and for the
/// next connection. But no such socket gets a port with a connection in TIME-WAIT. The end of a connection that is
/// closed first is in that state (RFC 9293, 3.6; tcp(7)).
pub fn free_port() -> u16 {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let client = TcpStream::connect(("127.0.0.1", port)).unwrap();
    drop(listener.accept().unwrap());
    // After this, the accepted end is the one that was closed first.
    assert_eq!((&client).read(&mut [0]).unwrap(), 0);
    port
}

/// Returns the path of a program in the tests' own virtual environment, which `make test` sets up.
pub fn tool(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/tools/bin").join(name);
    assert!(path.exists(), "{} is missing: run `make tools` first, or `make test`, which does", path.display());
    path
}

/// Starts a server that is killed when the tests end, even if they crash: its keeper process reads a pipe that this
/// process holds, and kills the server at the end of the pipe.
///
/// The server has a directory of its own for temporary files: MiniStack ends if another user owns a file of the name
/// `ministack-PORT.pid` in /tmp (proc_sys_fs(5), protected_regular).
pub fn keep(command: &[&str], environment: &[(&str, &str)]) -> Server {
    let keeper = r#"
import os, subprocess, sys, tempfile
log = open(sys.argv[1], "ab")
with tempfile.TemporaryDirectory(prefix="tf-test-server-") as temporary:
    environment = dict(os.environ, TMPDIR=temporary)
    child = subprocess.Popen(sys.argv[2:], env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    sys.stdin.read()
    child.kill()
    child.wait()
"#;
    clean(&mut Command::new(tool("python3")))
        .args(["-c", keeper])
        .arg(server_log())
        .args(command)
        .envs(environment.iter().copied())
        .stdin(Stdio::piped())
        .spawn()
        .map(Server)
        .unwrap()
}

/// Returns the path of the file with the output of the servers. Another user may have run the tests before, and then
/// owns the other file.
fn server_log() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("servers-{}.log", nix::unistd::geteuid()))
}

/// A server and its keeper. Both end when this is dropped.
pub struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

/// The service that a request is for.
enum Service {
    DynamoDb,
    S3,
    /// STS or IAM.
    Other,
}

/// Returns the service that a request is for. A client of DynamoDB names the operation in `x-amz-target`, a client of
/// STS or IAM posts it to `/` as the form field `Action`. All other requests are for S3.
fn service(request: &Message) -> Service {
    let form =
        request.start.starts_with("POST / ") && request.text().split('&').any(|field| field.starts_with("Action="));
    match request.header("x-amz-target") {
        Some(target) if target.starts_with("DynamoDB") => Service::DynamoDb,
        Some(_) => Service::Other,
        None if form => Service::Other,
        None => Service::S3,
    }
}

/// Returns the port in an environment variable. `None` if the variable is unset.
fn port_in(name: &str) -> Option<u16> {
    std::env::var(name).ok().map(|port| port.parse().unwrap_or_else(|error| panic!("{name}={port}: {error}")))
}

/// The loopback cloud: MiniStack and the proxy in front of it. Every request of a test, of terraform and of `tf`
/// reaches the proxy, so all of them see the same buckets and tables.
pub struct Cloud {
    pub port: u16,
    _server: Server,
    _front: Proxy,
}

static CLOUD: OnceLock<Cloud> = OnceLock::new();

/// Returns the cloud that all tests share. Each test has its own buckets and tables.
pub fn cloud() -> &'static Cloud {
    CLOUD.get_or_init(|| Cloud::start(&[]))
}

impl Cloud {
    /// Starts a cloud. `environment` is added to MiniStack's environment. With `AUTH=true`, MiniStack checks signatures
    /// and permissions, so the requests of the tests themselves must be signed.
    pub fn start(environment: &[(&str, &str)]) -> Self {
        let port = free_port();
        let text = port.to_string();
        let mut all = vec![("BIND_HOST", "127.0.0.1"), ("GATEWAY_PORT", text.as_str())];
        all.extend(environment);
        let server = keep(&[tool("ministack").to_str().unwrap()], &all);
        wait_for(
            "MiniStack",
            || http::ask(port, "GET", "/_ministack/health", &[], b"").filter(|answer| answer.status() == 200),
            || format!("nothing on port {port}; its output is in {}", server_log().display()),
        );
        // MiniStack's HTTP server loses the response to about one in a thousand requests that reuse a connection: a
        // PutItem takes effect, and terraform's SDK then retries and meets its own lock. The proxy uses a new
        // connection for each request, so that a response is lost only if a test wants it. In the conformance runs
        // (tests/conformance), another server takes DynamoDB's or S3's place.
        let (dynamodb, s3) = (port_in("TF_TEST_DYNAMODB_PORT"), port_in("TF_TEST_S3_PORT"));
        let front = Proxy::start(port, move |request| {
            let server = match service(request) {
                Service::DynamoDb => dynamodb,
                Service::S3 => s3,
                Service::Other => None,
            };
            server.map_or(ProxyAction::Pass, ProxyAction::PassTo)
        });
        let port = front.port;
        Self { port, _server: server, _front: front }
    }

    /// Makes a signed call with AWS's own client. `call` is Python; `s3`, `dynamodb` and `iam` are clients.
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

    /// Makes a DynamoDB call.
    pub fn dynamodb(&self, operation: &str, body: &Value) -> Value {
        self.dynamodb_as("test", operation, body)
    }

    /// Like [`Cloud::dynamodb`], with another access key. If the key is an account ID, the call reaches the tables of
    /// that account.
    pub fn dynamodb_as(&self, key: &str, operation: &str, body: &Value) -> Value {
        self.dynamodb_with(&authorization(key, "dynamodb"), operation, body)
    }

    /// Like [`Cloud::dynamodb`], in another region, which has its own tables.
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

    /// Makes an S3 call. `path` begins with the bucket.
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

    /// Recreates a table with a key that is not LockID.
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

    /// Returns the `Info` of a lock item. `None` if there is no item.
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

    /// Returns the body of an object. `None` if there is no object.
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
