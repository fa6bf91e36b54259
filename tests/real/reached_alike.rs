//! The release reaches the same services as terraform, with the same identity. For each setting of a backend, terraform
//! and `tf` run in the same directory, and the requests that arrive at the services are compared. Terraform defines
//! what is right.

use std::collections::BTreeSet;
use std::process::Command;
use std::sync::{Arc, Mutex};

use crate::support::authority::Authority;
use crate::support::cloud::{cloud, tool};
use crate::support::http::Message;
use crate::support::proxy::{Proxy, ProxyAction};
use crate::support::test_env::UNSET;
use crate::support::{Lock, Subject, TestEnv};

/// What arrived: `SERVICE HOST REGION KEY PLACE`.
type Seen = Arc<Mutex<BTreeSet<String>>>;

/// A backend and its environment. `{port}` stands for the port of the services, which also acts as a proxy, `{tls}` for
/// that with TLS, and `{above}` for the directory above the working directory.
struct Case {
    name: &'static str,
    /// Additional lines of the block.
    block: &'static str,
    /// Environment variables. An empty one counts as not set.
    environment: &'static [(&'static str, &'static str)],
    /// Files, by their path below the directory of the [`TestEnv`].
    files: &'static [(&'static str, &'static str)],
    /// What both must have sent, so that the comparison is not about nothing.
    seen: &'static str,
}

const PLAIN: Case = Case { name: "", block: "", environment: &[], files: &[], seen: "" };

/// The access keys that are used in cases. Any other key comes from STS or from a stand-in.
const KEYS: [&str; 6] = ["test", "BLOCK", "PROFILE", "PROCESS", "ENV2", "CONTAINER"];

/// Returns what is compared of a request. `None` unless the request is about a lock or a role.
fn sighting(request: &Message, bucket: &str, table: &str) -> Option<String> {
    let host = request.header("host").unwrap_or_default().split(':').next().unwrap_or_default();
    let scope = request.header("authorization").and_then(|text| text.split("Credential=").nth(1));
    let scope: Vec<&str> = scope.and_then(|text| text.split(',').next()).unwrap_or("///").split('/').collect();
    let [key, _, region, service, ..] = scope.as_slice() else { return None };
    let key = if KEYS.contains(key) || key.is_empty() { key } else { "temporary" };
    let body = request.text();
    if body.contains("Action=AssumeRole") {
        let mut parameters: Vec<&str> = body
            .split('&')
            .filter(|pair| !pair.starts_with("RoleSessionName=aws-go-sdk") && !pair.starts_with("RoleSessionName=tf-"))
            // For a profile's role, Go's SDK requests this duration, and Rust's requests the role's own.
            .filter(|pair| *pair != "DurationSeconds=900")
            .filter(|pair| {
                !pair.starts_with("RoleSessionName=1") && !pair.starts_with("RoleSessionName=assume-role-from")
            })
            .collect();
        parameters.sort_unstable();
        return Some(format!("sts {host} {region} {key} {}", parameters.join("&")));
    }
    if *service == "dynamodb" {
        let body: serde_json::Value = serde_json::from_str(&body).ok()?;
        let id = body["Key"]["LockID"]["S"].as_str().or_else(|| body["Item"]["LockID"]["S"].as_str())?;
        let is_ours = body["TableName"] == table && !id.ends_with("-md5");
        return is_ours.then(|| format!("dynamodb {host} {region} {key} {id}"));
    }
    let target = request.start.split(' ').nth(1)?;
    let path = target.split("://").last()?.split('?').next()?;
    let encrypted = request.header("x-amz-server-side-encryption-customer-key").map_or("", |_| " with a key");
    let reads = !request.start.starts_with("DELETE");
    (path.ends_with(".tflock") && format!("{host}{path}").contains(bucket) && reads)
        .then(|| format!("s3 {host} {region} {key} {}{encrypted}", path.trim_start_matches(host)))
}

/// The services, and stand-ins for the others: an instance's metadata, a container's credentials, SSO.
fn answer(request: &Message, authority: &Arc<Authority>) -> ProxyAction {
    const CREDENTIALS: &str = r#"{"Code":"Success","Type":"AWS-HMAC","AccessKeyId":"CONTAINER","SecretAccessKey":"s","Token":"t","RoleArn":"r","LastUpdated":"2026-01-01T00:00:00Z","Expiration":"2099-01-01T00:00:00Z"}"#;
    let target = request.start.split(' ').nth(1).unwrap_or_default();
    let with = |text: &str| {
        let mut answer = Message::answer("200 OK", text);
        answer.headers.push(("X-Aws-Ec2-Metadata-Token-Ttl-Seconds".into(), "600".into()));
        ProxyAction::Answer(answer)
    };
    match target.split('?').next().unwrap_or_default() {
        "/latest/api/token" => with("token"),
        "/latest/meta-data/iam/security-credentials/" | "/latest/meta-data/iam/security-credentials-extended/" => {
            with("the-role")
        }
        path if path.starts_with("/latest/meta-data/iam/") => with(CREDENTIALS),
        "/container" => with(CREDENTIALS),
        "/federation/credentials" => with(
            r#"{"roleCredentials":{"accessKeyId":"CONTAINER","secretAccessKey":"s","sessionToken":"t","expiration":4070908800000}}"#,
        ),
        _ if request.start.starts_with("CONNECT ") => ProxyAction::Tunnel(Arc::clone(authority)),
        _ => ProxyAction::Pass,
    }
}

