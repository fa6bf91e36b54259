//! `tf` runs in place of `terraform` and changes one thing: when terraform ends without releasing its state lock, `tf`
//! releases it. It never releases a lock whose holder may still be running, unless a person confirms or forces the
//! release.
//!
//! [`main`] shows the whole sequence of a run. ARCHITECTURE.md describes the structure of the code.

mod another_tf;
mod aws;
mod cleanup;
mod commands;
mod console;
mod crash_point;
#[cfg(test)]
mod generated_input;
mod holder;
mod journal;
mod json;
mod lease;
mod lock;
mod notice;
mod panics;
mod random;
mod runtime;
mod settings;
mod supervise;
mod sys;
mod terraform;
mod time;
mod trace;

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

use cleanup::invocation::Invocation;
use cleanup::messages;
use settings::Settings;
use supervise::{NotSupervised, outcome, step_outputs};
use terraform::binary;
use terraform::command_line::CommandLine;

/// The exit codes that shells use: 127 if the program was not found, 126 if it was found but could not be started.
const NOT_FOUND: u8 = 127;
const NOT_RUN: u8 = 126;

fn main() -> ExitCode {
    let mut arguments = std::env::args_os();
    let called_as = arguments.next();
    let arguments: Vec<OsString> = arguments.collect();
    if let Some(words) = commands::ours(&arguments) {
        if let Some(path) = std::env::var_os("TFW_LOG").filter(|path| !path.is_empty()) {
            trace::open(Path::new(&path));
        }
        return ExitCode::from(commands::run(words));
    }
    let command_line = CommandLine::parse(&arguments);

    let terraform = match binary::find(binary::name(called_as.as_deref())) {
        Ok(terraform) => terraform,
        Err(reason) => return refuse(&reason, NOT_FOUND),
    };
    let name = terraform.name();
    let passes_through = terraform.supervised_already
        || asks_for_completion()
        || !(command_line.can_lock(more_arguments()) || terraform.for_a_step);
    let invocation = Invocation { terraform, name, arguments, command_line };
    if passes_through {
        return become_terraform(&invocation);
    }

    let settings = match Settings::read(|name| std::env::var_os(name)) {
        Ok(settings) => settings,
        Err(reason) => return refuse(&reason, 1),
    };
    if let Some(path) = &settings.log {
        trace::open(Path::new(path));
    }
    match supervise::supervise(&invocation, &settings) {
        Ok(ended) if invocation.terraform.for_a_step => {
            ExitCode::from(outcome::end_as(step_outputs::end_of_step(ended)))
        }
        Ok(ended) => ExitCode::from(outcome::end_as(ended)),
        Err(NotSupervised::NotStarted(error)) => could_not_run(&invocation, &error),
        // Terraform must run even if `tf` cannot supervise it. So terraform replaces this process, and runs as without
        // `tf`.
        Err(NotSupervised::Unprepared(error)) => {
            trace::trace!("not supervised: {error}");
            become_terraform(&invocation)
        }
    }
}

/// Returns whether a shell requests completions. If so, terraform only writes the completions to stdout
/// (posener/complete), and takes no lock.
fn asks_for_completion() -> bool {
    std::env::var_os("COMP_LINE").is_some()
}

/// Returns whether terraform will add words from the environment to its command line (main.go, `EnvCLI`).
fn more_arguments() -> bool {
    std::env::vars_os().any(|(name, value)| name.as_encoded_bytes().starts_with(b"TF_CLI_ARGS") && !value.is_empty())
}

fn become_terraform(invocation: &Invocation) -> ExitCode {
    match invocation.image(&[]) {
        Ok(image) => could_not_run(invocation, &image.exec()),
        Err(error) => could_not_run(invocation, &error),
    }
}

fn could_not_run(invocation: &Invocation, error: &std::io::Error) -> ExitCode {
    console::say(&messages::run::cannot_run(&invocation.terraform.path, error));
    ExitCode::from(if error.kind() == std::io::ErrorKind::NotFound { NOT_FOUND } else { NOT_RUN })
}

fn refuse(reason: &dyn std::fmt::Display, code: u8) -> ExitCode {
    console::say(&messages::run::cannot_start(reason));
    ExitCode::from(code)
}
