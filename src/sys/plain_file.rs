//! Reads a file whose path comes from a command line, a variable or a directory. This never blocks, and never consumes
//! input that is meant for terraform.
//!
//! A FIFO, a terminal and the path that a shell passes for `<(...)` can be read only once, and opening a FIFO waits for
//! its other end. So only plain files are read: regular files and `/dev/null`.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Returns whether `path`, after following links, is a regular file or `/dev/null`, which reads as an empty file. On
/// systems other than Linux, returns false for `/dev/stdin` and for paths below `/dev/fd`, even if they refer to a
/// regular file.
pub(crate) fn is_plain(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|file| file.is_file()) && !shares_its_offset(path)
        || fs::canonicalize(path).is_ok_and(|path| path == Path::new("/dev/null"))
}

/// Opens a plain file for reading. Any other file is not even opened: the writer of a FIFO would notice that a reader
/// has opened and closed it.
///
/// # Errors
/// `InvalidInput` if `path` exists and is not a plain file. Otherwise the error of stat(2) or open(2).
pub(crate) fn open(path: &Path) -> io::Result<File> {
    let refused = || io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file");
    fs::metadata(path)?;
    if !is_plain(path) {
        return Err(refused());
    }
    // The file may have been replaced since the check. With these flags, open(2) does not wait, and a terminal does not
    // become the controlling terminal of this process.
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)?;
    let kind = file.metadata()?.file_type();
    if std::os::unix::fs::FileTypeExt::is_fifo(&kind) || kind.is_dir() { Err(refused()) } else { Ok(file) }
}

/// Returns the content of a plain file.
///
/// # Errors
/// Those of [`open`], and the error of read(2).
pub(crate) fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut content = Vec::new();
    open(path)?.read_to_end(&mut content)?;
    Ok(content)
}

/// Returns the content of a plain file as text.
///
/// # Errors
/// Those of [`read`], and `InvalidData` if the content is not UTF-8.
pub(crate) fn read_text(path: &Path) -> io::Result<String> {
    String::from_utf8(read(path)?).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

/// Returns whether opening `path` duplicates an open descriptor. On systems other than Linux, opening `/dev/fd/N`
/// duplicates descriptor N together with its offset, so terraform could not read the data that `tf` has already read.
/// Always false on Linux.
fn shares_its_offset(path: &Path) -> bool {
    !cfg!(target_os = "linux") && (path.starts_with("/dev/fd") || path == Path::new("/dev/stdin"))
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn only_what_can_be_read_at_once_and_again_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let fifo = directory.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let (pipe, mut writer) = std::io::pipe().unwrap();
        writer.write_all(b"for terraform").unwrap();
        let substitution = Path::new("/dev/fd").join(pipe.as_raw_fd().to_string());
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(&fifo, &link).unwrap();
        for path in [&fifo, &link, &substitution, &directory.path().to_owned(), &directory.path().join("none")] {
            assert!(read(path).is_err() && !is_plain(path), "{}", path.display());
        }
        drop(writer);
        let mut rest = String::new();
        (&pipe).read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "for terraform");
        let file = directory.path().join("file");
        fs::write(&file, "text").unwrap();
        assert_eq!(read(&file).unwrap(), b"text");
        assert_eq!(read(Path::new("/dev/null")).unwrap(), b"");
    }
}
