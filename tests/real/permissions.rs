//! docs/iam: each policy is sufficient for its purpose in docs/iam.md, and nothing in it is superfluous. The tests run
//! in a cloud that checks signatures and policies.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Mutex, OnceLock};

use serde_json::{Value, json};

use super::locks_release::locks;
use crate::support::clean::clean;
use crate::support::cloud::{Cloud, tool};
use crate::support::process::Run;
use crate::support::test_env::{APPLY, WAITS, lock_json};
use crate::support::{Ended, Lock, Subject, TestEnv};

const KEY: &str = "dir/prod.tfstate";

/// A cloud in which every action needs a policy, and its root user.
struct Account {
    cloud: Cloud,
    root: Mutex<(ChildStdin, BufReader<ChildStdout>)>,
    /// Exits when this process closes its stdin.
    _python: Child,
}

/// A process for the root user. AWS's own client takes a second to start, so it is started once.
const ROOT: &str = r#"
import json, sys, botocore.session
session = botocore.session.get_session()
make = lambda name: session.create_client(name, region_name="us-east-1", endpoint_url=sys.argv[1],
                                          aws_access_key_id="test", aws_secret_access_key="test")
s3, dynamodb, iam = make("s3"), make("dynamodb"), make("iam")

def place(bucket, table):
    s3.create_bucket(Bucket=bucket)
    dynamodb.create_table(TableName=table, BillingMode="PAY_PER_REQUEST",
                          AttributeDefinitions=[dict(AttributeName="LockID", AttributeType="S")],
                          KeySchema=[dict(AttributeName="LockID", KeyType="HASH")])

def user(name):
    iam.create_user(UserName=name)
    return iam.create_access_key(UserName=name)["AccessKey"]

def allow(name, policies):
    for policy in iam.list_user_policies(UserName=name)["PolicyNames"]:
        iam.delete_user_policy(UserName=name, PolicyName=policy)
    for number, policy in enumerate(policies):
        iam.put_user_policy(UserName=name, PolicyName=f"p{number}", PolicyDocument=json.dumps(policy))

def role(name, trust, policies):
    iam.create_role(RoleName=name, AssumeRolePolicyDocument=json.dumps(trust))
    for number, policy in enumerate(policies):
        iam.put_role_policy(RoleName=name, PolicyName=f"p{number}", PolicyDocument=json.dumps(policy))

def items(table):
    return dynamodb.scan(TableName=table, ConsistentRead=True)["Items"]

def keys(bucket):
    return [one["Key"] for one in s3.list_objects_v2(Bucket=bucket).get("Contents", [])]

def standing(bucket, table):
    return [one["LockID"]["S"] for one in items(table) if "Info" in one] + [
        f"{bucket}/{key}" for key in keys(bucket) if key.endswith(".tflock")]

def forget(bucket, table):
    for one in items(table):
        dynamodb.delete_item(TableName=table, Key={"LockID": one["LockID"]})
    for key in keys(bucket):
        s3.delete_object(Bucket=bucket, Key=key)

def lock(bucket, table, key, info):
    dynamodb.put_item(TableName=table, Item={"LockID": {"S": f"{bucket}/{key}"}, "Info": {"S": info}})
    s3.put_object(Bucket=bucket, Key=key + ".tflock", Body=info.encode())

def digest(bucket, table, key, text):
    dynamodb.put_item(TableName=table, Item={"LockID": {"S": f"{bucket}/{key}-md5"}, "Digest": {"S": text}})

for line in sys.stdin:
    name, *arguments = json.loads(line)
    print(json.dumps(globals()[name](*arguments), default=str), flush=True)
"#;

fn account() -> &'static Account {
    static ACCOUNT: OnceLock<Account> = OnceLock::new();
    ACCOUNT.get_or_init(|| {
        let cloud = Cloud::start(&[("AUTH", "true")]);
        let mut python = clean(&mut Command::new(tool("python3")))
            .args(["-c", ROOT, &format!("http://127.0.0.1:{}", cloud.port)])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let root = (python.stdin.take().unwrap(), BufReader::new(python.stdout.take().unwrap()));
        Account { cloud, root: Mutex::new(root), _python: python }
    })
}

