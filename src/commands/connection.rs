//! Where a command looks for locks: in the backend of a working directory, in a whole table or in a whole bucket; and
//! the errors for a target that is unknown or cannot be reached.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use clap::Args;
use clap::builder::NonEmptyStringValueParser;
use nix::sys::signal::Signal;
use serde_json::{Map, Value, json};

use crate::aws::attributes::{self, Treatment};
use crate::aws::credentials::Purpose;
use crate::aws::failure::{Cause, Failure};
use crate::aws::settings::Unreachable;
use crate::cleanup::messages;
use crate::console;
use crate::console::visible;
use crate::lock::stores::Stores;
use crate::terraform::backend::{BackendOrigin, CachedBackend, is_unset};
use crate::terraform::binary;
use crate::terraform::command_line::CommandLine;
use crate::terraform::data_directory::{CommandDirectories, DataDirectory};
use crate::terraform::other_backends::{OtherBackend, UnlockPolicy};

/// The options that say where to look. Without any of them, a command looks in the backend of the current directory.
///
/// No value may be empty: it is most likely that of an unset variable in a script, and the command would look in a
/// place that the user did not mean. Clap itself refuses an empty path.
#[derive(Args, Clone, Debug, Default)]
pub(super) struct LocationArgs {
    /// Use the backend of this working directory, like terraform's -chdir
    #[arg(long, value_name = "DIR", conflicts_with_all = ["table", "bucket"])]
    pub(super) chdir: Option<PathBuf>,
    /// Look in this DynamoDB table, whatever the current directory is
    #[arg(long, value_name = "TABLE", groups = ["outside", "rated"], value_parser = NonEmptyStringValueParser::new())]
    pub(super) table: Option<String>,
    /// Look at the .tflock objects in this S3 bucket, whatever the current directory is
    #[arg(long, value_name = "BUCKET", group = "outside", value_parser = NonEmptyStringValueParser::new())]
    pub(super) bucket: Option<String>,
    /// Only look at objects whose key starts with PREFIX
    #[arg(long, value_name = "PREFIX", requires = "bucket", conflicts_with = "table")]
    pub(super) prefix: Option<String>,
    /// The region of the table or bucket (default: the region that the AWS CLI would use)
    #[arg(long, value_name = "REGION", requires = "outside", value_parser = NonEmptyStringValueParser::new())]
    pub(super) region: Option<String>,
    /// The AWS profile to use
    #[arg(long, value_name = "PROFILE", requires = "outside", value_parser = NonEmptyStringValueParser::new())]
    pub(super) profile: Option<String>,
    /// The endpoint URL, for a service that is not AWS itself
    #[arg(long, value_name = "URL", requires = "outside", value_parser = NonEmptyStringValueParser::new())]
    pub(super) endpoint_url: Option<String>,
}

/// Where a command looks for locks.
#[derive(Clone)]
pub(super) enum ScanTarget {
    /// The backend of a working directory.
    Directory(Directory),
    /// A DynamoDB table, by name.
    Table(String),
    /// An S3 bucket, by name, and the prefix of the keys to look at; an empty prefix selects all keys.
    Bucket(String, String),
}

/// A working directory with an S3 backend.
#[derive(Clone)]
pub(super) struct Directory {
    /// The path of the directory.
    pub(super) path: PathBuf,
    /// The directory in which this `tf` was started.
    pub(super) asked_from: PathBuf,
    /// Terraform's data directory: `.terraform`, or the one that TF_DATA_DIR names.
    pub(super) own_files: PathBuf,
    pub(super) backend: CachedBackend,
    pub(super) bucket: String,
    /// The key of the default workspace's state.
    pub(super) key: String,
    /// The DynamoDB table that the backend locks in; `None` if the backend names no table.
    pub(super) table: Option<String>,
    /// Whether the backend sets `use_lockfile`, so that a lock has an S3 object.
    pub(super) lock_file: bool,
    /// The workspace that terraform would use in this directory.
    pub(super) workspace: String,
}

