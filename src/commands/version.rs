//! `tf locks version`: says which `tf` this is, and which terraform it would run.

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use super::connection::Trouble;
use super::{Finding, doctor};
use crate::console::{self, visible, visible_whole};
use crate::journal::known_programs::{self, Program};
use crate::journal::state_directory::StateDirectory;
use crate::json;
use crate::terraform::binary::{self, NotFound};
use crate::terraform::version::{Product, Version as TerraformVersion};

pub(super) const EXAMPLES: &str = "Examples:
  tf locks version
  tf locks version --json | jq -r .commit

Exit codes: 0 it was shown, 2 no terraform was found, or it did not report its version, 1 the command failed.";

/// The commit of this program, or `unknown` (build.rs).
const COMMIT: &str = env!("TF_COMMIT");

/// The target triple that this program was compiled for (build.rs).
const TARGET: &str = env!("TF_TARGET");

#[derive(Args, Clone, Debug)]
pub(super) struct Version {
    #[arg(long, value_name = "DIR", help = "The working directory, as terraform's own -chdir")]
    chdir: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// What is printed, in the form of its JSON.
#[derive(Debug, Serialize)]
struct Report {
    version: &'static str,
    /// `None` if it was not known when this program was built.
    commit: Option<&'static str>,
    target: &'static str,
    terraform: TerraformReport,
}

/// The terraform that `tf` would run.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
struct TerraformReport {
    /// `None` if no terraform was found.
    path: Option<String>,
    /// `None` if the version is not known.
    product: Option<Product>,
    /// `None` if it is not known.
    version: Option<String>,
    /// Why no terraform was found, or why its version is not known. `None` if the version is known.
    reason: Option<String>,
}

impl Version {
    pub(super) fn run(self) -> Result<Finding, Trouble> {
        if let Some(directory) = self.chdir.as_ref().filter(|directory| !directory.is_dir()) {
            return Err(Trouble::not_a_directory(directory));
        }
        let (terraform, finding) = self.terraform();
        let commit = Some(COMMIT).filter(|commit| *commit != "unknown");
        let report = Report { version: env!("CARGO_PKG_VERSION"), commit, target: TARGET, terraform };
        if self.json {
            let text =
                json::to_string(&report).map_err(|error| Trouble::Said(format!("could not write JSON: {error}")))?;
            console::print_for_program(&text);
        } else {
            console::print(&report.text(binary::replaced_name()));
        }
        Ok(finding)
    }

    fn terraform(&self) -> (TerraformReport, Finding) {
        let found = match binary::find(binary::replaced_name()) {
            Ok(found) => found,
            Err(reason) => return TerraformReport::without(&reason),
        };
        let state = StateDirectory::open(|name| std::env::var_os(name)).ok();
        let program = Program::look(state.as_ref(), &found.path, &doctor::own_files(self.chdir.clone()));
        let version = match program.version {
            // Without a state directory, `look` has not run the program.
            None if program.itself && state.is_none() => known_programs::version_of(&found.path),
            known => known,
        };
        TerraformReport::of(found.path.display().to_string(), version.as_ref(), program.itself)
    }
}

impl Report {
    /// Returns the report for a person. `program` is the name of the program that `tf` replaces.
    fn text(&self, program: &str) -> String {
        let Self { version, commit, target, terraform } = self;
        let commit = commit.unwrap_or("unknown");
        format!("tf {version}\ncommit: {commit}\ntarget: {target}\nterraform: {}", terraform.text(program))
    }
}

impl TerraformReport {
    /// Reports that there is no terraform.
    fn without(reason: &NotFound) -> (Self, Finding) {
        (Self { reason: Some(reason.to_string()), ..Self::default() }, Finding::Stale)
    }

    /// Reports the program at `path`. `is_terraform` says whether it is a terraform itself, and not a program that
    /// starts one. Such a program is not run here, because it may download a terraform.
    fn of(path: String, version: Option<&TerraformVersion>, is_terraform: bool) -> (Self, Finding) {
        let (reason, finding) = match (version, is_terraform) {
            (Some(_), _) => (None, Finding::Nothing),
            (None, true) => (Some("it did not report its version within 3 s"), Finding::Stale),
            (None, false) => (
                Some("it starts a terraform, whose version tf knows after the first run in this directory"),
                Finding::Nothing,
            ),
        };
        let report = Self {
            path: Some(path),
            product: version.map(TerraformVersion::product),
            version: version.map(|version| version.text().to_owned()),
            reason: reason.map(ToOwned::to_owned),
        };
        (report, finding)
    }

    /// As [`Report::text`].
    fn text(&self, program: &str) -> String {
        match self {
            Self { path: Some(path), product: Some(product), version: Some(version), .. } => {
                format!("{}, {product:?} {}", visible_whole(path), visible(version))
            }
            Self { path: Some(path), reason, .. } => {
                format!("{}, version unknown: {}", visible_whole(path), reason.as_deref().unwrap_or_default())
            }
            Self { reason, .. } => format!(
                "none: {}\nput {program} on PATH, or set {} to its path",
                visible_whole(reason.as_deref().unwrap_or_default()),
                binary::OVERRIDE
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_terraform_is_reported_whether_or_not_it_is_known() {
        let known = TerraformVersion::of_command("Terraform v1.11.4\n").unwrap();
        for (version, is_terraform, text, finding) in [
            (Some(&known), true, "/a/terraform, Terraform 1.11.4", Finding::Nothing),
            (Some(&known), false, "/a/terraform, Terraform 1.11.4", Finding::Nothing),
            (None, true, "/a/terraform, version unknown: it did not report its version within 3 s", Finding::Stale),
            (
                None,
                false,
                "/a/terraform, version unknown: it starts a terraform, whose version tf knows after the first run in \
                 this directory",
                Finding::Nothing,
            ),
        ] {
            let (report, found) = TerraformReport::of("/a/terraform".to_owned(), version, is_terraform);
            assert_eq!((report.text("terraform").as_str(), found), (text, finding));
            assert_eq!(report.version.is_none(), report.reason.is_some());
        }
        let (report, found) = TerraformReport::without(&NotFound::Override("\u{1b}[2J".into()));
        assert_eq!(found, Finding::Stale);
        let text = report.text("tofu");
        assert!(text.starts_with("none: TFW_TERRAFORM is ") && !text.contains('\u{1b}'), "{text:?}");
        assert!(text.ends_with("\nput tofu on PATH, or set TFW_TERRAFORM to its path"), "{text:?}");
    }

    #[test]
    fn the_commit_is_a_full_id_or_unknown() {
        let id = COMMIT.strip_suffix("-dirty").unwrap_or(COMMIT);
        assert!(COMMIT == "unknown" || (id.len() >= 40 && id.bytes().all(|byte| byte.is_ascii_hexdigit())), "{COMMIT}");
        assert!(TARGET.split('-').count() >= 3, "{TARGET}");
    }
}
