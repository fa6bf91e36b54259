//! The identity of a file under any name.

use std::fs::{self, File, Metadata};
use std::os::fd::BorrowedFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::str::FromStr;
use std::{fmt, io};

/// The device and the inode number of a file. No two files have the same pair at the same time (POSIX, `<sys/stat.h>`).
/// The pair of a deleted file may be used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FileId {
    device: u64,
    inode: u64,
}

impl FileId {
    /// Returns the identity of the file at `path`. Follows symbolic links.
    ///
    /// # Errors
    /// Fails if no file can be reached at `path`.
    pub(crate) fn at(path: impl AsRef<Path>) -> io::Result<Self> {
        Ok(Self::from(&fs::metadata(path)?))
    }

    /// Returns the identity of the file with this device and inode number.
    #[cfg(target_os = "macos")]
    pub(crate) fn of_numbers(device: u64, inode: u64) -> Self {
        Self { device, inode }
    }

    /// Returns the identity of an open file. `None` if it cannot be read.
    pub(crate) fn of_open(descriptor: BorrowedFd<'_>) -> Option<Self> {
        let file = File::from(descriptor.try_clone_to_owned().ok()?);
        Some(Self::from(&file.metadata().ok()?))
    }
}

impl From<&Metadata> for FileId {
    fn from(file: &Metadata) -> Self {
        Self { device: file.dev(), inode: file.ino() }
    }
}

/// Writes the identity as `DEVICE.INODE`, in decimal.
impl fmt::Display for FileId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.device, self.inode)
    }
}

/// A text that is not `DEVICE.INODE`.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct NotAFileId;

impl FromStr for FileId {
    type Err = NotAFileId;

    fn from_str(text: &str) -> Result<Self, NotAFileId> {
        let (device, inode) = text.split_once('.').ok_or(NotAFileId)?;
        let number = |text: &str| text.parse().map_err(|_| NotAFileId);
        Ok(Self { device: number(device)?, inode: number(inode)? })
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn a_file_has_one_identity_under_all_its_names() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let file = File::create(at("file")).unwrap();
        fs::hard_link(at("file"), at("hard")).unwrap();
        std::os::unix::fs::symlink(at("hard"), at("soft")).unwrap();
        File::create(at("other")).unwrap();
        let own = FileId::at(at("file")).unwrap();
        assert_eq!(FileId::at(at("hard")).unwrap(), own);
        assert_eq!(FileId::at(at("soft")).unwrap(), own);
        assert_eq!(FileId::of_open(file.as_fd()), Some(own));
        assert_ne!(FileId::at(at("other")).unwrap(), own);
        assert!(FileId::at(at("nothing")).is_err());
    }

    #[test]
    fn an_identity_is_read_back_from_its_text() {
        let id = FileId { device: 1, inode: u64::MAX };
        assert_eq!(id.to_string().parse(), Ok(id));
        for text in ["", "1", "1.", ".1", "1.2.3", "-1.2", "1,2", "18446744073709551616.1"] {
            assert_eq!(text.parse::<FileId>(), Err(NotAFileId), "{text:?}");
        }
    }
}
