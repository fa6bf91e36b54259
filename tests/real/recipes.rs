//! Runs the files of shell/ci: each one installs a release, runs its job with real terraform, is canceled in the way of
//! its CI system, and finishes with its last step. Their comments say what the systems send; so does `runners`, which
//! also runs bare terraform.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::signal::{Signal, kill};
use serde_json::Value;

use crate::support::cloud::tool;
use crate::support::process::Run;
use crate::support::processes::{
    KillOnDrop, home, marked, tf_of, wait_until_gone, wait_until_ours_are_gone, wait_until_unlocked,
};
use crate::support::test_env::{WAITS, which};
use crate::support::{Ended, Lock, TestEnv};

fn recipe(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("shell/ci").join(name)
}

/// Parses a YAML file.
fn yaml(name: &str) -> Value {
    let program = "import json, sys, yaml\nprint(json.dumps(list(yaml.safe_load_all(open(sys.argv[1])))))";
    let mut python = Command::new(tool("python3"));
    python.args(["-c", program]).arg(recipe(name));
    let end = Run::start(python).wait();
    assert_eq!(end.code(), Some(0), "{}", end.err);
    let documents: Vec<Value> = serde_json::from_str(&end.out).unwrap();
    if documents.len() == 1 { documents.into_iter().next().unwrap() } else { Value::Array(documents) }
}

fn text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(lines) => lines.iter().map(text).collect::<Vec<_>>().join("\n"),
        other => panic!("no script: {other}"),
    }
}

/// Creates a release as the recipes download it: returns its archive and the checksum.
fn release(env: &TestEnv) -> (String, String) {
    let version = env!("CARGO_PKG_VERSION");
    let name = format!("tf-{version}-x86_64-linux");
    let directory = env.directory.parent().unwrap().join("release");
    fs::create_dir_all(directory.join(&name)).unwrap();
    symlink(env!("CARGO_BIN_EXE_tf"), directory.join(&name).join("tf")).unwrap();
    let archive = directory.join(format!("{name}.tar.gz"));
    let mut tar = env.command("tar");
    tar.arg("-C").arg(&directory).arg("-czf").arg(&archive).arg(&name);
    assert_eq!(Run::start(tar).wait().code(), Some(0));
    let mut sum = env.command("sha256sum");
    sum.arg(&archive);
    let sum = Run::start(sum).wait().out.split(' ').next().unwrap().to_owned();
    (format!("file://{}", archive.display()), sum)
}

/// A CI system, and the scripts of its recipe.
struct System {
    name: &'static str,
    /// The command that runs a script; the script's file is appended.
    shell: &'static [&'static str],
    install: String,
    job: String,
    last: String,
    /// The variables that the recipe sets for the job.
    environment: Vec<(&'static str, String)>,
}

/// Returns the variables of `tf` that a recipe sets. `timeout` and `lease` are the places of the recipe that set them.
fn variables(timeout: &Value, lease: &Value) -> Vec<(&'static str, String)> {
    [("TFW_STOP_TIMEOUT", timeout), ("TFW_LEASE", lease)]
        .map(|(name, place)| (name, place[name].as_str().unwrap().to_owned()))
        .into()
}

const GITHUB: &[&str] = &["bash", "-e"];

/// Returns the script steps of a job in GitHub's workflow.
fn github(job: &str) -> System {
    let workflow = yaml("github/workflow.yml");
    let steps: Vec<Value> = workflow["jobs"][job]["steps"].as_array().unwrap().clone();
    let scripts: Vec<&Value> = steps.iter().filter(|step| step["run"].is_string()).collect();
    let [init, apply, last] = scripts[..] else { panic!("{scripts:?}") };
    assert_eq!(last["if"], "always()");
    // Each one is a separate step. Within one step, nothing after an exec would run.
    let init = init["run"].as_str().unwrap().trim_start_matches("exec ");
    System {
        name: if job == "staging" { "GitHub, steps unchanged" } else { "GitHub, exec" },
        shell: GITHUB,
        install: text(&yaml("github/action.yml")["runs"]["steps"][0]["run"]),
        job: format!("{init}\n{}", text(&apply["run"])),
        last: text(&last["run"]),
        environment: variables(&apply["env"], &workflow["env"]),
    }
}