/// A target, and the clients of the services that store its locks.
pub(super) struct Connection {
    pub(super) target: ScanTarget,
    pub(super) stores: Stores,
}

/// Why a command could not do what was asked, and what the user can do about it.
#[derive(Debug, thiserror::Error)]
pub(super) enum Trouble {
    /// A reason that has no variant of its own. The text is the whole message, with the next step.
    #[error("{0}")]
    Said(String),
    /// The services cannot be reached with the backend's settings.
    #[error("{unreachable}\n{next}")]
    Unreachable {
        /// The reason.
        unreachable: Unreachable,
        /// The next step for the user.
        next: &'static str,
    },
    /// A signal ends the command. For SIGPIPE, the reader of stdout has exited. Nothing is reported.
    #[error("")]
    Stopped(Signal),
    /// A request failed.
    #[error("{failure}\n{next}")]
    Failed {
        /// Why it failed.
        failure: Failure,
        /// The next step for the user.
        next: String,
    },
}

/// Converts an error from writing the result. Either the reader of stdout has exited, as in `| head`, or stdout is
/// closed, or a temporary file cannot be created or written.
impl From<io::Error> for Trouble {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::BrokenPipe => Self::Stopped(Signal::SIGPIPE),
            io::ErrorKind::NotConnected => Self::Said(console::STDOUT_CLOSED.to_owned()),
            _ => Self::Said(format!("could not write the result: {error}")),
        }
    }
}

impl From<Unreachable> for Trouble {
    fn from(unreachable: Unreachable) -> Self {
        let next = match unreachable {
            Unreachable::Region => {
                "set AWS_REGION, or choose a profile that sets a region; with --table or --bucket, add --region REGION"
            }
            Unreachable::Credentials(_) => {
                "terraform would get no credentials either\nlog in, choose another profile (AWS_PROFILE), or fix the current profile"
            }
            Unreachable::Silent(_) => "check the network, and try again",
            _ => "to check everything that a release needs, type in the directory of the backend: tf locks doctor",
        };
        Self::Unreachable { unreachable, next }
    }
}

impl Trouble {
    /// Builds the error for a `--chdir` that does not name a directory.
    pub(super) fn not_a_directory(path: &Path) -> Self {
        let shown = visible(&path.display().to_string());
        Self::Said(format!("{shown} is not a directory\ngive a directory that contains terraform's files"))
    }

    /// Builds the error for a failed request. `what` is the table, bucket or entry that the request was about, for the
    /// message.
    pub(super) fn failed(failure: Failure, what: &str, stores: &Stores) -> Self {
        let region = stores.region();
        let next = match failure.cause() {
            Cause::NoTable | Cause::NoBucket => {
                format!(
                    "there is no {what} in {region} for these credentials\ncheck the name, the region and the profile"
                )
            }
            Cause::OtherKey => {
                format!("terraform needs a table with LockID (a string) as its only key\ncheck that {what} is the right one")
            }
            Cause::Denied(action) => format!(
                "these credentials lack {action} on {what}\nto see who they belong to, type: aws sts get-caller-identity"
            ),
            Cause::RejectedCredentials | Cause::ExpiredCredentials => {
                "the service rejects these credentials\nlog in again, or choose another profile".to_owned()
            }
            Cause::NotImplemented => {
                "this service does not support that request, so do not try again\nto check the backend, type in its directory: tf locks doctor".to_owned()
            }
            Cause::Refused => "the service refused the request; correct the cause above, and try again".to_owned(),
            Cause::Passing | Cause::Busy => format!("the service in {region} cannot do that now\ntry again in a minute"),
            Cause::NoAnswer => format!("check the network and the region ({region}), and try again"),
        };
        Self::Failed { failure, next }
    }
}

/// Returns the current directory before the first [`LocationArgs::directory`] has changed it. A path of the user is
/// relative to it, and `--watch` reads the directory again when a round has failed.
///
/// # Errors
/// Fails if the current directory cannot be read, for example because it was removed.
fn directory_at_start() -> io::Result<&'static Path> {
    static AT_START: OnceLock<PathBuf> = OnceLock::new();
    if let Some(known) = AT_START.get() {
        return Ok(known);
    }
    let current = std::env::current_dir()?;
    Ok(AT_START.get_or_init(|| current))
}