impl Account {
    /// Calls a function of the root's process: its name, and its arguments.
    #[track_caller]
    fn root(&self, call: &Value) -> Value {
        let mut root = self.root.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        writeln!(root.0, "{call}").unwrap();
        let mut answer = String::new();
        root.1.read_line(&mut answer).unwrap();
        // The process writes its errors to stderr itself.
        assert!(!answer.is_empty(), "{call}");
        serde_json::from_str(&answer).unwrap()
    }
}

/// One action on one resource.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Grant {
    action: String,
    resource: String,
}

impl Grant {
    fn name(&self) -> &str {
        self.action.split_once(':').unwrap().1
    }

    /// Whether it is needed to read or to delete the lock of the default workspace.
    fn is_for_a_release(&self) -> bool {
        let of_lock = self.resource.contains(":table/") || self.resource.ends_with(".tflock");
        of_lock && !self.resource.contains("env:") && !self.name().starts_with("Put")
    }
}

/// Returns a policy with all of `grants` except `missing`.
fn without(missing: Option<&Grant>, grants: &[Grant]) -> Value {
    let others = grants.iter().filter(|grant| Some(*grant) != missing);
    let statements = others.map(|grant| json!({"Effect": "Allow", "Action": grant.action, "Resource": grant.resource}));
    json!({"Version": "2012-10-17", "Statement": statements.collect::<Vec<_>>()})
}

/// Returns the single grants of some policies.
fn grants(policies: &[Value]) -> Vec<Grant> {
    let list = |value: &Value| match value {
        Value::Array(all) => all.iter().map(|one| one.as_str().unwrap().to_owned()).collect(),
        one => vec![one.as_str().unwrap().to_owned()],
    };
    let mut all = Vec::new();
    for statement in policies.iter().flat_map(|policy| policy["Statement"].as_array().unwrap()) {
        assert_eq!(statement["Effect"], "Allow", "{statement}");
        for action in list(&statement["Action"]) {
            for resource in list(&statement["Resource"]) {
                all.push(Grant { action: action.clone(), resource });
            }
        }
    }
    all
}

/// A [`TestEnv`] in that account, with its own user.
struct Place {
    env: TestEnv,
    user: String,
}

impl Place {
    /// Returns an initialized one, whose user may do everything.
    fn new(lock: Lock, command: &str) -> Self {
        let place = Self::empty(lock);
        place.env.write_main("", command);
        place.env.init();
        place
    }