fn gitlab() -> System {
    let job = &yaml("gitlab/tf.gitlab-ci.yml");
    System {
        name: "GitLab",
        shell: &["bash"],
        install: text(&job[".tf"]["before_script"]),
        job: text(&job["apply"]["script"]),
        last: text(&job[".tf"]["after_script"]),
        environment: variables(&job[".tf"]["variables"], &job[".tf"]["variables"]),
    }
}

fn buildkite() -> System {
    let pipeline = yaml("buildkite/pipeline.yml");
    System {
        name: "Buildkite",
        shell: GITHUB,
        install: fs::read_to_string(recipe("buildkite/hooks/pre-command")).unwrap(),
        job: text(&pipeline["steps"][1]["command"]),
        last: fs::read_to_string(recipe("buildkite/hooks/pre-exit")).unwrap(),
        environment: variables(&pipeline["env"], &pipeline["env"]),
    }
}

fn azure() -> System {
    let pipeline = yaml("azure/azure-pipelines.yml");
    let steps = &pipeline["stages"][0]["jobs"][0]["strategy"]["runOnce"]["deploy"]["steps"];
    let script = |number: usize| text(&steps[number]["bash"]);
    assert_eq!(steps[4]["condition"], "always()");
    System {
        name: "Azure Pipelines",
        shell: &["bash"],
        install: script(1),
        job: format!("{}\n{}", script(2).trim_start_matches("exec "), script(3)),
        last: script(4),
        environment: variables(&pipeline["variables"], &pipeline["variables"]),
    }
}

/// Returns the scripts of a declarative pipeline, in the order of the file.
fn jenkins() -> System {
    let file = fs::read_to_string(recipe("jenkins/Jenkinsfile")).unwrap();
    let mut scripts = Vec::new();
    let mut rest = file.as_str();
    while let Some((_, behind)) = rest.split_once(" sh '") {
        let (mark, behind) = behind.strip_prefix("''").map_or(("'", behind), |behind| ("'''", behind));
        let (script, behind) = behind.split_once(mark).unwrap();
        scripts.push(script.to_owned());
        rest = behind;
    }
    let [install, init, _plan, apply, last] = &scripts[..] else { panic!("{scripts:?}") };
    let (lease, _) = file.split_once("TFW_LEASE = '").unwrap().1.split_once('\'').unwrap();
    System {
        name: "Jenkins",
        shell: &["sh", "-xe"],
        install: install.clone(),
        job: format!("{init}\n{apply}"),
        last: last.clone(),
        environment: vec![("TFW_LEASE", lease.to_owned())],
    }
}

fn systems() -> [System; 6] {
    [github("staging"), github("production"), gitlab(), buildkite(), azure(), jenkins()]
}

/// A directory with a job in it, as its CI system prepares it.
struct Job {
    env: TestEnv,
    system: System,
}

impl Job {
    fn new(system: System) -> Self {
        let mut env = TestEnv::empty(Lock::File);
        env.write_main("", WAITS);
        let (url, sum) = release(&env);
        let outside = env.directory.parent().unwrap().to_owned();
        let runner = outside.join("runner");
        fs::create_dir(&runner).unwrap();
        // Only the directory that the recipe adds to PATH contains tf.
        let terraform = outside.join("only-terraform");
        fs::create_dir(&terraform).unwrap();
        symlink(which("terraform").unwrap(), terraform.join("terraform")).unwrap();
        env.set("PATH", format!("{}:/usr/local/bin:/usr/bin:/bin", terraform.display()));
        for (name, value) in [
            ("CI", "true".into()),
            ("TF_URL", url),
            ("TF_SHA256", sum),
            ("TF_SHIM", "true".into()),
            ("TF_TAG", String::new()),
            ("RUNNER_TEMP", runner.display().to_string()),
            ("RUNNER_OS", "Linux".into()),
            ("RUNNER_ARCH", "X64".into()),
            ("GITHUB_PATH", runner.join("path").display().to_string()),
            ("AGENT_TEMPDIRECTORY", runner.display().to_string()),
            ("CI_PROJECT_DIR", env.directory.display().to_string()),
            ("WORKSPACE", env.directory.display().to_string()),
            ("BUILDKITE_BUILD_CHECKOUT_PATH", env.directory.display().to_string()),
        ] {
            env.set(name, value);
        }
        Self { env, system }
    }

    fn command(&self, script: &str) -> Command {
        self.env.write("script", script);
        let mut command = self.env.command(self.system.shell[0]);
        command.args(&self.system.shell[1..]).arg("./script");
        command
    }