/// Changes a request into the form that the services want: a request to a proxy has a complete URL, and the host may
/// contain the bucket. All buckets and tables of the services are in one region.
pub fn to_services(request: &mut Message) {
    for (name, value) in &mut request.headers {
        if name.eq_ignore_ascii_case("authorization") {
            for region in ["eu-west-1", "eu-west-2", "eu-west-3", "eu-central-1", "cn-north-1"] {
                *value = value.replace(&format!("/{region}/"), "/us-east-1/");
            }
        }
    }
    let mut words: Vec<String> = request.start.split(' ').map(ToOwned::to_owned).collect();
    let host = request.header("host").unwrap_or_default().to_owned();
    if let Some(path) = words[1].strip_prefix(&format!("http://{host}")) {
        words[1] = path.to_string();
    }
    if let Some((bucket, _)) = host.split_once(".s3") {
        words[1] = format!("/{bucket}{}", words[1]);
    }
    request.start = words.join(" ");
    request.headers.retain(|(name, _)| !name.eq_ignore_ascii_case("host"));
    request.headers.push(("Host".into(), "127.0.0.1".into()));
}

struct Stage {
    env: TestEnv,
    seen: Seen,
    plain: Proxy,
    tls: Proxy,
}

impl Stage {
    fn new() -> Self {
        let env = TestEnv::empty(Lock::Both);
        let seen = Seen::default();
        let authority = Authority::new();
        let rule = |tag: &'static str| {
            let (seen, authority) = (Arc::clone(&seen), Arc::clone(&authority));
            let (bucket, table) = (env.bucket.clone(), env.table.clone());
            move |request: &Message| {
                if let Some(sighting) = sighting(request, &bucket, &table) {
                    seen.lock().unwrap().insert(format!("{tag}{sighting}"));
                }
                answer(request, &authority)
            }
        };
        let plain = Proxy::start_changing(cloud().port, to_services, rule(""));
        let broken = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n";
        for (name, pem) in
            [("ca.pem", authority.pem.clone()), ("mixed.pem", format!("{broken}# ours\n{}", authority.pem))]
        {
            std::fs::write(env.directory.parent().unwrap().join(name), pem).unwrap();
        }
        let tls = Proxy::start_tls(cloud().port, &authority, to_services, rule("tls "));
        Self { env, seen, plain, tls }
    }

    fn fill_in(&self, text: &str) -> String {
        let above = self.env.directory.parent().unwrap();
        text.replace("{port}", &self.plain.port.to_string())
            .replace("{tls}", &self.tls.port.to_string())
            .replace("{above}", above.to_str().unwrap())
            .replace("{bucket}", &self.env.bucket)
            .replace("{table}", &self.env.table)
    }

    /// Returns the requests that one command sends, and how it ended.
    fn see(&self, subject: Subject, arguments: &[&str]) -> (BTreeSet<String>, String) {
        self.seen.lock().unwrap().clear();
        let end = self.env.run(subject, arguments);
        (self.seen.lock().unwrap().clone(), self.env.dump(&end))
    }
}

/// Runs terraform and then `tf` with the case, and compares their requests.
#[track_caller]
fn assert_alike(case: &Case) {
    let mut stage = Stage::new();
    for (path, text) in case.files {
        let path = stage.env.directory.parent().unwrap().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, stage.fill_in(text)).unwrap();
    }
    let endpoint = format!("http://127.0.0.1:{}", stage.plain.port);
    stage.env.set("AWS_ENDPOINT_URL", endpoint);
    for (name, value) in case.environment {
        let value = stage.fill_in(value);
        stage.env.set(name, value);
    }
    let block = stage.fill_in(case.block);
    let own = |name: &str| block.lines().any(|line| line.trim_start().starts_with(name));
    let usual = [
        ("bucket", format!("\"{}\"", stage.env.bucket)),
        ("key", "\"dir/prod.tfstate\"".to_owned()),
        ("region", "\"us-east-1\"".to_owned()),
        ("dynamodb_table", format!("\"{}\"", stage.env.table)),
        ("use_lockfile", "true".to_owned()),
        ("skip_requesting_account_id", "true".to_owned()),
        ("skip_credentials_validation", "true".to_owned()),
        ("skip_region_validation", "true".to_owned()),
    ];
    let usual = usual.iter().filter(|(name, _)| !own(name)).map(|(name, value)| format!("{name} = {value}"));
    let lines = usual.collect::<Vec<_>>().join("\n");
    stage.env.write("main.tf", &format!("terraform {{\nbackend \"s3\" {{\n{lines}\n{block}\n}}\n}}\n"));
    let (_, init) = stage.see(Subject::Bare, &["init", "-no-color", "-input=false"]);
    let (terraform, plan) = stage.see(Subject::Bare, &["plan", "-no-color", "-input=false"]);
    let (tf, show) = stage.see(Subject::Tf, &["locks", "list"]);
    let dump = format!("{}\n{init}\n{plan}\n{show}", case.name);
    assert!(terraform.iter().any(|line| line.contains(&stage.fill_in(case.seen))), "{terraform:#?}\n{dump}");
    assert_eq!(tf, terraform, "{dump}");
    assert!(!tf.is_empty(), "{dump}");
}