    fn empty(lock: Lock) -> Self {
        let mut env = TestEnv::empty(lock);
        account().root(&json!(["place", env.bucket, env.table]));
        let user = format!("user-{}", env.bucket);
        let key = account().root(&json!(["user", user]));
        env.set("AWS_ACCESS_KEY_ID", key["AccessKeyId"].as_str().unwrap());
        env.set("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"].as_str().unwrap());
        env.set("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{}", account().cloud.port));
        env.set("AWS_REGION", "us-east-1");
        let place = Self { env, user };
        place.allow(&[json!({"Version": "2012-10-17", "Statement": [
            {"Effect": "Allow", "Action": "*", "Resource": "*"},
        ]})]);
        place
    }

    /// Returns policies from the docs, with the names of this [`TestEnv`].
    fn policies(&self, names: &[&str]) -> Vec<Value> {
        let read = |name: &&str| {
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("docs/iam/{name}.json"));
            let text = fs::read_to_string(&path).unwrap();
            let text = text.replace("example-terraform-state", &self.env.bucket);
            let text = text.replace("terraform-locks", &self.env.table).replace("/prod/", "/dir/");
            serde_json::from_str(&text.replace("terraform-backend", &self.role())).unwrap()
        };
        names.iter().map(read).collect()
    }

    fn role(&self) -> String {
        format!("role-{}", self.env.bucket)
    }

    /// From now on, the user may do what these policies allow, and nothing else.
    fn allow(&self, policies: &[Value]) {
        account().root(&json!(["allow", self.user, policies]));
    }

    fn standing(&self) -> Vec<String> {
        let all = account().root(&json!(["standing", self.env.bucket, self.env.table]));
        serde_json::from_value(all).unwrap()
    }

    /// Deletes everything that runs have left.
    fn forget(&self) {
        account().root(&json!(["forget", self.env.bucket, self.env.table]));
        for name in ["began", "go", "trace", ".terraform/environment"] {
            let _ = fs::remove_file(self.env.directory.join(name));
        }
        let _ = fs::remove_dir_all(self.env.directory.parent().unwrap().join("home/.local"));
    }

    /// Puts a lock of this user on this host into both services. It is older than the boot of the machine.
    fn put_old_lock(&self) {
        let mut info: Value =
            serde_json::from_str(&lock_json("22222222-3333-4444-5555-666666666666", &self.env.path())).unwrap();
        info["Created"] = "2020-01-01T00:00:00Z".into();
        account().root(&json!(["lock", self.env.bucket, self.env.table, KEY, info.to_string()]));
    }

    fn break_digest(&self) {
        let wrong = "0".repeat(32);
        account().root(&json!(["digest", self.env.bucket, self.env.table, KEY, wrong]));
    }

    /// Runs `tf locks` with these words. TABLE, BUCKET and PATH are replaced by the names of this [`TestEnv`].
    fn locks(&self, words: &str) -> Ended {
        let real = |word| match word {
            "TABLE" => self.env.table.clone(),
            "BUCKET" => self.env.bucket.clone(),
            "PATH" => self.env.path(),
            other => other.to_owned(),
        };
        let words: Vec<String> = words.split(' ').map(real).collect();
        locks(&self.env, &words.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// Makes every kind of request that terraform makes to its backend, beginning with a backend without a state.
    ///
    /// # Errors
    /// Fails with the first command that fails.
    fn terraform(&self) -> Result<(), Ended> {
        self.forget();
        for words in [
            &APPLY[..],
            &["workspace", "new", "green"],
            &["workspace", "select", "default"],
            &["workspace", "delete", "green"],
            &["apply", "-auto-approve", "-no-color", "-replace=terraform_data.a"],
        ] {
            let end = self.env.run(Subject::Bare, words);
            if end.code() != Some(0) {
                return Err(end);
            }
        }
        Ok(())
    }

    /// Kills a terraform below `tf` while it applies. Shortly before that, the user's policies become `then`, if there
    /// are any.
    fn killed(&self, then: Option<&[Value]>) -> Ended {
        self.forget();
        let run = self.env.start_apply(Subject::Tf);
        if let Some(policies) = then {
            // A keeper must not lose a permission while it tests the service.
            self.env.wait_for_lease();
            self.allow(policies);
        }
        run.kill_terraform();
        run.wait()
    }
}

/// Returns the names of the policies that a kind of lock needs.
fn files(lock: Lock) -> &'static [&'static str] {
    match lock {
        Lock::DynamoDb => &["terraform-dynamodb"],
        Lock::File => &["terraform-lockfile"],
        Lock::Both => &["terraform-dynamodb", "terraform-lockfile"],
    }
}

fn the_policy_of_the_docs_is_enough_for_terraform_and_for_a_release(lock: Lock) {
    let place = Place::empty(lock);
    place.env.write_main("", "true");
    place.allow(&place.policies(files(lock)));
    place.env.init();
    let ended = place.terraform();
    assert!(ended.is_ok(), "{lock:?}: {ended:?}");
    place.env.write_main("", WAITS);
    let end = place.killed(None);
    assert!(end.err.contains("released the lock"), "{lock:?}: {}", place.env.dump(&end));
    assert!(!end.err.contains("Denied"), "{lock:?}: {}", end.err);
    assert_eq!(place.standing(), [""; 0]);
}
for_each_lock!(the_policy_of_the_docs_is_enough_for_terraform_and_for_a_release);

