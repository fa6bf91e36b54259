//! The messages between `tf` and its guardian.

use crate::terraform::log::JSON_LIMIT;

/// This constant and the following ones, up to [`LEASE`], are the kinds of messages from `tf`. A message
/// consists of its kind in 1 byte, the length of its payload in 4 bytes (little-endian), and the payload.
///
/// A [`STARTED`] message reports that terraform was started. The payload is terraform's pid in 4 bytes, in native byte
/// order.
pub(super) const STARTED: u8 = 1;
/// The message contains an event for the guardian's [`Stop`]. The payload is a [`StopEvent`] as JSON.
pub(super) const EVENT: u8 = 2;
/// The message contains the parsed log. The payload is the offset up to which the log was read, and the parsed log, as
/// JSON.
pub(super) const NEWS: u8 = 3;
/// The message reports that `tf` is about to stop itself, or was continued. The payload is 1 byte: 1 if `tf` is about
/// to stop itself, and 0 if `tf` was continued.
pub(super) const STILL: u8 = 4;
/// The message reports that the run is over. It has no payload.
pub(super) const OVER: u8 = 5;
/// The message contains the processes below terraform that have left its process group. The payload is the pid and the
/// start time of each process, as JSON.
pub(super) const OUTSIDE_GROUP: u8 = 6;
/// The message contains what a keeper of the run's lease needs to know. The payload is [`Orders`] as JSON.
pub(super) const LEASE: u8 = 7;

/// This constant and the three following ones are the messages from the guardian. Each message is 1 byte, and
/// [`super::Heard`] describes what it means.
pub(super) const CANNOT_WRITE: u8 = 1;
pub(super) const UNIT_IS_STOPPED: u8 = 2;
pub(super) const STOPS_NO_MORE: u8 = 3;
pub(super) const LOCK_IS_LOST: u8 = 4;

/// The header of a [`STARTED`] message with a payload of 4 bytes. The child of `tf` that executes terraform writes this
/// header before its pid.
pub(crate) const STARTED_PREFIX: [u8; 5] = [STARTED, 4, 0, 0, 0];

/// The maximum length of a payload, in bytes. The longest payload is that of a [`NEWS`] message: the parsed log, and
/// the offset up to which the log was read.
pub(super) const MAX_MESSAGE_BYTES: usize = JSON_LIMIT + 64;

/// The bytes from the socket that were not processed yet.
#[derive(Debug, Default)]
pub(super) struct Received {
    pub(super) bytes: Vec<u8>,
    /// The number of bytes that must still be discarded before the next message, because they belong to a message that
    /// is too long.
    skipped: usize,
}

impl Received {
    /// Returns the kind and the payload of the next complete message. `None` if no complete message has arrived yet.
    pub(super) fn next(&mut self) -> Option<(u8, Vec<u8>)> {
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
