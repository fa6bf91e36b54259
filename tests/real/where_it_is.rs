//! Where the run's backend is: not always where the working directory says so, and not for all of the run.

use std::fs;

use nix::sys::signal::{Signal, kill};
use serde_json::json;

use crate::support::cloud::cloud;
use crate::support::household::{Sweep, guardian_of, home, kill_all, tf_of, wait_until_gone};
use crate::support::http::Message;
use crate::support::process::terraform_below;
use crate::support::proxy::{Deed, Proxy};
use crate::support::world::{WAITS, id_of};
use crate::support::{Lock, Run, Subject, World, wait_for};

/// A second backend: a bucket, and a table in another region.
struct Destination {
    bucket: String,
    table: String,
}

const REGION: &str = "eu-west-1";

impl Destination {
    fn new(world: &World) -> Self {
        let destination = Self { bucket: format!("{}-dst", world.bucket), table: format!("{}-dst", world.table) };
        assert_eq!(cloud().s3("PUT", &destination.bucket, b"").status(), 200);
        let table = json!({
            "TableName": destination.table, "BillingMode": "PAY_PER_REQUEST",
            "AttributeDefinitions": [{"AttributeName": "LockID", "AttributeType": "S"}],
            "KeySchema": [{"AttributeName": "LockID", "KeyType": "HASH"}],
        });
        cloud().dynamodb_in(REGION, "CreateTable", &table);
        destination
    }

    fn block(&self) -> String {
        format!(
            "bucket = \"{}\"\nkey = \"new/prod.tfstate\"\nregion = \"{REGION}\"\nuse_path_style = true\n\
             dynamodb_table = \"{}\"\nuse_lockfile = true\n",
            self.bucket, self.table
        )
    }

    /// The halves that stand for the default workspace.
    fn locks(&self) -> Vec<String> {
        self.locks_of("new/prod.tfstate")
    }

    fn locks_of(&self, key: &str) -> Vec<String> {
        let query = json!({"TableName": self.table, "Key": {"LockID": {"S": format!("{}/{key}", self.bucket)}}, "ConsistentRead": true});
        let item = cloud().dynamodb_in(REGION, "GetItem", &query)["Item"]["Info"]["S"].as_str().map(ToOwned::to_owned);
        item.into_iter().chain(cloud().object(&format!("{}/{key}.tflock", self.bucket))).collect()
    }
}

/// A state in the first backend, and a configuration that asks for the second.
fn about_to_move() -> (World, Destination) {
    let world = World::new(Lock::Both, "true");
    let end = world.run(Subject::Bare, &["apply", "-auto-approve", "-no-color"]);
    assert_eq!(end.code(), Some(0), "{}", world.story(&end));
    let destination = Destination::new(&world);
    let text = world.read("main.tf").replace(&world.backend("dir/prod.tfstate"), &destination.block());
    world.write("main.tf", &text);
    (world, destination)
}

/// Holds back every write of a state whose place contains `what`. Buckets are asked for in their own region.
fn hold(world: &mut World, what: &str) -> Proxy {
    let what = what.to_owned();
    let holds = move |request: &Message| {
        request.start.starts_with("PUT ") && request.start.contains(&what) && !request.start.contains(".tflock")
    };
    let proxy = Proxy::start_changing(
        cloud().port,
        |request| {
            let to_s3 = request.header("x-amz-target").is_none();
            for (name, value) in request.headers.iter_mut().filter(|_| to_s3) {
                if name.eq_ignore_ascii_case("authorization") {
                    *value = value.replace("/eu-west-1/", "/us-east-1/");
                }
            }
        },
        move |request| if holds(request) { Deed::Hold } else { Deed::Pass },
    );
    world.set("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{}", proxy.port));
    proxy
}