#[test]
fn bucket_key_table_region_and_endpoint_are_terraforms() {
    for case in [
        Case { name: "as it is", seen: "us-east-1 test /{bucket}/dir/prod.tfstate.tflock", ..PLAIN },
        Case { name: "another region", block: "region = \"eu-west-3\"", seen: "eu-west-3", ..PLAIN },
        Case {
            name: "region of the environment",
            block: "region = \"\"",
            environment: &[("AWS_REGION", "eu-west-2"), ("AWS_DEFAULT_REGION", "eu-west-1")],
            seen: "eu-west-2",
            ..PLAIN
        },
        Case {
            name: "the other region of the environment",
            block: "region = \"\"",
            environment: &[("AWS_DEFAULT_REGION", "eu-west-1")],
            seen: "eu-west-1",
            ..PLAIN
        },
        Case {
            name: "endpoints",
            block: "endpoints = { s3 = \"http://127.0.0.1:{port}\", dynamodb = \"http://127.0.0.1:{port}\" }\nuse_path_style = true",
            environment: &[("AWS_ENDPOINT_URL", "http://127.0.0.1:1"), ("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")],
            seen: "127.0.0.1",
            ..PLAIN
        },
        Case {
            name: "endpoints by their old names",
            block: "endpoint = \"http://127.0.0.1:{port}\"\ndynamodb_endpoint = \"http://127.0.0.1:{port}\"\nforce_path_style = true",
            environment: &[("AWS_ENDPOINT_URL", "http://127.0.0.1:1")],
            seen: "127.0.0.1",
            ..PLAIN
        },
        Case {
            name: "an endpoint for each service in the environment",
            block: "use_path_style = true",
            environment: &[
                ("AWS_ENDPOINT_URL", "http://127.0.0.1:1"),
                ("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:{port}"),
                ("AWS_ENDPOINT_URL_DYNAMODB", "http://127.0.0.1:{port}"),
            ],
            seen: "127.0.0.1",
            ..PLAIN
        },
        Case {
            name: "the same by their old names",
            block: "use_path_style = true",
            environment: &[
                ("AWS_ENDPOINT_URL", ""),
                ("AWS_S3_ENDPOINT", "http://127.0.0.1:{port}"),
                ("AWS_DYNAMODB_ENDPOINT", "http://127.0.0.1:{port}"),
            ],
            seen: "127.0.0.1",
            ..PLAIN
        },
        Case {
            name: "endpoints of the shared files",
            // Go's SDK checks whether the variable exists, even if it is empty.
            environment: &[("AWS_ENDPOINT_URL", UNSET)],
            files: &[(
                "home/.aws/config",
                "[default]\nservices = here\n[services here]\ns3 =\n  endpoint_url = http://127.0.0.1:{port}\ndynamodb =\n  endpoint_url = http://127.0.0.1:{port}\n",
            )],
            seen: "127.0.0.1",
            ..PLAIN
        },
        Case {
            name: "configured endpoints are ignored, and those of the environment for one service are not",
            block: "use_path_style = true",
            environment: &[
                ("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "true"),
                ("AWS_ENDPOINT_URL", "http://127.0.0.1:1"),
                ("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:{port}"),
                ("AWS_ENDPOINT_URL_DYNAMODB", "http://127.0.0.1:{port}"),
            ],
            seen: "127.0.0.1",
            ..PLAIN
        },
    ] {
        assert_alike(&case);
    }
}

#[test]
fn a_workspaces_state_is_locked_where_terraform_locks_it() {
    for (block, workspace, path) in [
        ("", "green", "env:/green/dir/prod.tfstate"),
        ("workspace_key_prefix = \"teams/x\"", "green", "teams/x/green/dir/prod.tfstate"),
    ] {
        let case = Case {
            name: "workspace",
            block,
            environment: if workspace == "green" { &[("TF_WORKSPACE", "green")] } else { &[] },
            seen: path,
            ..PLAIN
        };
        let stage_of = |case: &Case| {
            let mut stage = Stage::new();
            let endpoint = format!("http://127.0.0.1:{}", stage.plain.port);
            stage.env.set("AWS_ENDPOINT_URL", endpoint);
            let backend = stage.env.backend("dir/prod.tfstate");
            stage.env.write("main.tf", &format!("terraform {{\nbackend \"s3\" {{\n{backend}{}\n}}\n}}\n", case.block));
            stage.see(Subject::Bare, &["init", "-no-color"]);
            stage.see(Subject::Bare, &["workspace", "new", workspace]);
            stage
        };
        let stage = stage_of(&case);
        let (terraform, plan) = stage.see(Subject::Bare, &["plan", "-no-color"]);
        let (tf, show) = stage.see(Subject::Tf, &["locks", "list"]);
        assert!(terraform.iter().any(|line| line.contains(case.seen)), "{terraform:#?}\n{plan}");
        // `list` reads every workspace, and terraform only the selected one.
        let selected: BTreeSet<_> =
            tf.iter().filter(|line| line.contains("/green/dir/prod.tfstate")).cloned().collect();
        assert_eq!(selected, terraform, "{show}");
    }
}

const OTHER_KEYS: &str = "[default]\naws_access_key_id = PROFILE\naws_secret_access_key = s\n[other]\naws_access_key_id = PROCESS\naws_secret_access_key = s\n";

#[test]
#[expect(clippy::too_many_lines, reason = "a table")]
fn credentials_are_terraforms() {
    for case in [
        Case {
            name: "keys of the block",
            block: "access_key = \"BLOCK\"\nsecret_key = \"s\"\ntoken = \"t\"",
            seen: "BLOCK",
            ..PLAIN
        },
        Case {
            name: "a profile of the block before keys of the environment",
            block: "profile = \"other\"",
            files: &[("home/.aws/credentials", OTHER_KEYS)],
            seen: "PROCESS",
            ..PLAIN
        },
        Case {
            name: "keys of the environment before its profile",
            environment: &[("AWS_PROFILE", "other")],
            files: &[("home/.aws/credentials", OTHER_KEYS)],
            seen: "us-east-1 test",
            ..PLAIN
        },
        Case {
            name: "a profile of the environment",
            environment: &[("AWS_PROFILE", "other"), ("AWS_ACCESS_KEY_ID", ""), ("AWS_SECRET_ACCESS_KEY", "")],
            files: &[("home/.aws/credentials", OTHER_KEYS)],
            seen: "PROCESS",
            ..PLAIN
        },
        Case {
            name: "the default profile by its other name",
            environment: &[("AWS_DEFAULT_PROFILE", "other"), ("AWS_ACCESS_KEY_ID", ""), ("AWS_SECRET_ACCESS_KEY", "")],
            files: &[("home/.aws/credentials", OTHER_KEYS)],
            seen: "PROCESS",
            ..PLAIN
        },
        Case {
            name: "all that the default profile by its other name says",
            block: "use_path_style = true",
            environment: &[
                ("AWS_DEFAULT_PROFILE", "other"),
                ("AWS_ENDPOINT_URL", UNSET),
                ("AWS_ACCESS_KEY_ID", ""),
                ("AWS_SECRET_ACCESS_KEY", ""),
            ],
            files: &[(
                "home/.aws/config",
                "[profile other]\naws_access_key_id = PROCESS\naws_secret_access_key = s\nendpoint_url = http://127.0.0.1:{port}\n",
            )],
            seen: "PROCESS",
        },
        Case {
            name: "keys of a profile, before the process in it",
            block: "profile = \"both\"",
            files: &[(
                "home/.aws/config",
                "[profile both]\naws_access_key_id = PROFILE\naws_secret_access_key = s\ncredential_process = echo '{\"Version\":1,\"AccessKeyId\":\"PROCESS\",\"SecretAccessKey\":\"s\"}'\n",
            )],
            seen: "PROFILE",
            ..PLAIN
        },
        Case {
            name: "keys of a profile, before the login in it",
            block: "profile = \"both\"",
            files: &[(
                "home/.aws/config",
                "[profile both]\naws_access_key_id = PROFILE\naws_secret_access_key = s\nsso_session = corp\nsso_account_id = 111122223333\nsso_role_name = r\nlogin_session = arn:aws:iam::111122223333:user/anna\n[sso-session corp]\nsso_region = us-east-1\nsso_start_url = https://x.example/start\n",
            )],
            seen: "PROFILE",
            ..PLAIN
        },
        Case {
            name: "a container where the profile has nothing of the kind",
            environment: &[
                ("AWS_PROFILE", "empty"),
                ("AWS_ACCESS_KEY_ID", ""),
                ("AWS_SECRET_ACCESS_KEY", ""),
                ("AWS_CONTAINER_CREDENTIALS_FULL_URI", "http://127.0.0.1:{port}/container"),
            ],
            files: &[("home/.aws/config", "[profile empty]\noutput = json\n")],
            seen: "CONTAINER",
            ..PLAIN
        },
        Case {
            name: "keys by their other names",
            environment: &[
                ("AWS_ACCESS_KEY_ID", ""),
                ("AWS_SECRET_ACCESS_KEY", ""),
                ("AWS_ACCESS_KEY", "ENV2"),
                ("AWS_SECRET_KEY", "s"),
            ],
            seen: "ENV2",
            ..PLAIN
        },
        Case {
            name: "files in odd places, with variables in their names",
            block: "profile = \"other\"\nshared_credentials_files = [\"$ODD/keys\"]\nshared_config_files = [\"~/odd-config\"]",
            environment: &[("ODD", "{above}/odd")],
            files: &[("odd/keys", OTHER_KEYS), ("home/odd-config", "[profile other]\nregion = eu-west-1\n")],
            seen: "PROCESS",
        },
        Case {
            name: "a relative file",
            block: "profile = \"other\"\nshared_credentials_files = [\"keys\"]",
            files: &[("work/keys", OTHER_KEYS)],
            seen: "PROCESS",
            ..PLAIN
        },
        Case {
            name: "the old attribute, and the variable that goes before it",
            block: "profile = \"other\"\nshared_credentials_file = \"/nowhere\"",
            environment: &[("AWS_SHARED_CREDENTIALS_FILE", "{above}/odd/keys")],
            files: &[("odd/keys", OTHER_KEYS)],
            seen: "PROCESS",
        },
        Case {
            name: "the variable that only the backend knows",
            environment: &[
                ("AWS_SHARED_CONFIG_FILE", "{above}/odd/config"),
                ("AWS_CONFIG_FILE", "/nowhere"),
                ("AWS_PROFILE", "process"),
                ("AWS_ACCESS_KEY_ID", ""),
                ("AWS_SECRET_ACCESS_KEY", ""),
            ],
            files: &[(
                "odd/config",
                "[profile process]\ncredential_process = echo '{\"Version\":1,\"AccessKeyId\":\"PROCESS\",\"SecretAccessKey\":\"s\"}'\n",
            )],
            seen: "PROCESS",
            ..PLAIN
        },
        Case {
            name: "a container",
            environment: &[
                ("AWS_ACCESS_KEY_ID", ""),
                ("AWS_SECRET_ACCESS_KEY", ""),
                ("AWS_CONTAINER_CREDENTIALS_FULL_URI", "http://127.0.0.1:{port}/container"),
            ],
            seen: "CONTAINER",
            ..PLAIN
        },
        Case {
            name: "an instance",
            block: "ec2_metadata_service_endpoint = \"http://127.0.0.1:{port}\"",
            environment: &[("AWS_ACCESS_KEY_ID", ""), ("AWS_SECRET_ACCESS_KEY", ""), ("AWS_EC2_METADATA_DISABLED", "")],
            seen: "CONTAINER",
            ..PLAIN
        },
        Case {
            name: "an instance, by the old variable",
            environment: &[
                ("AWS_ACCESS_KEY_ID", ""),
                ("AWS_SECRET_ACCESS_KEY", ""),
                ("AWS_EC2_METADATA_DISABLED", ""),
                ("AWS_METADATA_URL", "http://127.0.0.1:{port}"),
            ],
            seen: "CONTAINER",
            ..PLAIN
        },
        Case {
            name: "an SSO login",
            block: "profile = \"corp\"",
            environment: &[("AWS_ENDPOINT_URL_SSO", "http://127.0.0.1:{port}")],
            files: &[
                (
                    "home/.aws/config",
                    "[profile corp]\nsso_session = corp\nsso_account_id = 111122223333\nsso_role_name = r\n[sso-session corp]\nsso_region = us-east-1\nsso_start_url = https://x.example/start\n",
                ),
                // The name is the SHA-1 of "corp".
                (
                    "home/.aws/sso/cache/ee0bfd2552fbd840c02cc48b6e823320543c450f.json",
                    "{\"startUrl\":\"https://x.example/start\",\"region\":\"us-east-1\",\"accessToken\":\"t\",\"expiresAt\":\"2099-01-01T00:00:00Z\"}",
                ),
            ],
            seen: "CONTAINER",
        },
    ] {
        assert_alike(&case);
    }
}

/// Other credentials would be another identity, which may not see the lock, and a lock that is not there needs no
/// release.
#[test]
fn where_a_profile_is_gone_nobody_else_is_asked() {
    let mut stage = Stage::new();
    let endpoint = format!("http://127.0.0.1:{}", stage.plain.port);
    stage.env.set("AWS_CONTAINER_CREDENTIALS_FULL_URI", format!("{endpoint}/container"));
    stage.env.set("AWS_ENDPOINT_URL", endpoint);
    let keys = stage.env.directory.parent().unwrap().join("keys");
    std::fs::write(&keys, OTHER_KEYS).unwrap();
    let files = format!("profile = \"other\"\nshared_credentials_files = [{keys:?}]");
    let backend = stage.env.backend("dir/prod.tfstate");
    stage.env.write("main.tf", &format!("terraform {{\nbackend \"s3\" {{\n{backend}{files}\n}}\n}}\n"));
    stage.see(Subject::Bare, &["init", "-no-color"]);
    let (there, dump) = stage.see(Subject::Tf, &["locks", "list"]);
    assert!(there.iter().any(|line| line.contains("PROCESS")), "{dump}");
    std::fs::write(&keys, "[another]\n").unwrap();
    let (gone, dump) = stage.see(Subject::Tf, &["locks", "list"]);
    assert!(gone.is_empty(), "{gone:#?}\n{dump}");
    assert!(dump.contains("the profile other is in none of the shared files"), "{dump}");
}

#[test]
#[expect(clippy::too_many_lines, reason = "a table")]
fn roles_are_assumed_as_terraform_assumes_them() {
    for case in [
        Case {
            name: "with everything",
            block: "assume_role = {\nrole_arn = \"arn:aws:iam::000000000000:role/lock\"\nsession_name = \"release\"\nexternal_id = \"external\"\n\
                    duration = \"1h30m\"\npolicy = \"{}\"\npolicy_arns = [\"arn:aws:iam::aws:policy/ReadOnlyAccess\"]\n\
                    tags = { team = \"x\" }\ntransitive_tag_keys = [\"team\"]\nsource_identity = \"anna\"\n}",
            seen: "SourceIdentity=anna",
            ..PLAIN
        },
        Case {
            name: "with the region and endpoint of STS",
            block: "sts_region = \"eu-central-1\"\nendpoints = { sts = \"http://127.0.0.1:{port}\" }\n\
                    assume_role = { role_arn = \"arn:aws:iam::000000000000:role/lock\" }",
            seen: "sts 127.0.0.1 eu-central-1",
            ..PLAIN
        },
        Case {
            name: "with the old name of that endpoint",
            block: "sts_endpoint = \"http://127.0.0.1:{port}\"\nassume_role = { role_arn = \"arn:aws:iam::000000000000:role/lock\" }",
            seen: "sts 127.0.0.1",
            ..PLAIN
        },
        Case {
            name: "on top of a profile that assumes one itself",
            block: "profile = \"chained\"\nassume_role = { role_arn = \"arn:aws:iam::000000000000:role/second\" }",
            // For a profile, terraform calls STS only at the endpoint of that service.
            environment: &[("AWS_ENDPOINT_URL_STS", "http://127.0.0.1:{port}")],
            files: &[(
                "home/.aws/config",
                "[profile base]\naws_access_key_id = PROFILE\naws_secret_access_key = s\n[profile chained]\nrole_arn = arn:aws:iam::000000000000:role/first\nsource_profile = base\nrole_session_name = chain\nexternal_id = e\n",
            )],
            seen: "role%2Fsecond",
        },
        Case {
            name: "a profile's role at the block's endpoint",
            block: "profile = \"chained\"\nendpoints = { sts = \"http://127.0.0.1:{port}\", s3 = \"http://127.0.0.1:{port}\", dynamodb = \"http://127.0.0.1:{port}\" }\nuse_path_style = true\nsts_region = \"eu-central-1\"",
            environment: &[("AWS_ENDPOINT_URL", "")],
            files: &[(
                "home/.aws/config",
                "[profile base]\naws_access_key_id = PROFILE\naws_secret_access_key = s\n[profile chained]\nrole_arn = arn:aws:iam::000000000000:role/first\nsource_profile = base\nrole_session_name = chain\n",
            )],
            seen: "sts 127.0.0.1 eu-central-1 PROFILE",
        },
        Case {
            name: "a profile's role, by the keys beside it",
            block: "profile = \"itself\"",
            environment: &[("AWS_ENDPOINT_URL_STS", "http://127.0.0.1:{port}")],
            files: &[(
                "home/.aws/config",
                "[profile itself]\naws_access_key_id = PROFILE\naws_secret_access_key = s\nrole_arn = arn:aws:iam::000000000000:role/itself\nrole_session_name = itself\nexternal_id = e\n",
            )],
            seen: "role%2Fitself",
        },
        Case {
            name: "a profile's role, by keys that a command prints",
            block: "profile = \"role\"",
            environment: &[("AWS_ENDPOINT_URL_STS", "http://127.0.0.1:{port}")],
            files: &[(
                "home/.aws/config",
                "[profile role]\nrole_arn = arn:aws:iam::000000000000:role/of-process\nrole_session_name = x\nsource_profile = process\n[profile process]\ncredential_process = echo '{\"Version\":1,\"AccessKeyId\":\"PROCESS\",\"SecretAccessKey\":\"s\"}'\n",
            )],
            seen: "sts 127.0.0.1 us-east-1 PROCESS",
        },
        Case {
            name: "a chain of two roles, by keys that a command prints",
            block: "profile = \"two\"",
            environment: &[("AWS_ENDPOINT_URL_STS", "http://127.0.0.1:{port}")],
            files: &[(
                "home/.aws/config",
                "[profile two]\nrole_arn = arn:aws:iam::000000000000:role/upper\nrole_session_name = x\nsource_profile = one\n[profile one]\nrole_arn = arn:aws:iam::000000000000:role/lower\nrole_session_name = x\nsource_profile = process\n[profile process]\ncredential_process = echo '{\"Version\":1,\"AccessKeyId\":\"PROCESS\",\"SecretAccessKey\":\"s\"}'\n",
            )],
            seen: "role%2Flower",
        },
        Case {
            name: "a profile's role, by keys that a command beside it prints",
            block: "profile = \"role\"",
            environment: &[("AWS_ENDPOINT_URL_STS", "http://127.0.0.1:{port}")],
            files: &[(
                "home/.aws/config",
                "[profile role]\nrole_arn = arn:aws:iam::000000000000:role/of-process\nrole_session_name = x\ncredential_process = echo '{\"Version\":1,\"AccessKeyId\":\"PROCESS\",\"SecretAccessKey\":\"s\"}'\n",
            )],
            seen: "sts 127.0.0.1 us-east-1 PROCESS",
        },
        Case {
            name: "by a web identity of the block",
            block: "assume_role_with_web_identity = {\nrole_arn = \"arn:aws:iam::000000000000:role/web\"\nsession_name = \"web\"\nduration = \"20m\"\nweb_identity_token_file = \"token\"\n}",
            files: &[("work/token", "header.payload.signature")],
            seen: "AssumeRoleWithWebIdentity",
            ..PLAIN
        },
        Case {
            name: "by a web identity, and one more on top",
            block: "assume_role_with_web_identity = {\nrole_arn = \"arn:aws:iam::000000000000:role/web\"\nsession_name = \"web\"\nweb_identity_token = \"a.b.c\"\n}\nassume_role = { role_arn = \"arn:aws:iam::000000000000:role/second\" }",
            seen: "role%2Fsecond",
            ..PLAIN
        },
        Case {
            name: "by a web identity of the environment, before a profile",
            environment: &[
                ("AWS_ENDPOINT_URL_STS", "http://127.0.0.1:{port}"),
                ("AWS_ACCESS_KEY_ID", ""),
                ("AWS_SECRET_ACCESS_KEY", ""),
                ("AWS_ROLE_ARN", "arn:aws:iam::000000000000:role/web"),
                ("AWS_ROLE_SESSION_NAME", "web"),
                ("AWS_WEB_IDENTITY_TOKEN_FILE", "{above}/token"),
            ],
            files: &[("token", "header.payload.signature"), ("home/.aws/credentials", OTHER_KEYS)],
            seen: "AssumeRoleWithWebIdentity",
            ..PLAIN
        },
        Case {
            name: "keys of the block make a web identity of no effect",
            block: "access_key = \"BLOCK\"\nsecret_key = \"s\"\nassume_role_with_web_identity = {\nrole_arn = \"arn:aws:iam::000000000000:role/web\"\nweb_identity_token = \"a.b.c\"\n}",
            seen: "BLOCK",
            ..PLAIN
        },
    ] {
        assert_alike(&case);
    }
}

#[test]
fn proxies_certificates_and_trust_are_terraforms() {
    const NAMES: &str = "endpoints = { s3 = \"http://s3.internal\", dynamodb = \"http://dynamodb.internal\" }\n";
    const TLS: &str = "endpoints = { s3 = \"https://127.0.0.1:{tls}\", dynamodb = \"https://127.0.0.1:{tls}\" }\nuse_path_style = true\n";
    let with = |more: &'static str, less: &'static str| -> &'static str {
        Box::leak(format!("{less}{more}").into_boxed_str())
    };
    for case in [
        Case {
            name: "a proxy of the block, a bucket in the host",
            block: with("http_proxy = \"http://127.0.0.1:{port}\"", NAMES),
            seen: "s3 {bucket}.s3.internal",
            ..PLAIN
        },
        Case {
            name: "a proxy of the environment, in small letters",
            block: NAMES,
            environment: &[("http_proxy", "127.0.0.1:{port}")],
            seen: "s3 {bucket}.s3.internal",
            ..PLAIN
        },
        Case {
            name: "no proxy for the services, which are here",
            environment: &[("HTTP_PROXY", "http://127.0.0.1:1"), ("NO_PROXY", "127.0.0.1")],
            seen: "s3 127.0.0.1",
            ..PLAIN
        },
        Case {
            name: "authorities of the block",
            block: with("custom_ca_bundle = \"{above}/ca.pem\"", TLS),
            environment: &[("AWS_CA_BUNDLE", "/nowhere")],
            seen: "tls s3",
            ..PLAIN
        },
        Case {
            name: "authorities of the environment",
            block: TLS,
            environment: &[("AWS_CA_BUNDLE", "{above}/ca.pem")],
            seen: "tls dynamodb",
            ..PLAIN
        },
        Case { name: "no certificate is checked", block: with("insecure = true", TLS), seen: "tls s3", ..PLAIN },
        Case {
            name: "nor one behind a proxy",
            block: "insecure = true\nhttps_proxy = \"http://127.0.0.1:{port}\"",
            environment: &[("AWS_ENDPOINT_URL", "")],
            seen: "s3 {bucket}.s3.us-east-1.amazonaws.com",
            ..PLAIN
        },
        Case {
            name: "nor that of a proxy",
            block: "insecure = true\nhttps_proxy = \"https://anna:p%40ss@127.0.0.1:{tls}\"",
            environment: &[("AWS_ENDPOINT_URL", "")],
            seen: "tls s3 {bucket}.s3.us-east-1.amazonaws.com",
            ..PLAIN
        },
        Case {
            name: "a proxy that is reached by TLS",
            block: "custom_ca_bundle = \"{above}/ca.pem\"\nhttps_proxy = \"https://anna:p%40ss@127.0.0.1:{tls}\"",
            environment: &[("AWS_ENDPOINT_URL", "")],
            seen: "tls dynamodb dynamodb.us-east-1.amazonaws.com",
            ..PLAIN
        },
        Case {
            name: "a broken certificate among good ones, and a proxy that nothing goes through",
            block: with("custom_ca_bundle = \"{above}/mixed.pem\"", TLS),
            environment: &[("HTTP_PROXY", "socks5://127.0.0.1:1")],
            seen: "tls s3",
            ..PLAIN
        },
        Case {
            name: "Terraform's proxy for http serves https",
            block: "insecure = true\nhttp_proxy = \"http://127.0.0.1:{port}\"",
            environment: &[("AWS_ENDPOINT_URL", "")],
            seen: "dynamodb dynamodb.us-east-1.amazonaws.com",
            ..PLAIN
        },
    ] {
        assert_alike(&case);
    }
}

