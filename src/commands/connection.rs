//! Which locks are meant: those of this directory's backend, or of a whole table or bucket; and what to say when that
//! cannot be told or reached.

use crate::console;
use std::io;
use std::path::PathBuf;

use clap::Args;
use serde_json::{Map, Value, json};

use crate::aws::credentials::Purpose;
use crate::aws::failure::{Cause, Failure};
use crate::aws::settings::Unreachable;
use crate::cleanup::messages;
use crate::console::visible;
use crate::lock::stores::Stores;
use crate::terraform::backend::{BackendOrigin, CachedBackend};
use crate::terraform::command_line::CommandLine;
use crate::terraform::data_directory::DataDirectory;
use crate::terraform::other_backends::OtherBackend;

/// Where to look. Without any of these: in the backend of the current directory.
#[derive(Args, Clone, Debug, Default)]
pub(super) struct LocationArgs {
    /// The working directory whose backend is meant, as terraform's own -chdir
    #[arg(long, value_name = "DIR", conflicts_with_all = ["table", "bucket"])]
    pub(super) chdir: Option<PathBuf>,
    /// Look into this DynamoDB table, outside of any working directory
    #[arg(long, value_name = "TABLE", group = "outside")]
    pub(super) table: Option<String>,
    /// Look at the .tflock objects of this bucket, outside of any working directory
    #[arg(long, value_name = "BUCKET", group = "outside")]
    pub(super) bucket: Option<String>,
    /// Only objects whose key begins so
    #[arg(long, value_name = "PREFIX", requires = "bucket")]
    pub(super) prefix: Option<String>,
    /// The region of the table or bucket (else as the AWS CLI finds it)
    #[arg(long, value_name = "REGION", requires = "outside")]
    region: Option<String>,
    /// The profile to use
    #[arg(long, value_name = "PROFILE", requires = "outside")]
    profile: Option<String>,
    /// The endpoint, for what is not AWS itself
    #[arg(long, value_name = "URL", requires = "outside")]
    endpoint_url: Option<String>,
}

/// What is to be looked at.
pub(super) enum ScanTarget {
    /// A working directory.
    Directory(Directory),
    /// A table.
    Table(String),
    /// A bucket, and how its keys begin.
    Bucket(String, String),
}

/// A working directory with an S3 backend.
pub(super) struct Directory {
    /// Where it is.
    pub(super) path: PathBuf,
    /// Where whoever asks for it is.
    pub(super) asked_from: PathBuf,
    /// Where terraform keeps its own files.
    pub(super) own_files: PathBuf,
    pub(super) backend: CachedBackend,
    pub(super) bucket: String,
    /// The key of the default workspace's state.
    pub(super) key: String,
    pub(super) table: Option<String>,
    pub(super) lock_file: bool,
    /// The workspace that a command there would use.
    pub(super) workspace: String,
}

/// The target, and the services that it is in.
pub(super) struct Connection {
    pub(super) target: ScanTarget,
    pub(super) stores: Stores,
}

/// Why a command could not do what it was asked for, and what to do about that.
#[derive(Debug, thiserror::Error)]
pub(super) enum Trouble {
    /// What is there does not have what is needed.
    #[error("{0}")]
    Said(String),
    /// The services cannot be reached as the backend says.
    #[error("{unreachable}\n{next}")]
    Unreachable {
        /// What is missing.
        unreachable: Unreachable,
        /// What to do.
        next: &'static str,
    },
    /// Nobody reads what we write. Nothing is said of it.
    #[error("")]
    ReaderGone,
    /// A request did not work.
    #[error("{failure}\n{next}")]
    Failed {
        /// What the service said.
        failure: Failure,
        /// What to do.
        next: String,
    },
}

/// What is to be shown cannot be: the reader of stdout is gone, as in `| head`, or there is no place for a temporary file.
impl From<io::Error> for Trouble {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::BrokenPipe => Self::ReaderGone,
            io::ErrorKind::NotConnected => Self::Said(console::STDOUT_CLOSED.to_owned()),
            _ => Self::Said(format!("the result could not be written: {error}")),
        }
    }
}

impl From<Unreachable> for Trouble {
    fn from(unreachable: Unreachable) -> Self {
        let next = match unreachable {
            Unreachable::Region => {
                "name it: AWS_REGION, a profile that has one, or --region beside --table or --bucket"
            }
            Unreachable::Credentials(_) => {
                "terraform would get none there either: log in, choose another profile (AWS_PROFILE), or mend that one"
            }
            Unreachable::Silent(_) => "if the network is well, try again",
            _ => "type `tf locks doctor` in that directory: it tries everything that a release needs",
        };
        Self::Unreachable { unreachable, next }
    }
}

