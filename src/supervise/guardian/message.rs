//! The messages between `tf` and its guardian.
//!
//! There are two sockets. [`EVENT`] and [`STILL`] messages have one of their own, so that they never wait for the others.
//! A guardian that waits for a disk does not read, and the parsed logs and the other messages may fill their socket
//! meanwhile. If an event waited behind them in the memory of `tf`, and `tf` was killed, the guardian would not know that
//! terraform was interrupted. It would interrupt terraform again, and terraform would exit without releasing its lock.
//!
//! The socket of the events always has room for the first one, because `tf` reports no suspension after
//! [`MAX_UNANSWERED`] without an answer. One event is enough: after any event, the guardian's
//! [`Stop`](crate::supervise::stop::Stop) does not interrupt terraform because of the death of `tf`.
//!
//! The guardian reads the events first, then all other messages, and handles the events last. So it handles an event
//! after every message that was in its socket before the event. A message for which there was no room may come later.

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use nix::poll::PollFlags;

use crate::sys::poll;
use crate::terraform::log::JSON_LIMIT;
use crate::trace::trace;

/// How often `tf` reports a suspension without an answer of the guardian. A guardian that has not answered so many hangs,
/// or is frozen.
pub(crate) const MAX_UNANSWERED: u32 = 32;

/// This constant and the following ones, up to [`LEASE`], are the kinds of messages from `tf`. A message
/// consists of its kind in 1 byte, the length of its payload in 4 bytes (little-endian), and the payload.
///
/// A [`STARTED`] message reports that terraform was started. The payload is terraform's pid in 4 bytes, in native byte
/// order.
pub(super) const STARTED: u8 = 1;
/// The message contains an event for the guardian's [`Stop`](crate::supervise::stop::Stop). The payload is a
/// [`StopEvent`](crate::supervise::stop::StopEvent) as JSON.
pub(super) const EVENT: u8 = 2;
/// The message contains the parsed log. The payload is the offset up to which the log was read, and the parsed log, as
/// JSON.
pub(super) const NEWS: u8 = 3;
/// The message reports that `tf` is about to stop itself, or was continued. The payload is a [`Suspension`] in 1 byte.
pub(super) const STILL: u8 = 4;
/// The message reports that the run is over. It has no payload.
pub(super) const OVER: u8 = 5;
/// The message contains the processes below terraform that have left its process group. The payload is the pid and the
/// start time of each process, as JSON.
pub(super) const OUTSIDE_GROUP: u8 = 6;
/// The message contains what a keeper of the run's lease needs to know. The payload is
/// [`Orders`](crate::supervise::keeper::Orders) as JSON.
pub(super) const LEASE: u8 = 7;

/// This constant and the three following ones are the messages from the guardian. Each message is 1 byte, and
/// [`super::Heard`] describes what it means.
pub(super) const CANNOT_WRITE: u8 = 1;
pub(super) const UNIT_IS_STOPPED: u8 = 2;
pub(super) const STOPS_NO_MORE: u8 = 3;
pub(super) const LOCK_IS_LOST: u8 = 4;

/// What `tf` reports about its own stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Suspension {
    /// `tf` was continued.
    Over,
    /// `tf` is about to stop itself. Terraform may be running.
    Alone,
    /// `tf` is about to stop itself, and terraform is stopped. If somebody continues terraform alone, the guardian
    /// continues `tf`: nobody else passes on terraform's output, and terraform would wait for that with its lock held.
    WithTerraform,
}

impl Suspension {
    /// Returns the suspension that has this number in a [`STILL`] message. `None` if there is none.
    pub(super) fn of_number(number: u8) -> Option<Self> {
        [Self::Over, Self::Alone, Self::WithTerraform].into_iter().find(|suspension| *suspension as u8 == number)
    }
}

/// The header of a [`STARTED`] message with a payload of 4 bytes. The child of `tf` that executes terraform writes this
/// header before its pid.
pub(crate) const STARTED_PREFIX: [u8; 5] = [STARTED, 4, 0, 0, 0];