/// A migration that stands still with both of its locks.
fn start_migration(world: &World, proxy: &Proxy, destination: &Destination, subject: Subject, more: &[&str]) -> Run {
    let arguments = [&["init", "-migrate-state", "-force-copy", "-no-color"], more].concat();
    let run = world.start(subject, &arguments);
    proxy.wait_until_held();
    wait_for(
        "both locks",
        || (world.locks().len() == 2 && destination.locks().len() == 2).then_some(()),
        || world.trace(),
    );
    run
}

#[test]
fn bare_a_killed_migration_leaves_two_locks_in_two_backends() {
    let (mut world, destination) = about_to_move();
    let proxy = hold(&mut world, &destination.bucket);
    let run = start_migration(&world, &proxy, &destination, Subject::Bare, &[]);
    kill(run.pid(), Signal::SIGKILL).unwrap();
    proxy.let_go();
    run.wait();
    assert_eq!((world.locks().len(), destination.locks().len()), (2, 2));
}

#[test]
fn a_killed_migration_gives_both_locks_back_across_regions_and_tables() {
    let (mut world, destination) = about_to_move();
    let proxy = hold(&mut world, &destination.bucket);
    let run = start_migration(&world, &proxy, &destination, Subject::Tf, &[]);
    run.kill_terraform();
    proxy.let_go();
    let end = run.wait();
    assert_eq!(end.err.matches("released the lock").count(), 2, "{}", world.story(&end));
    assert!(world.locks().is_empty() && destination.locks().is_empty(), "{}", world.story(&end));
}

/// The destination stands in arguments alone, in a file and on the command line.
#[test]
fn a_migration_whose_destination_is_on_the_command_line_gives_both_back() {
    let (mut world, destination) = about_to_move();
    let text = world.read("main.tf").replace(&destination.block(), "");
    world.write("main.tf", &text);
    let block = destination.block();
    let (first, last) = block.split_at(block.find("region").unwrap());
    world.write("prod.tfbackend", last);
    let own: Vec<String> =
        first.lines().map(|line| format!("-backend-config={}", line.replace(" = ", "=").replace('"', ""))).collect();
    world.set("TF_CLI_ARGS_init", own[0].clone());
    let proxy = hold(&mut world, &destination.bucket);
    let run =
        start_migration(&world, &proxy, &destination, Subject::Tf, &["-backend-config", "prod.tfbackend", &own[1]]);
    run.kill_terraform();
    proxy.let_go();
    let end = run.wait();
    assert_eq!(end.err.matches("released the lock").count(), 2, "{}", world.story(&end));
    assert!(world.locks().is_empty() && destination.locks().is_empty(), "{}", world.story(&end));
}

#[test]
fn of_a_migration_whose_tf_is_killed_too_both_go_by_the_guardian_or_the_next_tf() {
    for everything in [false, true] {
        let (mut world, destination) = about_to_move();
        let _sweep = Sweep(home(&world));
        let proxy = hold(&mut world, &destination.bucket);
        let run = start_migration(&world, &proxy, &destination, Subject::Tf, &[]);
        let tf = tf_of(&world);
        let guardian = guardian_of(&world, tf);
        if everything {
            world.wait_for_trace("guardian: journal written: true");
            kill_all(&world);
        } else {
            let terraform = terraform_below(run.pid());
            kill(tf, Signal::SIGKILL).unwrap();
            kill(terraform, Signal::SIGKILL).unwrap();
        }
        proxy.let_go();
        run.wait();
        if everything {
            let end = world.run(Subject::Tf, &["locks", "recover"]);
            assert_eq!(end.out.matches("released the lock").count(), 2, "{}", world.story(&end));
        } else {
            wait_until_gone(&world, guardian);
        }
        assert!(world.locks().is_empty() && destination.locks().is_empty(), "{everything}: {}", world.trace());
    }
}