impl LocationArgs {
    /// Returns whether the options name a table or a bucket instead of a working directory.
    pub(super) fn is_outside(&self) -> bool {
        self.table.is_some() || self.bucket.is_some()
    }

    /// Returns the same options with this table in place of the bucket.
    pub(super) fn in_a_table(&self, table: &str) -> Self {
        Self { table: Some(table.to_owned()), bucket: None, prefix: None, ..self.clone() }
    }

    /// Returns a `tf locks` command line for the user to type. It contains `words` and the options in `self`, except
    /// `--prefix`. If TF_WORKSPACE names a workspace other than `default`, and no table or bucket is named, the command
    /// line sets TF_WORKSPACE too.
    pub(super) fn command(&self, words: &str) -> String {
        let mut command = format!("tf locks {words}");
        let chdir = self.chdir.as_ref().map(|path| path.to_string_lossy().into_owned());
        for (option, value) in [
            ("--chdir", &chdir),
            ("--table", &self.table),
            ("--bucket", &self.bucket),
            ("--region", &self.region),
            ("--profile", &self.profile),
            ("--endpoint-url", &self.endpoint_url),
        ] {
            if let Some(value) = value {
                command.push_str(&console::option(option, value));
            }
        }
        // A target outside of the directory does not depend on these variables.
        let workspace = std::env::var("TF_WORKSPACE").ok().filter(|_| !self.is_outside());
        let data = DataDirectory::named_here().filter(|_| !self.is_outside());
        CommandDirectories { chdir: None, data: data.as_deref(), workspace: workspace.as_deref() }
            .before_locks(&command)
    }

    /// Returns the sentences that say how a person can remove a lock in `backend`, which is not `s3`.
    fn unlock_in(&self, backend: &CachedBackend) -> String {
        if OtherBackend::of(backend).is_some_and(|other| other.unlock_policy == UnlockPolicy::Nothing) {
            return "a lock there is released when its process exits; there is nothing to release".to_owned();
        }
        let chdir = self.chdir.as_ref().map(|path| path.to_string_lossy());
        let data = DataDirectory::named_here();
        let workspace = std::env::var("TF_WORKSPACE").ok();
        let (chdir, data, workspace) = (chdir.as_deref(), data.as_deref(), workspace.as_deref());
        let unlock =
            messages::next_step::unlock_command(&binary::name_to_type(), CommandDirectories { chdir, data, workspace });
        format!(
            "when a lock refuses terraform, terraform prints the ID of that lock\n\
             {}, replace ID with that ID and type: {unlock} ID",
            messages::next_step::UNUSED
        )
    }

    /// Returns the options with which a command reads `table` as `backend` does, in the same environment. `region` is
    /// the region of the table. If `backend` has settings that no option expresses, a command without them could read
    /// another account, or could fail.
    ///
    /// # Errors
    /// Returns the names of these settings, in the order of the alphabet.
    pub(super) fn of_table(backend: &CachedBackend, table: &str, region: &str) -> Result<Self, Vec<String>> {
        let named = |name: &str| backend.string(name).map(ToOwned::to_owned);
        let endpoint_url = named("endpoints.dynamodb").or_else(|| named("dynamodb_endpoint"));
        let mut others: Vec<String> = Vec::new();
        for (name, value) in backend.attributes().filter(|(_, value)| !is_unset(value) && **value != Value::Bool(false))
        {
            match (name, value.as_object()) {
                ("endpoints", Some(_)) => {
                    let nested = backend.nested(name).into_iter().map(|nested| format!("{name}.{nested}"));
                    others.extend(nested.filter(|nested| !is_expressed(nested)));
                }
                _ if !is_expressed(name) => others.push(name.to_owned()),
                _ => {}
            }
        }
        // A user name and a password in the URL must not be printed.
        if endpoint_url.as_ref().is_some_and(|url| url.contains('@')) {
            others.push("an endpoint with a user name".to_owned());
        }
        if others.is_empty() {
            let (table, region) = (Some(table.to_owned()), Some(region.to_owned()));
            return Ok(Self { table, region, endpoint_url, profile: named("profile"), ..Self::default() });
        }
        others.sort_unstable();
        Err(others)
    }