/// Checks that terraform fails if any grant of the policies is missing.
fn assert_terraform_needs_all_of(lock: Lock) {
    let place = Place::new(lock, "true");
    let all = grants(&place.policies(files(lock)));
    for missing in &all {
        place.allow(&[without(Some(missing), &all)]);
        let end = place.terraform().expect_err(&format!("terraform does not need {missing:?}"));
        // Terraform reads a state with HEAD, whose refusal has no text. If it cannot list a bucket, it sees no
        // workspaces.
        let named = match (missing.name(), missing.resource.ends_with(".tfstate")) {
            ("GetObject", true) => "HeadObject",
            ("ListBucket", _) => "\"green\" doesn't exist",
            (name, _) => name,
        };
        assert!(end.err.contains(named) || end.out.contains(named), "{missing:?}: {}", place.env.dump(&end));
    }
}

#[test]
fn nothing_is_superfluous_in_the_policy_for_a_table() {
    assert_terraform_needs_all_of(Lock::DynamoDb);
}

#[test]
fn nothing_is_superfluous_in_the_policy_for_a_lockfile() {
    assert_terraform_needs_all_of(Lock::File);
}

fn a_release_needs_to_read_its_lock_and_to_delete_it_and_names_what_is_missing(lock: Lock) {
    let place = Place::new(lock, WAITS);
    let all = place.policies(files(lock));
    let mut needed = grants(&all);
    needed.retain(Grant::is_for_a_release);
    assert_eq!(needed.len(), if lock == Lock::Both { 4 } else { 2 }, "{needed:?}");
    let end = place.killed(Some(&[without(None, &needed)]));
    assert!(end.err.contains("released the lock"), "{lock:?}: {}", place.env.dump(&end));
    assert_eq!(place.standing(), [""; 0]);
    for missing in needed.iter().filter(|_| lock != Lock::Both) {
        place.allow(&all);
        let end = place.killed(Some(&[without(Some(missing), &needed)]));
        let told = end.err.contains("was not released") && end.err.contains(&missing.action);
        assert!(told, "{missing:?}: {}", place.env.dump(&end));
        assert_eq!(place.standing().len(), 1, "{missing:?}");
    }
}
for_each_lock!(a_release_needs_to_read_its_lock_and_to_delete_it_and_names_what_is_missing);

/// Everything that an auditor does, on a location with an old lock.
const AUDIT: [&str; 7] = [
    "list",
    "show",
    "list --table TABLE",
    "list --bucket BUCKET",
    "audit --older-than 1h",
    "audit --older-than 1h --table TABLE",
    "audit --older-than 1h --bucket BUCKET",
];

#[test]
fn the_policy_of_the_docs_is_enough_for_an_audit_and_for_no_change() {
    let place = Place::new(Lock::Both, "true");
    place.put_old_lock();
    place.allow(&place.policies(&["audit"]));
    for words in AUDIT {
        let end = place.locks(words);
        assert_eq!(end.code(), Some(2), "{words}: {}", place.env.dump(&end));
        assert!(end.out.contains(&place.env.path()), "{words}: {}", end.out);
        assert_eq!(end.err, "", "{words}");
    }
    for words in ["release --yes", "release --yes --table TABLE PATH", "release --yes --bucket BUCKET PATH"] {
        let end = place.locks(words);
        assert_eq!(end.code(), Some(1), "{words}: {}", place.env.dump(&end));
        assert!(end.err.contains(":Delete"), "{words}: {}", end.err);
    }
    assert_eq!(place.standing().len(), 2);
}