/// The maximum length of a payload, in bytes. The longest payload is that of a [`NEWS`] message: the parsed log, and
/// the offset up to which the log was read.
pub(super) const MAX_MESSAGE_BYTES: usize = JSON_LIMIT + 64;

/// The kind and the payload of a message from `tf`.
pub(super) type Message = (u8, Vec<u8>);

/// The end of a socket into which `tf` writes messages.
#[derive(Debug)]
pub(super) struct MessageWriter {
    socket: UnixStream,
    /// The bytes that could not be written to the socket yet, because it was full.
    unsent: Vec<u8>,
}

impl MessageWriter {
    /// Returns the writer, and the other end of its socket.
    ///
    /// # Errors
    /// If the socket cannot be created.
    pub(super) fn new() -> io::Result<(Self, UnixStream)> {
        let (socket, other) = UnixStream::pair()?;
        socket.set_nonblocking(true)?;
        Ok((Self { socket, unsent: Vec::new() }, other))
    }

    /// Returns this end of the socket.
    pub(super) fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Whether bytes of an earlier message wait for room in the socket.
    pub(super) fn is_full(&self) -> bool {
        !self.unsent.is_empty()
    }

    /// Appends a message to the unsent bytes, and writes as many of them as the socket accepts now.
    ///
    /// # Errors
    /// If the other end is closed.
    pub(super) fn send(&mut self, kind: u8, payload: &[u8]) -> io::Result<()> {
        let had_room = !self.is_full();
        self.unsent.push(kind);
        self.unsent.extend(u32::try_from(payload.len()).unwrap_or(0).to_le_bytes());
        self.unsent.extend(payload);
        self.flush()?;
        if had_room && self.is_full() {
            trace!("the guardian has not read what was sent to it, and {} bytes wait", self.unsent.len());
        }
        Ok(())
    }