#[test]
fn a_migration_of_another_workspace_than_the_selected_gives_its_locks_back() {
    let world = World::new(Lock::Both, "true");
    for arguments in
        [&["workspace", "new", "green"][..], &["apply", "-auto-approve"], &["workspace", "select", "default"]]
    {
        let end = world.run(Subject::Bare, arguments);
        assert_eq!(end.code(), Some(0), "{}", world.story(&end));
    }
    let destination = Destination::new(&world);
    let text = world.read("main.tf").replace(&world.backend("dir/prod.tfstate"), &destination.block());
    world.write("main.tf", &text);
    let mut world = world;
    let proxy = hold(&mut world, "green");
    let run = world.start(Subject::Tf, &["init", "-migrate-state", "-force-copy", "-no-color"]);
    proxy.wait_until_held();
    let path = "env:/green/new/prod.tfstate";
    wait_for("a lock", || (!destination.locks_of(path).is_empty()).then_some(()), || world.trace());
    run.kill_terraform();
    proxy.let_go();
    let end = run.wait();
    assert!(end.err.contains("released the lock"), "{}", world.story(&end));
    assert!(destination.locks_of(path).is_empty(), "{}", world.story(&end));
    assert!(world.locks_at("env:/green/dir/prod.tfstate").is_empty(), "{}", world.story(&end));
}

#[test]
fn a_plan_is_locked_where_it_was_made_for_whatever_the_directory_says_by_then() {
    for everything in [false, true] {
        let world = World::new(Lock::Both, WAITS);
        let _sweep = Sweep(home(&world));
        let end = world.run(Subject::Bare, &["plan", "-out=plan.out", "-no-color"]);
        assert_eq!(end.code(), Some(0), "{}", world.story(&end));
        // Another backend is set up since. Terraform applies the plan to the one that it was made for.
        let other = world.read(".terraform/terraform.tfstate").replace("dir/prod.tfstate", "other/prod.tfstate");
        world.write(".terraform/terraform.tfstate", &other);
        let run = world.start(Subject::Tf, &["apply", "-no-color", "plan.out"]);
        world.wait_for_began(&run);
        world.assert_locked();
        if everything {
            world.wait_for_trace("guardian: journal written: true");
            kill_all(&world);
            let end = world.run(Subject::Tf, &["locks", "recover"]);
            assert!(end.out.contains("released the lock"), "{}", world.story(&end));
        } else {
            // It is read before, so that it may be gone by now.
            fs::remove_file(world.directory.join("plan.out")).unwrap();
            run.kill_terraform();
            let end = run.wait();
            assert!(end.err.contains("released the lock"), "{}", world.story(&end));
        }
        world.assert_unlocked();
    }
}

#[test]
fn a_working_directory_that_is_removed_during_the_run_hides_no_lock() {
    let world = World::new(Lock::Both, WAITS);
    let run = world.start_apply(Subject::Tf);
    fs::remove_dir_all(&world.directory).unwrap();
    world.assert_locked();
    run.kill_terraform();
    let end = run.wait();
    assert!(end.err.contains("released the lock"), "{}", world.story(&end));
    world.assert_unlocked();
}

#[test]
fn a_backend_that_is_set_up_anew_during_the_run_hides_no_lock() {
    let world = World::new(Lock::Both, WAITS);
    let run = world.start_apply(Subject::Tf);
    let other = world.read("main.tf").replace("dir/prod.tfstate", "other/prod.tfstate");
    world.write("main.tf", &other);
    let end = world.run(Subject::Bare, &["init", "-reconfigure", "-no-color"]);
    assert_eq!(end.code(), Some(0), "{}", world.story(&end));
    assert!(world.read(".terraform/terraform.tfstate").contains("other/prod.tfstate"));
    run.kill_terraform();
    let end = run.wait();
    assert!(end.err.contains("released the lock"), "{}", world.story(&end));
    world.assert_unlocked();
}

