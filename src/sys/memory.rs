//! A file in memory. Only the kernel's swap can write it to a disk. On macOS, it is instead a private file in the
//! user's directory for temporary files.

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
    /// memfd_create(2) creates it, and its path is valid only while this process runs. On macOS, the file is in the
    /// user's directory for temporary files, or in `/tmp`.
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
        Err(io::ErrorKind::PermissionDenied.into())
    }

    /// Opens the file that another process created under `name` in one of the directories of [`MemoryFile::create`].
    /// Returns `None` if there is no such file, or if the entry is a link, is not a regular file, has several names or
    /// belongs to another user. A file from memfd_create(2) is never found, because it has no name in a directory.
    pub(crate) fn find(name: &str) -> Option<Self> {
        use std::os::unix::fs::MetadataExt;
        directories().chain(usual_directory()).find_map(|directory| {
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

    /// Frees the memory of all bytes before the offset `end` (on macOS, the disk blocks that contain only such bytes).
    /// The file is not truncated: a writer may append text between the last read and the truncation, and that text
    /// would be lost. The file keeps its length, so a writer with O_APPEND is not affected.
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
        super::macos::hole::punch_before(&self.file, end);
    }
}

impl Drop for MemoryFile {
    fn drop(&mut self) {
        self.remove();
    }
}

/// Returns the directories in memory in which no other user can replace a file of this user. `XDG_RUNTIME_DIR` is
/// checked too, because it may belong to another user: su(1) without `-` does not change the variable.
#[cfg(target_os = "linux")]
fn directories() -> impl Iterator<Item = PathBuf> {
    let named = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    let named = named.filter(|directory| directory.is_absolute()).into_iter();
    let all = named.chain([PathBuf::from("/dev/shm")]);
    all.filter_map(|directory| ownership::safe_directory(&directory)).filter(|directory| is_in_memory(directory))
}

/// Returns the directories for temporary files in which no other user can replace a file of this user. macOS has no
/// file system that is known to be in memory.
///
/// The file keeps its name while terraform runs. Without a name, terraform would have to inherit it and open it below
/// /dev/fd. A wrapper that closes descriptors before it starts terraform would then make terraform write its log to the
/// terminal (`newHCLogger`, internal/logging), and the next `tf` could not read the log of a run that was killed.
#[cfg(not(target_os = "linux"))]
fn directories() -> impl Iterator<Item = PathBuf> {
    let own = super::macos::temporary_directory::of_user().into_iter();
    let all = own.chain([std::env::temp_dir(), PathBuf::from("/tmp")]);
    all.filter_map(|directory| ownership::safe_directory(&directory))
}

/// Returns the directory in memory of a session of this user. A cron job and a shell of su(1) have no
/// `XDG_RUNTIME_DIR`, or another user's, so a file of a session must be searched there too. `None` on systems other
/// than Linux, where [`directories`] has the directory of the user.
fn usual_directory() -> Option<PathBuf> {
    #[cfg(target_os = "linux")]
    {
        let usual = PathBuf::from(format!("/run/user/{}", nix::unistd::geteuid()));
        ownership::safe_directory(&usual).filter(|directory| is_in_memory(directory))
    }
    #[cfg(not(target_os = "linux"))]
    None
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
