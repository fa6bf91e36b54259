//! Terraform's output, where it is a pipe or a socket: drained through us.
//!
//! When the reader of a pipe goes away (`| head`), the next write kills terraform with SIGPIPE, its lock held and its
//! state unsaved. So terraform gets a pipe of ours, and we pass on what comes. When that fails for the first time,
//! where bare terraform would have died, it is told to stop, and the rest of its output goes nowhere.
//!
//! Files and terminals are handed over as they are. Nothing here waits: each pipe is asked, by poll(2), first whether
//! there is something to read, then whether there is room, so that a reader who does not read (`| less`) keeps nobody
//! from being heard.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::poll::PollFlags;
use nix::sys::stat::{SFlag, fstat};

use crate::sys::descriptor::{self, Moved};

/// Where drained bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum DrainTarget {
    Pipe,
    Socket,
    /// A file or a terminal, which terraform is not handed because a copy is kept.
    Other,
    /// Its reader is gone.
    Nowhere,
}

/// One pipe of ours between terraform and the caller.
#[derive(Debug)]
struct Drain {
    source: OwnedFd,
    /// 1 or 2: the caller's descriptor.
    standard: i32,
    target: DrainTarget,
    /// Something is there to read: now there must be room. Only one of the two is ever asked for.
    full: bool,
    finished: bool,
    /// What was read and not yet sent, where the two cannot be spliced.
    buffer: VecDeque<u8>,
    /// Everything that came, where it is to be kept.
    copy: Option<Vec<u8>>,
}

/// What became of one step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// Go on.
    Going,
    /// The reader went away just now.
    ReaderGone,
}

/// The pipes of one run: none, one that both streams share, or two.
#[derive(Debug, Default)]
pub(crate) struct Pipes {
    drains: Vec<Drain>,
    /// Terraform's ends, for descriptors 1 and 2; dropped once it has them.
    writers: [Option<OwnedFd>; 2],
}

impl Pipes {
    /// Puts a pipe wherever descriptor 1 or 2 is a pipe or a socket. With `keeps_copies` wherever it is anything, one for
    /// each stream, and what comes is kept.
    ///
    /// # Errors
    /// When no pipe can be made.
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
                // `2>&1`: with one pipe for both, the order of what is written stays.
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

    /// What came on descriptors 1 and 2, where copies are kept.
    pub(crate) fn copies(&self) -> [&[u8]; 2] {
        [1, 2].map(|standard| {
            let drain = self.drains.iter().find(|drain| drain.standard == standard);
            drain.and_then(|drain| drain.copy.as_deref()).unwrap_or_default()
        })
    }

    /// What becomes terraform's descriptors 1 and 2.
    pub(crate) fn writers(&self) -> [Option<BorrowedFd<'_>>; 2] {
        self.writers.each_ref().map(|writer| writer.as_ref().map(AsFd::as_fd))
    }

    /// To be called when terraform has its ends.
    pub(crate) fn close_writers(&mut self) {
        self.writers = [None, None];
    }

    /// The ends that a process must keep to drain them in our place.
    pub(crate) fn sources(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.drains.iter().map(|drain| drain.source.as_fd())
    }

    /// From now on nobody reads what comes.
    pub(crate) fn discard_output(&mut self) {
        for drain in &mut self.drains {
            drain.target = DrainTarget::Nowhere;
            drain.buffer.clear();
        }
    }

    /// What to wait for, for each pipe that is still open.
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

    /// Goes on with the pipes whose turn has come: `ready` says so for each that [`Pipes::awaited`] named.
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

    /// Passes on what terraform left in its pipes when it ended, as far as there is room. Somebody below terraform may
    /// hold a writing end for as long as it likes, so this is the end, and not the end of file.
    ///
    /// True when nothing is left.
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

    fn keep(&mut self, bytes: &[u8]) {
        if let Some(copy) = &mut self.copy {
            copy.extend_from_slice(bytes);
        }
    }

    fn move_on(&mut self) -> io::Result<Moved> {
        match self.target {
            #[cfg(target_os = "linux")]
            DrainTarget::Pipe if self.copy.is_none() => {
                descriptor::move_pipe_to_pipe(&self.source, &descriptor::standard(self.standard))
            }
            DrainTarget::Pipe | DrainTarget::Other => {
                // No splice: what poll(2) called writable takes PIPE_BUF bytes, which POSIX has at 512 at least, without
                // waiting.
                let mut bytes = [0; 512];
                match nix::unistd::read(&self.source, &mut bytes)? {
                    0 => Ok(Moved::EndOfSource),
                    length => {
                        self.keep(&bytes[..length]);
                        Ok(Moved::Bytes(nix::unistd::write(descriptor::standard(self.standard), &bytes[..length])?))
                    }
                }
            }
            DrainTarget::Socket => {
                if self.buffer.is_empty() {
                    let mut bytes = [0; 1 << 14];
                    match nix::unistd::read(&self.source, &mut bytes)? {
                        0 => return Ok(Moved::EndOfSource),
                        length => {
                            self.keep(&bytes[..length]);
                            self.buffer.extend(&bytes[..length]);
                        }
                    }
                }
                let moved = descriptor::send(&descriptor::standard(self.standard), self.buffer.make_contiguous())?;
                if let Moved::Bytes(length) = moved {
                    self.buffer.drain(..length);
                }
                self.full = !self.buffer.is_empty();
                Ok(if self.full { Moved::NotReady } else { moved })
            }
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
