//! A file that lies in memory and never on a disk.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::ownership;

/// A file in memory and the path under which another process of this user can open it.
#[derive(Debug)]
pub(crate) struct MemoryFile {
    /// Open for reading, closed on exec.
    pub(crate) file: File,
    /// Where it can be opened.
    pub(crate) path: PathBuf,
    /// It has a name in a directory, which goes away with this value.
    named: bool,
}

impl MemoryFile {
    /// Makes an empty file, readable by this user alone.
    ///
    /// In a directory that is a tmpfs, if there is one: any descendant can open it there by name. Else a
    /// memfd_create(2), which has a name only as long as this process lives.
    ///
    /// # Errors
    /// Where neither can be had.
    pub(crate) fn create(name: &str) -> io::Result<Self> {
        for directory in directories() {
            let path = directory.join(name);
            if let Ok(file) = create_private(&path) {
                return Ok(Self { file, path, named: true });
            }
        }
        #[cfg(target_os = "linux")]
        {
            let descriptor = nix::sys::memfd::memfd_create(name, nix::sys::memfd::MFdFlags::MFD_CLOEXEC)?;
            let path = {
                use std::os::fd::AsRawFd;
                PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), descriptor.as_raw_fd()))
            };
            Ok(Self { file: File::from(descriptor), path, named: false })
        }
        #[cfg(not(target_os = "linux"))]
        {
            // No file system in memory can be relied on: a private file in the user's own temporary directory.
            let directory = [std::env::temp_dir(), PathBuf::from("/tmp")]
                .iter()
                .find_map(|directory| ownership::safe_directory(directory))
                .ok_or_else(|| io::Error::from(io::ErrorKind::PermissionDenied))?;
            let path = directory.join(name);
            create_private(&path).map(|file| Self { file, path, named: true })
        }
    }

    /// Opens the file that another process made under `name`, if it has a name and is still there: a file of this user,
    /// in a directory in memory, and no link.
    pub(crate) fn find(name: &str) -> Option<Self> {
        use std::os::unix::fs::MetadataExt;
        directories().find_map(|directory| {
            let path = directory.join(name);
            let flags = libc::O_CLOEXEC | libc::O_NOFOLLOW | libc::O_NONBLOCK;
            let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(&path).ok()?;
            let place = file.metadata().ok()?;
            let ours = place.is_file() && place.uid() == nix::unistd::geteuid().as_raw() && place.nlink() == 1;
            ours.then_some(Self { file, path, named: true })
        })
    }

    /// Goes away without taking the name along.
    pub(crate) fn leave(mut self) {
        self.named = false;
    }

    /// Takes its name away, for a process that ends without dropping anything.
    pub(crate) fn remove(&self) {
        if self.named {
            let _ = std::fs::remove_file(&self.path);
        }
    }

    /// Gives the memory of everything before `end` back to the system. The file keeps its length, so that a writer
    /// with O_APPEND is not disturbed: truncating would lose what is written between the last read and the cut.
    pub(crate) fn forget_before(&self, end: u64) {
        #[cfg(target_os = "linux")]
        {
            use nix::fcntl::{FallocateFlags, fallocate};
            if let Ok(length) = i64::try_from(end) {
                let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                let _ = fallocate(&self.file, flags, 0, length);
            }
        }
        #[cfg(not(target_os = "linux"))]
        let _ = end;
    }
}

impl Drop for MemoryFile {
    fn drop(&mut self) {
        self.remove();
    }
}

/// The directories in memory in which a file of ours keeps its name. `XDG_RUNTIME_DIR` may be another user's: su(1) without
/// `-` leaves it as it was, and its owner could put a file of his own in the place of ours.
fn directories() -> impl Iterator<Item = PathBuf> {
    let named = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    let named = named.filter(|directory| directory.is_absolute()).into_iter();
    let all = named.chain([PathBuf::from("/dev/shm")]);
    all.filter_map(|directory| ownership::safe_directory(&directory)).filter(|directory| lies_in_memory(directory))
}

fn create_private(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .custom_flags(libc::O_CLOEXEC | libc::O_NOFOLLOW)
        .open(path)
}

#[cfg(target_os = "linux")]
fn lies_in_memory(directory: &Path) -> bool {
    use nix::sys::statfs::{TMPFS_MAGIC, statfs};
    statfs(directory).is_ok_and(|system| system.filesystem_type() == TMPFS_MAGIC)
}

#[cfg(not(target_os = "linux"))]
fn lies_in_memory(_directory: &Path) -> bool {
    false
}