    /// Installs `tf`, and applies what the system takes over for the next steps.
    fn install(&mut self) -> Ended {
        // GitLab and Buildkite keep one shell, so its PATH stays in effect. The shell prints it.
        let end = Run::start(self.command(&format!("{}\necho \"PATH=$PATH\"", self.system.install))).wait();
        if end.code() != Some(0) {
            return end;
        }
        let mut path = end.out.lines().rev().find_map(|line| line.strip_prefix("PATH=")).unwrap().to_owned();
        let runner = self.env.directory.parent().unwrap().join("runner");
        let added = fs::read_to_string(runner.join("path")).unwrap_or_default();
        for line in added.lines().chain(end.out.lines().filter_map(|line| line.strip_prefix("##vso[task.prependpath]")))
        {
            path = format!("{line}:{path}");
        }
        if self.system.name == "Jenkins" {
            let home = self.env.directory.join(".tf-bin");
            path = format!("{}/shim:{}:{path}", home.display(), home.display());
        }
        self.env.set("PATH", path);
        for (name, value) in self.system.environment.clone() {
            self.env.set(name, value);
        }
        end
    }

    /// Cancels the job, and waits for everything that the system waits for.
    fn cancel(&self, run: Run) {
        let tf = tf_of(&self.env);
        match self.system.name {
            // Only the first process gets a signal. Bash waits, and dies of the second one, which comes after 7.5 s if
            // the step is still running; here it comes immediately.
            "GitHub, steps unchanged" => {
                assert_ne!(tf, run.pid());
                run.send(Signal::SIGINT);
                run.send(Signal::SIGTERM);
            }
            "GitHub, exec" | "Azure Pipelines" => {
                assert_eq!(tf, run.pid(), "exec leaves no shell in between");
                run.send(Signal::SIGINT);
            }
            "GitLab" | "Buildkite" => run.send_to_group(Signal::SIGTERM),
            // Every process with the cookie, children first.
            _ => {
                for pid in marked(&home(&self.env)).into_iter().rev() {
                    let _ = kill(pid, Signal::SIGTERM);
                }
            }
        }
        run.wait();
        wait_until_gone(&self.env, tf);
    }
}

#[test]
fn a_recipe_installs_what_has_the_checksum_and_nothing_else() {
    for system in systems() {
        let mut job = Job::new(system);
        let name = job.system.name;
        let end = job.install();
        assert_eq!(end.code(), Some(0), "{name}: {}{}", end.out, end.err);
        let shimmed = if name == "GitHub, exec" { "tf" } else { "terraform" };
        let end = Run::start(job.command(&format!("{shimmed} locks history && tf locks history"))).wait();
        assert_eq!(end.code(), Some(0), "{name}: {}{}", end.out, end.err);

        let mut job = Job::new(job.system);
        job.env.set("TF_SHA256", "0".repeat(64));
        let end = job.install();
        assert!(end.code() != Some(0), "{name}: {}{}", end.out, end.err);
        let unpacked = ["runner/tf/tf", "work/.tf-bin/tf"];
        let outside = job.env.directory.parent().unwrap();
        assert!(unpacked.iter().all(|path| fs::symlink_metadata(outside.join(path)).is_err()), "{name}");
    }
}

#[test]
fn a_cancelled_job_of_each_recipe_leaves_no_lock() {
    std::thread::scope(|scope| {
        for system in systems() {
            scope.spawn(move || {
                let mut job = Job::new(system);
                let _kill_on_drop = KillOnDrop(home(&job.env));
                let end = job.install();
                assert_eq!(end.code(), Some(0), "{}: {}{}", job.system.name, end.out, end.err);
                let run = Run::start(job.command(&job.system.job));
                job.env.wait_for_began(&run);
                job.env.assert_locked();
                job.cancel(run);
                let end = Run::start(job.command(&job.system.last)).wait();
                assert_eq!(end.code(), Some(0), "{}: {}{}", job.system.name, end.out, end.err);
                wait_until_unlocked(&job.env);
                wait_until_ours_are_gone(&job.env);
            });
        }
    });
}

