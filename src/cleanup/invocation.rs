//! What is run in place of whom, with which arguments.

use std::ffi::OsString;
use std::io;

use crate::journal::recorder::EnvironmentChange;
use crate::sys::spawn::Image;
use crate::terraform::binary::{self, Binary};
use crate::terraform::command_line::CommandLine;

/// What is to be run.
pub(crate) struct Invocation {
    /// The terraform that was found.
    pub(crate) terraform: Binary,
    /// argv\[0\] for it.
    pub(crate) name: OsString,
    /// The rest of argv, as we got it.
    pub(crate) arguments: Vec<OsString>,
    /// What we understand of it.
    pub(crate) command_line: CommandLine,
}

impl Invocation {
    /// The program with its arguments and our environment, changed by `changes`.
    ///
    /// # Errors
    /// See [`Image::new`].
    pub(crate) fn image(&self, changes: &[EnvironmentChange]) -> io::Result<Image> {
        let chain = (binary::CHAIN, Some(self.terraform.chain.clone()));
        let changes: Vec<&EnvironmentChange> = changes.iter().chain([&chain]).collect();
        let environment = std::env::vars_os()
            .filter(|(name, _)| !changes.iter().any(|(changed, _)| name == changed))
            .chain(changes.iter().filter_map(|(name, value)| Some((OsString::from(name), value.clone()?))));
        let arguments = std::iter::once(self.name.as_os_str()).chain(self.arguments.iter().map(OsString::as_os_str));
        Image::new(&self.terraform.path, arguments, environment)
    }
}