    /// Returns options that select the directory `chdir`, or the current directory if `chdir` is `None`.
    pub(super) fn directory_of(chdir: Option<PathBuf>) -> Self {
        Self { chdir, ..Self::default() }
    }

    /// Determines the target and creates the clients of its services. This resolves the region and the credentials, but
    /// sends no request to DynamoDB or S3.
    ///
    /// # Errors
    /// Fails if the directory has no backend that `tf` can read (see [`Self::directory`]), if there is no region, or if
    /// there are no credentials.
    pub(super) async fn reach(&self) -> Result<Connection, Trouble> {
        let (target, stores) = if let Some(table) = &self.table {
            (ScanTarget::Table(table.clone()), Stores::connect(&self.backend(), Purpose::Work).await?)
        } else if let Some(bucket) = &self.bucket {
            let prefix = self.prefix.clone().unwrap_or_default();
            (ScanTarget::Bucket(bucket.clone(), prefix), Stores::connect(&self.backend(), Purpose::Work).await?)
        } else {
            let directory = self.directory()?;
            let stores = Stores::connect(&directory.backend, Purpose::Work).await?;
            (ScanTarget::Directory(directory), stores)
        };
        Ok(Connection { target, stores })
    }

    /// Returns an s3 backend block with the region, profile and endpoint of the options.
    fn backend(&self) -> CachedBackend {
        let mut config = Map::new();
        for (name, value) in [("region", &self.region), ("profile", &self.profile)] {
            if let Some(value) = value {
                config.insert(name.into(), value.clone().into());
            }
        }
        if let Some(url) = &self.endpoint_url {
            config.insert("endpoints".into(), json!({ "dynamodb": url, "s3": url }));
            // A service that has one URL for everything has no separate host name for each bucket.
            config.insert("use_path_style".into(), Value::Bool(true));
        }
        CachedBackend::from_parts("s3", config, BackendOrigin::default())
    }

    /// Reads the backend and the workspace of the working directory, as terraform would, and makes it the current
    /// directory of this process.
    ///
    /// # Errors
    /// Fails if the current directory cannot be read, if the path is not a directory, if it has no initialised backend,
    /// or if the backend is not `s3` or lacks a bucket or a key.
    pub(super) fn directory(&self) -> Result<Directory, Trouble> {
        let current = directory_at_start()
            .map_err(|error| Trouble::Said(format!("could not read the current directory: {error}")))?;
        let mut command_line = CommandLine::parse(&[]);
        command_line.directory.clone_from(&self.chdir);
        let path = command_line.working_directory(current);
        let shown = visible(&path.display().to_string());
        if !path.is_dir() {
            return Err(Trouble::not_a_directory(&path));
        }
        let data_directory = DataDirectory::path(current, &command_line);
        // Relative paths in the backend are relative to the directory in which terraform runs.
        let _ = std::env::set_current_dir(&path);
        let read = DataDirectory::read(&data_directory, &path);
        let workspace = std::env::var("TF_WORKSPACE").ok().filter(|name| !name.is_empty()).unwrap_or(read.workspace);
        let Some(backend) = read.backend else {
            return Err(Trouble::Said(format!(
                "there is no initialised backend in {shown}\n\
                 a state in a local file has a file lock, which the kernel releases when the process exits; tf does \
                 not list such a lock\n\
                 in any other terraform directory, type `{} init` first\n\
                 to look in a table or a bucket instead, add --table TABLE or --bucket BUCKET",
                binary::name_to_type()
            )));
        };
        match backend.kind.as_str() {
            "s3" => {}
            "local" => {
                return Err(Trouble::Said(format!(
                    "the state of {shown} is a local file: its lock is a file lock, which the kernel releases when the \
                     process exits\nthere is nothing to list and nothing to release"
                )));
            }
            "remote" | "cloud" => {
                return Err(Trouble::Said(format!(
                    "the state of {shown} is in HCP Terraform, which stores its own locks\n\
                     open the workspace there: the page shows who holds the lock, and has a button to unlock it"
                )));
            }
            kind => {
                let see = OtherBackend::of(&backend).map_or_else(String::new, |other| {
                    let look =
                        other.look.map_or_else(String::new, |look| format!("\nto see who holds the lock: {look}"));
                    format!("\nlocation: {}{look}", visible(&other.place(&backend)))
                });
                return Err(Trouble::Said(format!(
                    "the backend of {shown} is {:?}; tf reads only the locks of the s3 backend{see}\n{}",
                    visible(kind),
                    self.unlock_in(&backend)
                )));
            }
        }
        let said = |what: &str| {
            Trouble::Said(format!(
                "the backend of {shown} sets no {what}\nto set up the backend again, type: {} init",
                binary::name_to_type()
            ))
        };
        Ok(Directory {
            bucket: backend.string("bucket").ok_or_else(|| said("bucket"))?.to_owned(),
            key: backend.string("key").ok_or_else(|| said("key"))?.to_owned(),
            table: backend.string("dynamodb_table").map(ToOwned::to_owned),
            lock_file: backend.flag("use_lockfile"),
            workspace,
            backend,
            path,
            asked_from: current.to_path_buf(),
            own_files: data_directory,
        })
    }
}