/// Everything is killed except the machine: the hardest case of a CI system, or of a kernel that is out of memory.
#[test]
fn the_last_step_of_each_recipe_finishes_what_was_killed() {
    std::thread::scope(|scope| {
        for system in systems() {
            scope.spawn(move || {
                let mut job = Job::new(system);
                let _kill_on_drop = KillOnDrop(home(&job.env));
                assert_eq!(job.install().code(), Some(0), "{}", job.system.name);
                let run = Run::start(job.command(&job.system.job));
                job.env.wait_for_began(&run);
                crate::support::processes::kill_all(&job.env);
                run.wait();
                job.env.assert_locked();
                let end = Run::start(job.command(&job.system.last)).wait();
                assert_eq!(end.code(), Some(0), "{}: {}{}", job.system.name, end.out, end.err);
                assert!(
                    end.out.contains("released the lock that an earlier run left"),
                    "{}: {}",
                    job.system.name,
                    end.out
                );
                job.env.assert_unlocked();
            });
        }
    });
}

/// In Kubernetes it is the first process of its container, without a shell. `runners` tests that in a PID namespace.
#[test]
fn the_kubernetes_job_stops_before_its_grace_period_ends() {
    let documents = yaml("kubernetes/job.yaml");
    let job = documents.as_array().unwrap().iter().find(|document| document["kind"] == "Job").unwrap();
    let pod = &job["spec"]["template"]["spec"];
    let container = &pod["containers"][0];
    let words: Vec<&str> = container["command"].as_array().unwrap().iter().map(|word| word.as_str().unwrap()).collect();
    assert_eq!(words[0], "tf", "a shell in front would take the signal");
    let variables = container["env"].as_array().unwrap();
    let variable =
        |name: &str| variables.iter().find(|entry| entry["name"] == name).unwrap()["value"].as_str().unwrap();
    let timeout: u64 = variable("TFW_STOP_TIMEOUT").trim_end_matches('s').parse().unwrap();
    let grace = pod["terminationGracePeriodSeconds"].as_u64().unwrap();
    // 10 s for a write in flight, 20 s for a lock service that does not respond.
    assert!(timeout + 30 <= grace, "{timeout} {grace}");
    // A pod without a token has its name from these. A witness needs it.
    assert_eq!((&pod["automountServiceAccountToken"], variable("POD_NAMESPACE")), (&false.into(), "terraform"));
    assert_eq!(job["metadata"]["namespace"], "terraform");
    let name = variables.iter().find(|entry| entry["name"] == "POD_NAME").unwrap();
    assert_eq!(name["valueFrom"]["fieldRef"]["fieldPath"], "metadata.name");

    let mut env = TestEnv::new(Lock::File, WAITS);
    env.set("TFW_STOP_TIMEOUT", variable("TFW_STOP_TIMEOUT"));
    env.set("TFW_LEASE", variable("TFW_LEASE"));
    let mut command = env.command(env.bin().join(words[0]));
    command.args(&words[1..]);
    let run = Run::start(command);
    env.wait_for_began(&run);
    run.send(Signal::SIGTERM);
    let end = run.wait();
    assert_eq!(end.code(), Some(1), "{}", env.dump(&end));
    env.assert_unlocked();
}

/// Runs the workflow of Atlantis, step by step, with the variables that Atlantis sets.
#[test]
fn the_steps_of_the_atlantis_workflow_plan_and_apply() {
    let steps = yaml("atlantis/repos.yaml");
    let mut env = TestEnv::new(Lock::File, "true");
    env.set("PLANFILE", env.directory.join("plan.out"));
    let version = "1.11.4";
    symlink(which("terraform").unwrap(), env.bin().join(format!("terraform{version}"))).unwrap();
    for stage in ["plan", "apply"] {
        for step in steps["workflows"]["tf"][stage]["steps"].as_array().unwrap() {
            let mut command = env.command("sh");
            command.env("ATLANTIS_TERRAFORM_VERSION", version).arg("-c");
            if let Some(run) = step["run"].as_str() {
                let end = Run::start({
                    command.arg(run);
                    command
                })
                .wait();
                assert_eq!(end.code(), Some(0), "{run}: {}", env.dump(&end));
            } else if step["env"].is_object() {
                command.arg(step["env"]["command"].as_str().unwrap());
                let value = Run::start(command).wait().out;
                env.set(step["env"]["name"].as_str().unwrap(), value.trim());
            }
        }
    }
    assert!(env.trace().contains("started terraform"), "{}", env.trace());
    env.assert_unlocked();
}