#[test]
fn nothing_is_superfluous_in_the_policy_for_an_audit() {
    let place = Place::new(Lock::Both, "true");
    place.put_old_lock();
    let all = grants(&place.policies(&["audit"]));
    for missing in &all {
        place.allow(&[without(Some(missing), &all)]);
        let words = if missing.action.starts_with("s3:") { "list --bucket BUCKET" } else { "list --table TABLE" };
        let end = place.locks(words);
        let named = end.out.contains(&missing.action) || end.err.contains(&missing.action);
        assert!(named, "{missing:?}: {}", place.env.dump(&end));
        // If a table cannot be described, it is read slowly, but completely.
        let shown = end.out.contains("likely_dead");
        assert_eq!(shown, missing.name() == "DescribeTable", "{missing:?}: {}", place.env.dump(&end));
    }
}

/// A lock that cannot be read is no proof that there is none.
#[test]
fn an_audit_that_may_not_read_a_lock_does_not_end_well() {
    let place = Place::new(Lock::File, "true");
    place.put_old_lock();
    let all = grants(&place.policies(&["audit"]));
    let read = all.iter().find(|grant| grant.action == "s3:GetObject").unwrap();
    place.allow(&[without(Some(read), &all)]);
    for words in [
        "audit --older-than 1h --bucket BUCKET",
        "audit --older-than 1h --bucket BUCKET --json",
        "audit --older-than 1h --bucket BUCKET --prometheus",
        "list --bucket BUCKET",
        "list --bucket BUCKET --json",
    ] {
        let end = place.locks(words);
        assert_eq!(end.code(), Some(1), "{words}: {}", place.env.dump(&end));
        assert!(end.err.contains("s3:GetObject is missing"), "{words}: {}", end.err);
        let whole = ["\"complete\":true", "\ntf_locks_scan_complete 1\n"];
        assert!(!whole.iter().any(|whole| end.out.contains(whole)), "{words}: {}", end.out);
    }
}

/// With a table alone, the user has no permission for objects other than states, and needs none.
#[test]
fn with_a_table_alone_terraforms_own_policy_is_enough_for_tf_locks() {
    let place = Place::new(Lock::DynamoDb, "true");
    place.allow(&place.policies(files(Lock::DynamoDb)));
    let end = place.locks("doctor");
    assert!(!end.out.contains("WRONG"), "{}", place.env.dump(&end));
    place.put_old_lock();
    for words in ["list", "show", "audit --older-than 1h"] {
        let end = place.locks(words);
        assert_eq!(end.code(), Some(2), "{words}: {}", place.env.dump(&end));
        assert!(end.err.contains("the .tflock objects were not checked"), "{words}: {}", end.err);
    }
    let end = place.locks("release --yes");
    assert_eq!(end.code(), Some(0), "{}", place.env.dump(&end));
    // The object belongs to another backend.
    let left = place.standing();
    assert!(left.len() == 1 && left[0].ends_with(".tflock"), "{left:?}");
}

/// One part is deleted by then, and the other still keeps terraform from locking.
#[test]
fn a_release_that_stops_half_way_says_so() {
    let place = Place::new(Lock::Both, "true");
    place.put_old_lock();
    let all = grants(&place.policies(&["operator"]));
    let delete = all.iter().find(|grant| grant.action == "s3:DeleteObject").unwrap();
    place.allow(&[without(Some(delete), &all)]);
    let end = place.locks("release --yes");
    assert_eq!(end.code(), Some(1), "{}", place.env.dump(&end));
    assert!(end.err.contains("lack s3:DeleteObject on"), "{}", end.err);
    assert!(end.err.contains("the other part of the lock was deleted"), "{}", end.err);
    assert_eq!(place.standing().len(), 1);
}