/// The attributes of a backend that options express, or that do not change how an item of the table is read: most of
/// them say where a state is. `skip_metadata_api_check` is here because a command uses the credentials of the instance
/// only if it has no others.
const EXPRESSED: [&str; 16] = [
    "region",
    "profile",
    "dynamodb_table",
    "endpoints.dynamodb",
    "dynamodb_endpoint",
    "bucket",
    "key",
    "workspace_key_prefix",
    "use_lockfile",
    "endpoint",
    "endpoints.s3",
    "use_path_style",
    "force_path_style",
    "encrypt",
    "sse_customer_key",
    "skip_metadata_api_check",
];

/// Whether an option has the same effect as the attribute `name` of a backend, or the attribute does not change how an
/// item of the table is read. For an unknown attribute, the result is false.
fn is_expressed(name: &str) -> bool {
    let has_no_effect =
        |attribute: &attributes::Setting| attribute.name == name && attribute.treatment == Treatment::NoEffect;
    EXPRESSED.contains(&name) || attributes::ATTRIBUTES.iter().any(has_no_effect)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::terraform::backend::tests::backend;

    #[test]
    fn a_reader_that_is_gone_is_no_error_to_report() {
        let trouble = |kind: io::ErrorKind| Trouble::from(io::Error::from(kind));
        assert!(matches!(trouble(io::ErrorKind::BrokenPipe), Trouble::Stopped(Signal::SIGPIPE)));
        assert_eq!(trouble(io::ErrorKind::NotConnected).to_string(), console::STDOUT_CLOSED);
        assert!(trouble(io::ErrorKind::StorageFull).to_string().starts_with("could not write the result: "));
    }

    #[test]
    fn one_url_for_everything_is_for_both_services_and_without_host_names_for_buckets() {
        let none = LocationArgs::default();
        assert_eq!(none.backend().set_attributes().count(), 0);
        let all = LocationArgs {
            region: Some("r".into()),
            profile: Some("p".into()),
            endpoint_url: Some("http://x".into()),
            ..LocationArgs::default()
        };
        let backend = all.backend();
        let strings = ["region", "profile", "endpoints.s3", "endpoints.dynamodb"].map(|name| backend.string(name));
        assert_eq!(strings, [Some("r"), Some("p"), Some("http://x"), Some("http://x")]);
        assert!(backend.flag("use_path_style"));
    }

    #[test]
    fn a_table_is_read_as_its_backend_reads_it_or_not_at_all() {
        let of = |config: &str| {
            let place = LocationArgs::of_table(&backend(config), "t", "r");
            place.map(|place| place.command("list")).map_err(|others| others.join(", "))
        };
        let plain = "tf locks list --table t --region r".to_owned();
        for config in [
            r#"{"bucket":"b","key":"k","dynamodb_table":"t","region":"r","encrypt":true}"#,
            r#"{"assume_role":null,"access_key":"","shared_config_files":[],"insecure":false}"#,
            r#"{"endpoints":{"sts":null,"iam":"i","s3":"s"},"skip_credentials_validation":true,"max_retries":9}"#,
        ] {
            assert_eq!(of(config), Ok(plain.clone()), "{config}");
        }
        for (config, options) in [
            (r#"{"profile":"a b"}"#, " --profile 'a b'"),
            (r#"{"endpoints":{"dynamodb":"http://x","s3":"http://y"}}"#, " --endpoint-url http://x"),
            (r#"{"dynamodb_endpoint":"http://x","profile":"p"}"#, " --profile p --endpoint-url http://x"),
        ] {
            assert_eq!(of(config), Ok(plain.clone() + options), "{config}");
        }
        for (config, others) in [
            (r#"{"assume_role":{"role_arn":"arn"},"profile":"p"}"#, "assume_role"),
            (r#"{"assume_role_with_web_identity":{"role_arn":"arn"}}"#, "assume_role_with_web_identity"),
            (r#"{"role_arn":"arn"}"#, "role_arn"),
            (r#"{"secret_key":"s","access_key":"a"}"#, "access_key, secret_key"),
            (r#"{"shared_credentials_files":["f"]}"#, "shared_credentials_files"),
            (r#"{"endpoints":{"dynamodb":"http://x","sts":"http://y"}}"#, "endpoints.sts"),
            (r#"{"endpoints":{"dynamodb":"http://anna:hunter2@x"}}"#, "an endpoint with a user name"),
            (r#"{"insecure":true}"#, "insecure"),
            (r#"{"an_attribute_of_tomorrow":1}"#, "an_attribute_of_tomorrow"),
        ] {
            assert_eq!(of(config), Err(others.to_owned()), "{config}");
        }
    }

    #[test]
    fn a_table_or_a_bucket_is_looked_in_whatever_the_directory_is() {
        let with = |table: Option<&str>, bucket: Option<&str>| LocationArgs {
            table: table.map(ToOwned::to_owned),
            bucket: bucket.map(ToOwned::to_owned),
            prefix: Some("p/".into()),
            ..LocationArgs::default()
        };
        assert!(!with(None, None).is_outside());
        assert!(with(Some("t"), None).is_outside() && with(None, Some("b")).is_outside());
        // A lock that was found with a prefix is in the bucket without it too.
        assert_eq!(with(None, Some("b")).command("show"), "tf locks show --bucket b");
    }

    #[test]
    fn what_a_failure_means_for_the_user_follows_from_its_cause() {
        let stores = Stores::offline("eu-west-1");
        let next = |code: Option<&str>| {
            let answer = crate::aws::failure::ServiceAnswer { code, message: Some("no"), status: None };
            let failure = Failure::of_answer("DynamoDB", "dynamodb:Scan", answer, "");
            let Trouble::Failed { next, .. } = Trouble::failed(failure, "table t", &stores) else { panic!() };
            next
        };
        for (code, expected) in [
            (Some("ResourceNotFoundException"), "there is no table t in eu-west-1"),
            (Some("AccessDeniedException"), "dynamodb:Scan on table t"),
            (Some("ExpiredTokenException"), "log in again"),
            (Some("UnrecognizedClientException"), "log in again"),
            (Some("NotImplemented"), "do not try again"),
            (Some("ValidationException"), "correct the cause"),
            (Some("SlowDown"), "try again in a minute"),
            (None, "check the network and the region (eu-west-1)"),
        ] {
            assert!(next(code).contains(expected), "{code:?}: {}", next(code));
        }
    }
}