    /// Writes as many of the unsent bytes as the socket accepts now.
    ///
    /// # Errors
    /// If the other end is closed.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        while !self.unsent.is_empty() {
            match self.socket.write(&self.unsent) {
                Ok(length) => drop(self.unsent.drain(..length)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// The end of a socket from which the guardian reads messages.
#[derive(Debug)]
pub(super) struct MessageReader {
    socket: UnixStream,
    received: Received,
}

impl MessageReader {
    pub(super) fn new(socket: UnixStream) -> Self {
        Self { socket, received: Received::default() }
    }

    /// Returns this end of the socket.
    pub(super) fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Whether there is something to read, or the other end is closed.
    pub(super) fn is_ready(&self) -> bool {
        poll::ready_now(self.socket.as_fd(), PollFlags::POLLIN)
    }

    /// Returns the messages that have arrived, without waiting, and whether the other end is closed.
    pub(super) fn read(&mut self) -> (Vec<Message>, bool) {
        let (mut messages, mut bytes) = (Vec::new(), [0; 1 << 14]);
        while self.is_ready() {
            let length = match self.socket.read(&mut bytes) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                read => read.unwrap_or(0),
            };
            if length == 0 {
                return (messages, true);
            }
            self.received.bytes.extend(&bytes[..length]);
            messages.extend(std::iter::from_fn(|| self.received.next()));
        }
        (messages, false)
    }
}

/// The bytes from the socket that were not processed yet.
#[derive(Debug, Default)]
struct Received {
    bytes: Vec<u8>,
    /// The number of bytes that must still be discarded before the next message, because they belong to a message that
    /// is too long.
    skipped: usize,
}

impl Received {
    /// Returns the kind and the payload of the next complete message. `None` if no complete message has arrived yet.
    fn next(&mut self) -> Option<(u8, Vec<u8>)> {
        loop {
            let skipped = self.skipped.min(self.bytes.len());
            self.bytes.drain(..skipped);
            self.skipped -= skipped;
            let head = *self.bytes.first_chunk::<5>()?;
            let length = u32::from_le_bytes([head[1], head[2], head[3], head[4]]) as usize;
            if length > MAX_MESSAGE_BYTES {
                self.skipped = 5 + length;
                continue;
            }
            if self.bytes.len() < 5 + length {
                return None;
            }
            let payload = self.bytes[5..5 + length].to_vec();
            self.bytes.drain(..5 + length);
            return Some((head[0], payload));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u8, length: usize) -> Vec<u8> {
        let mut message = vec![kind];
        message.extend(u32::try_from(length).unwrap().to_le_bytes());
        message.resize(5 + length, kind);
        message
    }

    /// The guardian hangs, and `tf` is killed meanwhile.
    #[test]
    fn an_event_arrives_after_suspensions_and_although_the_other_messages_have_no_room() {
        let (mut messages, other) = MessageWriter::new().unwrap();
        let (mut events, events_end) = MessageWriter::new().unwrap();
        while !messages.is_full() {
            messages.send(NEWS, &[0; 1 << 10]).unwrap();
        }
        for _ in 0..MAX_UNANSWERED {
            for still in [1, 0] {
                events.send(STILL, &[still]).unwrap();
            }
        }
        events.send(EVENT, b"\"KeyboardAtTerraform\"").unwrap();
        assert!(!events.is_full());
        drop((messages, events));
        let mut reader = MessageReader::new(events_end);
        let (read, is_closed) = reader.read();
        assert!(is_closed && read.len() == 2 * MAX_UNANSWERED as usize + 1);
        assert_eq!(read.last(), Some(&(EVENT, b"\"KeyboardAtTerraform\"".to_vec())));
        assert!(MessageReader::new(other).read().1);
    }

    #[test]
    fn a_message_that_is_too_long_is_passed_over_and_the_next_is_heard() {
        let long = message(NEWS, MAX_MESSAGE_BYTES + 1);
        let whole = [
            message(EVENT, 1),
            long.clone(),
            message(STILL, 1),
            long,
            message(NEWS, MAX_MESSAGE_BYTES),
            message(OVER, 0),
        ];
        for size in [1 << 14, 4096 + 1, 1 << 23] {
            let mut received = Received::default();
            let mut heard = Vec::new();
            for piece in whole.concat().chunks(size) {
                received.bytes.extend(piece);
                heard.extend(std::iter::from_fn(|| received.next()).map(|(kind, payload)| (kind, payload.len())));
                assert!(received.bytes.len() <= MAX_MESSAGE_BYTES + 5 + size);
            }
            assert_eq!(heard, [(EVENT, 1), (STILL, 1), (NEWS, MAX_MESSAGE_BYTES), (OVER, 0)]);
        }
    }

    #[test]
    fn any_bytes_in_any_pieces_are_the_same_messages_and_take_no_more_room_than_one() {
        use proptest::prelude::*;
        let messages = prop::collection::vec((any::<u8>(), 0_usize..40), 0..6);
        let pieces = prop::collection::vec(any::<prop::sample::Index>(), 0..4);
        let strategy = (messages, prop::collection::vec(any::<u8>(), 0..12), pieces);
        crate::generated_input::for_all(file!(), &strategy, |(messages, rest, pieces)| {
            let mut bytes: Vec<u8> = messages.iter().flat_map(|(kind, length)| message(*kind, *length)).collect();
            let whole = bytes.len();
            bytes.extend(rest);
            let mut cuts: Vec<usize> = pieces.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
            cuts.extend([0, bytes.len()]);
            cuts.sort_unstable();
            let mut received = Received::default();
            let mut heard = Vec::new();
            for cut in cuts.windows(2) {
                received.bytes.extend(&bytes[cut[0]..cut[1]]);
                while let Some((kind, payload)) = received.next() {
                    heard.push((kind, payload.len()));
                }
                prop_assert!(received.bytes.len() <= MAX_MESSAGE_BYTES + 5);
            }
            prop_assert_eq!(&heard[..messages.len()], messages.as_slice(), "{} bytes", whole);
            Ok(())
        });
    }
}