impl Trouble {
    /// A failed request about `what`, with what to do about it.
    pub(super) fn failed(failure: Failure, what: &str, stores: &Stores) -> Self {
        let region = format!("the region is {}", stores.region());
        let next = match failure.cause() {
            Cause::NoTable | Cause::NoBucket => {
                format!(
                    "there is no {what} for these credentials: {region}; are name, region and profile the right ones?"
                )
            }
            Cause::OtherKey => {
                format!("terraform needs a table whose only key is LockID, a string: is {what} the right one?")
            }
            Cause::Denied(action) => format!(
                "these credentials may not do {action} on {what}: `aws sts get-caller-identity` tells whose they are"
            ),
            Cause::RejectedCredentials | Cause::ExpiredCredentials => {
                "the service does not take these credentials: log in again, or choose another profile".to_owned()
            }
            Cause::NotImplemented => {
                "this store cannot do that, and trying again does not help: see `tf locks doctor`".to_owned()
            }
            Cause::Refused => "trying again does not help before that is mended".to_owned(),
            Cause::Passing => format!("{region}; the service cannot do it now: try again in a minute"),
            Cause::NoAnswer => format!("{region}; if the network is well, try again"),
        };
        Self::Failed { failure, next }
    }
}

impl LocationArgs {
    /// Whether a table or a bucket is meant, and no working directory.
    pub(super) fn is_outside(&self) -> bool {
        self.table.is_some() || self.bucket.is_some()
    }

    /// A `tf locks` command that looks at the same place, in a workspace that the environment names.
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
        let workspace = std::env::var("TF_WORKSPACE").ok().filter(|_| !self.is_outside());
        messages::in_workspace(workspace.as_deref(), &command)
    }

    /// A working directory, the current one if none is named.
    pub(super) fn directory_of(chdir: Option<PathBuf>) -> Self {
        Self { chdir, ..Self::default() }
    }

    /// What is meant, and the way there. Nobody is asked for anything yet.
    ///
    /// # Errors
    /// [`Trouble`]: no backend, or not one that is understood; no region.
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

    /// A backend block that says what the options do.
    fn backend(&self) -> CachedBackend {
        let mut config = Map::new();
        for (name, value) in [("region", &self.region), ("profile", &self.profile)] {
            if let Some(value) = value {
                config.insert(name.into(), value.clone().into());
            }
        }
        if let Some(url) = &self.endpoint_url {
            config.insert("endpoints".into(), json!({ "dynamodb": url, "s3": url }));
            // What has one URL for everything has no host name for each bucket.
            config.insert("use_path_style".into(), Value::Bool(true));
        }
        CachedBackend::from_parts("s3", config, BackendOrigin::default())
    }

    /// The working directory, as terraform sees it.
    ///
    /// # Errors
    /// [`Trouble`].
    pub(super) fn directory(&self) -> Result<Directory, Trouble> {
        let current = std::env::current_dir()
            .map_err(|error| Trouble::Said(format!("the current directory cannot be read: {error}")))?;
        let mut command_line = CommandLine::parse(&[]);
        command_line.directory.clone_from(&self.chdir);
        let path = command_line.working_directory(&current);
        let shown = visible(&path.display().to_string());
        if !path.is_dir() {
            return Err(Trouble::Said(format!("{shown} is no directory\nname one that has terraform's files in it")));
        }
        let data_directory = DataDirectory::path(&current, &command_line);
        // Paths in the backend mean what they mean to terraform, which is there.
        let _ = std::env::set_current_dir(&path);
        let read = DataDirectory::read(&data_directory);
        let workspace = std::env::var("TF_WORKSPACE").ok().filter(|name| !name.is_empty()).unwrap_or(read.workspace);
        let Some(backend) = read.backend else {
            return Err(Trouble::Said(format!(
                "there is no initialised backend in {shown}\n\
                 if it is a terraform directory, type `terraform init` first; a state in a local file has no lock to \
                 list: its lock ends with the process that holds it\n\
                 elsewhere, name a table or a bucket: `tf locks list --table TABLE`"
            )));
        };
        match backend.kind.as_str() {
            "s3" => {}
            "local" => {
                return Err(Trouble::Said(format!(
                    "the state of {shown} is a local file: its lock is a lock of the operating system, which ends with \
                     the process that holds it\nthere is nothing to list and nothing to release"
                )));
            }
            "remote" | "cloud" => {
                return Err(Trouble::Said(format!(
                    "the state of {shown} is in HCP Terraform, which keeps the locks itself\n\
                     look at the workspace there; it has a button that unlocks, and says who holds the lock"
                )));
            }
            kind => {
                let see = OtherBackend::of(&backend).map_or_else(String::new, |other| {
                    format!("\nit is {}; to see who holds the lock: {}", visible(&other.place(&backend)), other.look)
                });
                return Err(Trouble::Said(format!(
                    "the backend of {shown} is {:?}; tf reads the locks of the s3 backend alone{see}\n\
                     terraform prints the lock's ID when it is refused, and `terraform force-unlock ID` removes it",
                    visible(kind)
                )));
            }
        }
        let said = |what: &str| Trouble::Said(format!("the backend of {shown} names no {what}: type `terraform init`"));
        Ok(Directory {
            bucket: backend.string("bucket").ok_or_else(|| said("bucket"))?.to_owned(),
            key: backend.string("key").ok_or_else(|| said("key"))?.to_owned(),
            table: backend.string("dynamodb_table").map(ToOwned::to_owned),
            lock_file: backend.flag("use_lockfile"),
            workspace,
            backend,
            path,
            asked_from: current,
            own_files: data_directory,
        })
    }
}
