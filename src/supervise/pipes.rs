//! If stdout or stderr is a pipe or a socket, passes terraform's output on to it.
//!
//! If the reader of a pipe exits (`| head`), the next write to the pipe would kill terraform with SIGPIPE, with its
//! lock held and its state unsaved. So terraform writes into a pipe of `tf`, and `tf` passes the output on. When a
//! write of `tf` fails, a terraform without `tf` would have died. Instead, `tf` asks terraform to stop, and discards
//! the rest of its output.
//!
//! If stdout or stderr is a file or a terminal, terraform inherits it directly, unless `tf` must keep a copy of the
//! output. No function here blocks. For each pipe, `tf` calls poll(2) to check first that there is data to read, and
//! then that there is room to write it. So a reader that does not read (`| less`) never blocks `tf`.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::poll::PollFlags;
use nix::sys::stat::{SFlag, fstat};

use crate::sys::descriptor::{self, Moved};

/// The kind of descriptor to which the output of one pipe is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum DrainTarget {
    /// A pipe of the caller.
    Pipe,
    /// A socket of the caller.
    Socket,
    /// A file or a terminal. Terraform does not get it directly, because a copy of the output is kept.
    Other,
    /// No descriptor: the reader is gone, and the output is discarded.
    Nowhere,
}

/// The maximum number of bytes that are copied in one step.
const MAX_COPY_BYTES: usize = 1 << 14;

/// From this number of bytes on, output is moved from pipe to pipe with splice(2), which copies nothing. A smaller
/// output is copied: splice(2) would use a whole page of the caller's pipe for each piece, and a default pipe has 16
/// pages. After 16 short lines, the pipe would be full, although it has room for 64 KiB. A caller that waits for the
/// exit of terraform before it reads would then wait for ever, because `tf` waits for its reader.
const SPLICE_FROM_BYTES: usize = 1 << 15;

/// One pipe of `tf` between terraform and the caller.
#[derive(Debug)]
struct Drain {
    source: OwnedFd,
    /// The caller's descriptor: 1 or 2.
    standard: i32,
    target: DrainTarget,
    /// Whether there is data to pass on. If true, `tf` next waits for room to write the data. If false, `tf` next waits
    /// for data to read.
    full: bool,
    /// Whether this pipe needs no further step: every writer has closed it, or terraform has exited and all of its
    /// output was passed on.
    finished: bool,
    /// The bytes that were read and not passed on yet.
    buffer: VecDeque<u8>,
    /// Everything that was read. `None` if no copy is kept.
    copy: Option<Vec<u8>>,
}

/// The result of [`Pipes::step`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// No write to a reader has failed in this step.
    Going,
    /// A write to a reader has failed in this step, normally because the reader has exited or has closed its pipe or
    /// socket.
    ReaderGone,
}

/// The pipes of one run: no pipe, one for both streams, or one for each stream.
#[derive(Debug, Default)]
pub(crate) struct Pipes {
    drains: Vec<Drain>,
    /// The write ends for terraform's descriptors 1 and 2. `None` where terraform inherits the descriptor of this
    /// process, and after the ends were closed.
    writers: [Option<OwnedFd>; 2],
}

/// Copies of terraform's output.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Copies<'a> {
    pub(crate) stdout: &'a [u8],
    pub(crate) stderr: &'a [u8],
}

impl Pipes {
    /// Creates a pipe for each of descriptors 1 and 2 that is a pipe or a socket. If `keeps_copies` is true, creates a
    /// pipe for each open descriptor, whatever its kind, and keeps a copy of the output.
    ///
    /// # Errors
    /// Fails if no pipe can be created.
    pub(crate) fn create_pipes(keeps_copies: bool) -> io::Result<Self> {
        let mut pipes = Self::default();
        let mut identities = Vec::new();
        for (place, standard) in [1, 2].into_iter().enumerate() {
            let Ok(stat) = fstat(descriptor::standard(standard)) else { continue };
            let target = match SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT {
                SFlag::S_IFIFO => DrainTarget::Pipe,
                SFlag::S_IFSOCK => DrainTarget::Socket,
                _ if keeps_copies => DrainTarget::Other,
                _ => continue,
            };
            let identity = (stat.st_dev, stat.st_ino);
            if place == 1 && identities.contains(&identity) && !keeps_copies {
                // `2>&1`: one common pipe preserves the order of terraform's writes to the two streams.
                pipes.writers[1] = pipes.writers[0].as_ref().map(OwnedFd::try_clone).transpose()?;
                continue;
            }
            let (source, writer) = descriptor::pipe()?;
            pipes.writers[place] = Some(writer);
            identities.push(identity);
            pipes.drains.push(Drain {
                source,
                standard,
                target,
                full: false,
                finished: false,
                buffer: VecDeque::new(),
                copy: keeps_copies.then(Vec::new),
            });
        }
        Ok(pipes)
    }