#[test]
fn a_customers_key_goes_with_each_read() {
    assert_alike(&Case {
        name: "of the block",
        block: "encrypt = true\nsse_customer_key = \"MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE=\"",
        seen: "with a key",
        ..PLAIN
    });
    assert_alike(&Case {
        name: "of the environment",
        block: "encrypt = true",
        environment: &[("AWS_SSE_CUSTOMER_KEY", "MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE=")],
        seen: "with a key",
        ..PLAIN
    });
}

/// AWS's own hosts, simulated by a proxy with a trusted authority.
#[test]
fn the_host_names_of_aws_are_terraforms() {
    for (name, block, environment, seen) in [
        ("plain", "", None, "s3 {bucket}.s3.eu-west-1.amazonaws.com eu-west-1"),
        ("path style", "use_path_style = true", None, "s3 s3.eu-west-1.amazonaws.com"),
        ("FIPS", "use_fips_endpoint = true", None, "s3 {bucket}.s3-fips."),
        ("dual stack", "use_dualstack_endpoint = true", None, "s3 {bucket}.s3.dualstack.eu-west-1.amazonaws.com"),
        ("FIPS of the environment", "", Some("AWS_USE_FIPS_ENDPOINT"), "dynamodb dynamodb-fips."),
        (
            "dual stack of the environment",
            "",
            Some("AWS_USE_DUALSTACK_ENDPOINT"),
            "dynamodb dynamodb.eu-west-1.api.aws",
        ),
        ("China", "region = \"cn-north-1\"", None, "s3 {bucket}.s3.cn-north-1.amazonaws.com.cn"),
        ("no proxy for S3, which is not to be had then", "no_proxy = \".nowhere.example\"", None, "s3 {bucket}."),
    ] {
        let region = if block.contains("region") { "" } else { "region = \"eu-west-1\"" };
        let way = "https_proxy = \"http://127.0.0.1:{port}\"\ncustom_ca_bundle = \"{above}/ca.pem\"";
        let mut variables = vec![("AWS_ENDPOINT_URL", "")];
        variables.extend(environment.map(|name| (name, "true")));
        assert_alike(&Case {
            name,
            block: Box::leak(format!("{region}\n{block}\n{way}").into_boxed_str()),
            environment: Box::leak(variables.into_boxed_slice()),
            seen,
            ..PLAIN
        });
    }
}

/// Every attribute of the schema is in the list, so that no new one is overlooked.
#[test]
fn every_attribute_that_this_terraform_caches_is_in_the_list() {
    let env = TestEnv::new(Lock::Both, "true");
    let cached: serde_json::Value = serde_json::from_str(&env.read(".terraform/terraform.tfstate")).unwrap();
    let document = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/backend-s3.md")).unwrap();
    let config = cached["backend"]["config"].as_object().unwrap();
    assert!(config.len() > 40, "{config:?}");
    for name in config.keys() {
        let whole = document.contains(&format!("| `{name}` |")) || document.contains(&format!("| `{name}."));
        assert!(whole, "{name} is not in docs/backend-s3.md");
    }
}

/// The SSO cache names its files by a SHA-1. A case above contains one.
#[test]
fn the_name_of_the_sso_cache_in_these_tests_is_right() {
    let output = Command::new(tool("python3"))
        .args(["-c", "import hashlib; print(hashlib.sha1(b'corp').hexdigest())"])
        .output()
        .unwrap();
    let own = include_str!("reached_alike.rs");
    assert!(own.contains(String::from_utf8(output.stdout).unwrap().trim()));
}
