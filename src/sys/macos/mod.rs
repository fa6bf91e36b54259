//! What only macOS has. The parsers of its binary formats are compiled for the tests on every system.

#[cfg(target_os = "macos")]
pub(crate) mod hole;
#[cfg(target_os = "macos")]
pub(crate) mod host;
#[cfg(target_os = "macos")]
pub(crate) mod kqueue;
#[cfg(any(target_os = "macos", test))]
pub(crate) mod procargs;
#[cfg(any(target_os = "macos", test))]
pub(crate) mod process_entry;
#[cfg(target_os = "macos")]
pub(crate) mod reporting_handler;
#[cfg(any(target_os = "macos", test))]
pub(crate) mod sized_read;
#[cfg(target_os = "macos")]
pub(crate) mod sysctl;
#[cfg(target_os = "macos")]
pub(crate) mod temporary_directory;
