//! A file in memory. Only the kernel's swap can write it to a disk. On systems other than Linux, it is instead a
//! private file in a temporary directory.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::ownership;

/// A file in memory, and the path at which another process of this user can open it.
#[derive(Debug)]
pub(crate) struct MemoryFile {
    /// The file. It is open for reading and writing, and is closed on exec.
    pub(crate) file: File,
    /// The path at which the file can be opened.
    pub(crate) path: PathBuf,
    /// Whether the file has a name in a directory. The name is removed when this value is dropped.
    named: bool,
}

impl MemoryFile {
    /// Creates an empty file that only this user can read.
    ///
    /// If a tmpfs directory is available, the file is created there, and any descendant can open it by name. Otherwise
    /// memfd_create(2) creates it, and its path is valid only while this process runs. On systems other than Linux, the
    /// file is in the user's temporary directory, or in `/tmp`.
    ///
    /// # Errors
    /// An error if the file cannot be created in any of these ways.
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
            // This system has no file system that is known to be in memory. So the file is in a temporary directory,
            // and only this user can read it.
            let directory = [std::env::temp_dir(), PathBuf::from("/tmp")]
                .iter()
                .find_map(|directory| ownership::safe_directory(directory))
                .ok_or_else(|| io::Error::from(io::ErrorKind::PermissionDenied))?;
            let path = directory.join(name);
            create_private(&path).map(|file| Self { file, path, named: true })
        }
    }

    /// Opens the file that another process created under `name` in a directory in memory. Returns `None` if there is no
    /// such file, or if the entry is a link, is not a regular file, has several names or belongs to another user. A
    /// file from memfd_create(2) is never found, because it has no name in a directory.
    pub(crate) fn find(name: &str) -> Option<Self> {
        use std::os::unix::fs::MetadataExt;
        // A cron job and a shell of su(1) have no `XDG_RUNTIME_DIR`, or another user's. systemd's is searched for them,
        // too.
        let usual = PathBuf::from(format!("/run/user/{}", nix::unistd::geteuid()));
        let usual = ownership::safe_directory(&usual).filter(|directory| is_in_memory(directory));
        directories().chain(usual).find_map(|directory| {
            let path = directory.join(name);
            let flags = libc::O_CLOEXEC | libc::O_NOFOLLOW | libc::O_NONBLOCK;
            let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(&path).ok()?;
            let place = file.metadata().ok()?;
            let ours = place.is_file() && place.uid() == nix::unistd::geteuid().as_raw() && place.nlink() == 1;
            ours.then_some(Self { file, path, named: true })
        })
    }

    /// Drops this value and keeps the file's name.
    pub(crate) fn leave(mut self) {
        self.named = false;
    }

    /// Removes the file's name. This is for a process that exits without dropping this value.
    pub(crate) fn remove(&self) {
        if self.named {
            let _ = std::fs::remove_file(&self.path);
        }
    }

    /// Frees the memory of all bytes before the offset `end` (Linux only). The file is not truncated: a writer may
    /// append text between the last read and the truncation, and that text would be lost. The file keeps its length, so
    /// a writer with O_APPEND is not affected.
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

/// Returns the directories in memory in which no other user can replace a file of this user. `XDG_RUNTIME_DIR` is
/// checked too, because it may belong to another user: su(1) without `-` does not change the variable.
fn directories() -> impl Iterator<Item = PathBuf> {
    let named = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    let named = named.filter(|directory| directory.is_absolute()).into_iter();
    let all = named.chain([PathBuf::from("/dev/shm")]);
    all.filter_map(|directory| ownership::safe_directory(&directory)).filter(|directory| is_in_memory(directory))
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
fn is_in_memory(directory: &Path) -> bool {
    use nix::sys::statfs::{TMPFS_MAGIC, statfs};
    statfs(directory).is_ok_and(|system| system.filesystem_type() == TMPFS_MAGIC)
}

#[cfg(not(target_os = "linux"))]
fn is_in_memory(_directory: &Path) -> bool {
    false
}