/// `terraform_remote_state` of a workspace that does not exist locks where no block points: its region and its table stand in
/// an expression, and the log does not tell them.
#[test]
fn a_lock_that_no_block_points_to_is_named_and_left_and_ours_is_given_back() {
    let mut world = World::empty(Lock::Both);
    let other = Destination::new(&world);
    let config = other.block().replace('\n', "\n    ");
    let data = format!(
        "data \"terraform_remote_state\" \"other\" {{\n  backend = \"s3\"\n  workspace = \"nope\"\n  config = {{\n    {config}\n  }}\n}}\n"
    );
    world.write_main(&data, "true");
    let proxy = hold(&mut world, "nope");
    world.init();
    let run = world.start(Subject::Tf, &["plan", "-no-color"]);
    proxy.wait_until_held();
    let path = "env:/nope/new/prod.tfstate";
    wait_for("the other lock", || (other.locks_of(path).len() == 2).then_some(()), || world.trace());
    let id = id_of(&other.locks_of(path)[0]);
    run.kill_terraform();
    proxy.let_go();
    let end = run.wait();
    assert!(end.err.contains("released the lock"), "{}", world.story(&end));
    assert!(end.err.contains(&id) && end.err.contains(&format!("{}/{path}", other.bucket)), "{}", world.story(&end));
    world.assert_unlocked();
    assert_eq!(other.locks_of(path).len(), 2, "{}", world.story(&end));
}

/// A world in whose directory `sub` the backend has its credentials in a file that is named relative to it.
fn with_keys_in_sub() -> World {
    let mut world = World::empty(Lock::Both);
    world.set("AWS_ACCESS_KEY_ID", "").set("AWS_SECRET_ACCESS_KEY", "").set("AWS_PROFILE", "there");
    world.write_main("", "trap '' INT; touch ../began; while test -e ../began && ! test -e ../go; do sleep 0.02; done");
    let sub = world.directory.join("sub");
    fs::create_dir(&sub).unwrap();
    let block = world.read("main.tf").replace("region =", "shared_credentials_files = [\"keys\"]\nregion =");
    fs::write(sub.join("main.tf"), block).unwrap();
    fs::remove_file(world.directory.join("main.tf")).unwrap();
    fs::write(sub.join("keys"), "[there]\naws_access_key_id = test\naws_secret_access_key = test\n").unwrap();
    let end = world.run(Subject::Bare, &["-chdir=sub", "init", "-no-color"]);
    assert_eq!(end.code(), Some(0), "{}", world.story(&end));
    world
}

#[test]
fn files_that_are_named_relative_to_chdir_are_found_there() {
    let world = with_keys_in_sub();
    let run = world.start(Subject::Tf, &["-chdir=sub", "apply", "-auto-approve", "-no-color"]);
    world.wait_for_began(&run);
    run.kill_terraform();
    let end = run.wait();
    assert!(end.err.contains("released the lock"), "{}", world.story(&end));
    world.assert_unlocked();
    let end = world.run(Subject::Tf, &["locks", "list", "--chdir", "sub"]);
    assert_eq!(end.code(), Some(0), "{}", world.story(&end));
}

/// Whoever recovers is somewhere else, and may have a file of the same name there, with somebody else's keys.
#[test]
fn files_that_are_gone_with_their_directory_are_not_sought_elsewhere() {
    let world = with_keys_in_sub();
    let _sweep = Sweep(home(&world));
    let run = world.start(Subject::Tf, &["-chdir=sub", "apply", "-auto-approve", "-no-color"]);
    world.wait_for_began(&run);
    world.wait_for_trace("guardian: journal written: true");
    kill_all(&world);
    let [sub, away] = ["sub", "away"].map(|name| world.directory.join(name));
    fs::rename(&sub, &away).unwrap();
    fs::copy(away.join("keys"), world.directory.join("keys")).unwrap();
    let end = world.run(Subject::Tf, &["locks", "recover"]);
    assert!(end.out.contains("keys is not there"), "{}", world.story(&end));
    world.assert_locked();
    // Its record stands as well.
    fs::rename(&away, &sub).unwrap();
    let end = world.run(Subject::Tf, &["locks", "recover"]);
    assert!(end.out.contains("released the lock"), "{}", world.story(&end));
    world.assert_unlocked();
}