#[test]
fn the_policy_of_the_docs_is_enough_for_an_operator() {
    let place = Place::new(Lock::Both, "true");
    assert_eq!(place.env.run(Subject::Bare, &["apply", "-auto-approve"]).code(), Some(0));
    place.allow(&place.policies(&["operator"]));
    let doctor = place.locks("doctor");
    assert_eq!(doctor.code(), Some(0), "{}", place.env.dump(&doctor));
    assert!(
        !doctor.out.contains("Denied") && !doctor.out.contains("permission denied") && !doctor.out.contains(" lack "),
        "{}",
        doctor.out
    );
    for all in [
        &["release --yes"][..],
        // It releases the object too.
        &["release --yes --table TABLE PATH"],
        &["release --force 22222222-3333-4444-5555-666666666666"],
    ] {
        place.put_old_lock();
        for words in all {
            let end = place.locks(words);
            assert_eq!(end.code(), Some(0), "{words}: {}", place.env.dump(&end));
        }
        assert_eq!(place.standing(), [""; 0], "{all:?}");
    }
    place.break_digest();
    let end = place.locks("doctor --fix-digest --yes");
    assert_eq!(end.code(), Some(0), "{}", place.env.dump(&end));
    assert_eq!(place.standing(), [""; 0]);
    assert_eq!(place.locks("doctor").code(), Some(0));
}

#[test]
fn nothing_is_superfluous_in_the_policy_for_an_operator() {
    let place = Place::new(Lock::Both, "true");
    let all = grants(&place.policies(&["operator"]));
    let everything = place.policies(&["operator", "terraform-dynamodb", "terraform-lockfile"]);
    for missing in &all {
        place.forget();
        place.allow(&everything);
        assert_eq!(place.env.run(Subject::Bare, &["apply", "-auto-approve"]).code(), Some(0));
        place.allow(&[without(Some(missing), &all)]);
        let doctor = place.locks("doctor");
        place.put_old_lock();
        let release = place.locks("release --yes");
        place.break_digest();
        // It needs the lock.
        let fix = place.locks("doctor --fix-digest --yes");
        let told = [&doctor, &release, &fix].map(|end| format!("{}{}", end.out, end.err)).concat();
        let named = match missing.name() {
            "DescribeTable" => "permission denied: dynamodb:DescribeTable",
            _ => &missing.action,
        };
        assert!(told.contains(named), "{missing:?}: {told}");
        // Two of the permissions are for requests that a release does not need.
        let ends = [doctor.code(), release.code(), fix.code()];
        let well = ends == [Some(0); 3];
        let optional = ["DescribeTable", "GetBucketVersioning"].contains(&missing.name());
        assert_eq!(well, optional, "{missing:?}: {ends:?} {told}");
    }
}

#[test]
fn a_role_with_the_policies_of_the_docs_is_enough_for_a_release() {
    let place = Place::empty(Lock::Both);
    let env = &place.env;
    let trust = json!({"Version": "2012-10-17", "Statement": [
        {"Effect": "Allow", "Principal": {"AWS": "arn:aws:iam::000000000000:root"}, "Action": "sts:AssumeRole"},
    ]});
    account().root(&json!(["role", place.role(), trust, place.policies(files(Lock::Both))]));
    env.write_main("", WAITS);
    let role = format!("assume_role = {{ role_arn = \"arn:aws:iam::000000000000:role/{}\" }}\nregion = ", place.role());
    env.write("main.tf", &env.read("main.tf").replacen("region = ", &role, 1));
    // The user has no permission at all, and then only that to assume the role.
    for (policies, ends) in [(place.policies(&[]), Some(1)), (place.policies(&["assume-role"]), Some(0))] {
        place.allow(&policies);
        let mut init = env.command(env.bin().join("terraform"));
        init.args(["init", "-no-color"]);
        let end = Run::start(init).wait();
        assert_eq!(end.code(), ends, "{}", env.dump(&end));
        assert_eq!(end.err.contains("sts:AssumeRole"), ends == Some(1), "{}", env.dump(&end));
    }
    let end = place.killed(None);
    assert!(end.err.contains("released the lock"), "{}", env.dump(&end));
    assert_eq!(place.standing(), [""; 0]);
}