    /// Returns the copies of terraform's output on descriptors 1 and 2. They are empty if no copies are kept.
    pub(crate) fn copies(&self) -> Copies<'_> {
        let copy = |standard| {
            let drain = self.drains.iter().find(|drain| drain.standard == standard);
            drain.and_then(|drain| drain.copy.as_deref()).unwrap_or_default()
        };
        Copies { stdout: copy(1), stderr: copy(2) }
    }

    /// Returns the write ends that become terraform's descriptors 1 and 2. `None` where terraform inherits the
    /// descriptor of this process.
    pub(crate) fn writers(&self) -> [Option<BorrowedFd<'_>>; 2] {
        self.writers.each_ref().map(|writer| writer.as_ref().map(AsFd::as_fd))
    }

    /// Closes the write ends in this process. Call this when terraform has inherited them.
    pub(crate) fn close_writers(&mut self) {
        self.writers = [None, None];
    }

    /// Returns the read ends. A process that reads the output in place of this one must keep them open.
    pub(crate) fn sources(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.drains.iter().map(|drain| drain.source.as_fd())
    }

    /// Discards all output from now on.
    pub(crate) fn discard_output(&mut self) {
        for drain in &mut self.drains {
            drain.target = DrainTarget::Nowhere;
            drain.buffer.clear();
        }
    }

    /// Returns the descriptor and the event to wait for, for each pipe that is not finished.
    pub(crate) fn awaited(&self) -> Vec<(BorrowedFd<'_>, PollFlags)> {
        self.drains
            .iter()
            .filter(|drain| !drain.finished)
            .map(|drain| match (drain.full, drain.target) {
                (true, DrainTarget::Pipe | DrainTarget::Socket | DrainTarget::Other) => {
                    (descriptor::standard(drain.standard), PollFlags::POLLOUT)
                }
                _ => (drain.source.as_fd(), PollFlags::POLLIN),
            })
            .collect()
    }

    /// Does the next step of each pipe that is ready. `ready` has one value for each element of [`Pipes::awaited`].
    pub(crate) fn step(&mut self, ready: &[bool]) -> Progress {
        let mut progress = Progress::Going;
        let open = self.drains.iter_mut().filter(|drain| !drain.finished);
        for (drain, _) in open.zip(ready).filter(|(_, ready)| **ready) {
            if drain.step() == Progress::ReaderGone {
                progress = Progress::ReaderGone;
            }
        }
        progress
    }

    /// Passes on the output that was left in the pipes when terraform exited, as far as the readers have room for it.
    /// An empty pipe counts as finished, even if it has not reached its end of file: a process below terraform may keep
    /// a write end open for an unlimited time.
    ///
    /// Returns true if all output was passed on or discarded. Returns false if a reader has no room for the rest.
    pub(crate) fn flush(&mut self) -> bool {
        self.drains.iter_mut().for_each(Drain::flush);
        self.drains.iter().all(|drain| drain.finished)
    }
}

impl Drain {
    fn step(&mut self) -> Progress {
        if !self.full && self.target != DrainTarget::Nowhere {
            self.full = true;
            return Progress::Going;
        }
        self.full = false;
        match self.move_on() {
            Ok(Moved::Bytes(_)) => Progress::Going,
            Ok(Moved::NotReady) => {
                self.full = !self.buffer.is_empty();
                Progress::Going
            }
            Ok(Moved::EndOfSource) => {
                self.finished = true;
                Progress::Going
            }
            Err(_) if self.target == DrainTarget::Nowhere => {
                self.finished = true;
                Progress::Going
            }
            Err(_) => {
                self.target = DrainTarget::Nowhere;
                self.buffer.clear();
                Progress::ReaderGone
            }
        }
    }

