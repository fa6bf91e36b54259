//! The terraform that `tf` runs, and its arguments.

use std::ffi::OsString;
use std::io;

use crate::journal::recorder::EnvironmentChange;
use crate::sys::spawn::Image;
use crate::terraform::binary::{self, Binary};
use crate::terraform::command_line::CommandLine;

/// The terraform to run, and its command line.
pub(crate) struct Invocation {
    /// The terraform that was found.
    pub(crate) terraform: Binary,
    /// argv\[0\] of terraform.
    pub(crate) name: OsString,
    /// The other arguments, unchanged from the arguments of this process.
    pub(crate) arguments: Vec<OsString>,
    /// The parsed form of `arguments`.
    pub(crate) command_line: CommandLine,
}

impl Invocation {
    /// Returns the program with its arguments, and the environment of this process with `changes`.
    ///
    /// # Errors
    /// If a string contains a zero byte (see [`Image::new`]).
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