    fn flush(&mut self) {
        while !self.finished {
            let awaits = if self.target == DrainTarget::Nowhere || !self.full {
                (self.source.as_fd(), PollFlags::POLLIN)
            } else {
                (descriptor::standard(self.standard), PollFlags::POLLOUT)
            };
            let empty = !crate::sys::poll::ready_now(awaits.0, awaits.1);
            if empty && !self.full && self.buffer.is_empty() {
                self.finished = true;
            }
            if empty {
                return;
            }
            self.step();
        }
    }

    /// Reads up to `most` bytes, unless bytes of an earlier step are left, and passes them on with `write`, which does
    /// not wait.
    fn copy_to(
        &mut self,
        most: usize,
        write: impl Fn(&BorrowedFd<'static>, &[u8]) -> io::Result<Moved>,
    ) -> io::Result<Moved> {
        if self.buffer.is_empty() {
            let mut bytes = [0; MAX_COPY_BYTES];
            match nix::unistd::read(&self.source, &mut bytes[..most.min(MAX_COPY_BYTES)])? {
                0 => return Ok(Moved::EndOfSource),
                length => {
                    self.keep(&bytes[..length]);
                    self.buffer.extend(&bytes[..length]);
                }
            }
        }
        let moved = write(&descriptor::standard(self.standard), self.buffer.make_contiguous())?;
        if let Moved::Bytes(length) = moved {
            self.buffer.drain(..length);
        }
        self.full = !self.buffer.is_empty();
        Ok(if self.full { Moved::NotReady } else { moved })
    }

    fn keep(&mut self, bytes: &[u8]) {
        if let Some(copy) = &mut self.copy {
            copy.extend_from_slice(bytes);
        }
    }

    fn move_on(&mut self) -> io::Result<Moved> {
        match self.target {
            DrainTarget::Pipe
                if descriptor::HAS_SPLICE
                    && self.copy.is_none()
                    && self.buffer.is_empty()
                    && descriptor::readable_bytes(&self.source) >= SPLICE_FROM_BYTES =>
            {
                descriptor::move_pipe_to_pipe(&self.source, &descriptor::standard(self.standard))
            }
            DrainTarget::Pipe => self.copy_to(descriptor::ATOMIC_WRITE_BYTES, descriptor::write_to_pipe),
            // At most 512 bytes are moved at a time: a descriptor that poll(2) reports as writable accepts PIPE_BUF bytes at
            // once, and POSIX requires PIPE_BUF to be 512 or more. Only a terminal that nobody reads may accept less.
            DrainTarget::Other => self.copy_to(512, descriptor::write),
            DrainTarget::Socket => self.copy_to(MAX_COPY_BYTES, descriptor::send),
            DrainTarget::Nowhere => {
                let mut bytes = [0; 1 << 14];
                match nix::unistd::read(&self.source, &mut bytes)? {
                    0 => Ok(Moved::EndOfSource),
                    length => {
                        self.keep(&bytes[..length]);
                        Ok(Moved::Bytes(length))
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    /// Returns a pipe of one drain, and its write end. Nothing here writes to the caller's descriptor.
    fn drain(target: DrainTarget, keeps_copy: bool) -> (Pipes, std::fs::File) {
        let (source, writer) = descriptor::pipe().unwrap();
        let copy = keeps_copy.then(Vec::new);
        let drain = Drain { source, standard: 1, target, full: false, finished: false, buffer: VecDeque::new(), copy };
        (Pipes { drains: vec![drain], writers: [None, None] }, writer.into())
    }

    /// As at a terminal that does not block, while another process writes to it.
    #[test]
    fn what_a_write_does_not_accept_is_written_later() {
        let (mut pipes, mut writer) = drain(DrainTarget::Other, true);
        writer.write_all(b"abcdef").unwrap();
        let (drain, mut written) = (&mut pipes.drains[0], Vec::new());
        assert_eq!(drain.copy_to(512, |_, _| Ok(Moved::NotReady)).unwrap(), Moved::NotReady);
        for (length, expected) in [(2, Moved::NotReady), (4, Moved::Bytes(4))] {
            let target = std::cell::RefCell::new(&mut written);
            let write = |_: &BorrowedFd<'static>, bytes: &[u8]| {
                target.borrow_mut().extend_from_slice(&bytes[..length]);
                Ok(Moved::Bytes(length))
            };
            assert_eq!(drain.copy_to(512, write).unwrap(), expected);
        }
        assert_eq!((&written[..], drain.copy.as_deref()), (&b"abcdef"[..], Some(&b"abcdef"[..])));
    }

    #[test]
    fn a_pipe_is_awaited_for_data_and_then_for_room() {
        for target in [DrainTarget::Pipe, DrainTarget::Socket, DrainTarget::Other] {
            let (mut pipes, mut writer) = drain(target, false);
            writer.write_all(b"x").unwrap();
            let awaited = |pipes: &Pipes| pipes.awaited().iter().map(|(_, events)| *events).collect::<Vec<_>>();
            assert_eq!(awaited(&pipes), [PollFlags::POLLIN], "{target:?}");
            assert_eq!(pipes.step(&[false]), Progress::Going);
            assert_eq!(awaited(&pipes), [PollFlags::POLLIN], "{target:?}: it was not ready");
            assert_eq!(pipes.step(&[true]), Progress::Going);
            assert_eq!(awaited(&pipes), [PollFlags::POLLOUT], "{target:?}");
            assert!(pipes.drains[0].buffer.is_empty(), "nothing is read before there is room");
        }
    }

    #[test]
    fn without_a_reader_the_output_is_read_and_kept_until_its_end() {
        let (mut pipes, mut writer) = drain(DrainTarget::Nowhere, true);
        writer.write_all(b"one ").unwrap();
        assert_eq!(pipes.step(&[true]), Progress::Going);
        writer.write_all(b"two").unwrap();
        drop(writer);
        assert_eq!(pipes.step(&[true]), Progress::Going);
        assert!(!pipes.drains[0].finished);
        assert_eq!(pipes.step(&[true]), Progress::Going);
        assert!(pipes.awaited().is_empty(), "a pipe at its end is not awaited");
        assert_eq!((pipes.copies().stdout, pipes.copies().stderr), (&b"one two"[..], &b""[..]));
    }

    #[test]
    fn output_that_is_discarded_waits_for_no_room() {
        let (mut pipes, mut writer) = drain(DrainTarget::Pipe, false);
        writer.write_all(b"x").unwrap();
        assert_eq!(pipes.step(&[true]), Progress::Going);
        pipes.drains[0].buffer.extend(b"left");
        pipes.discard_output();
        assert!(pipes.drains[0].buffer.is_empty());
        assert_eq!(pipes.awaited()[0].1, PollFlags::POLLIN);
        assert!(pipes.flush(), "the rest is discarded");
        assert!(pipes.copies().stdout.is_empty());
    }

    #[test]
    fn an_empty_pipe_is_finished_after_terraforms_exit_although_a_process_has_it_open() {
        for target in [DrainTarget::Pipe, DrainTarget::Nowhere] {
            let (mut pipes, writer) = drain(target, false);
            assert!(pipes.flush(), "{target:?}");
            assert!(pipes.awaited().is_empty(), "{target:?}");
            drop(writer);
        }
    }

    #[test]
    fn a_reader_that_is_gone_is_reported_once_and_its_pipe_is_drained() {
        let (mut pipes, mut writer) = drain(DrainTarget::Socket, false);
        writer.write_all(b"x").unwrap();
        // Descriptor 1 of a test is not a socket, so the write fails as that to a closed socket does.
        pipes.drains[0].full = true;
        let is_socket = fstat(descriptor::standard(1))
            .is_ok_and(|stat| SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT == SFlag::S_IFSOCK);
        if !is_socket {
            assert_eq!(pipes.step(&[true]), Progress::ReaderGone);
            assert_eq!(pipes.drains[0].target, DrainTarget::Nowhere);
            writer.write_all(b"more").unwrap();
            assert_eq!(pipes.step(&[true]), Progress::Going);
        }
    }
}
