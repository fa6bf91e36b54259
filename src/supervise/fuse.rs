//! The fuse: a process that holds the write ends of a run's two pipes, and dies when the run's lease has not been
//! renewed in time. Its death closes the pipes, and that makes the kernel stop terraform (`sys::hangup_pipe`).
//!
//! It has one thread, no memory to speak of and no open files, so that nothing can delay its death. It does not renew
//! anything itself. Its deadline comes from the keeper, and the kernel's timer kills it, even while it is frozen in a
//! cgroup v2 or stopped.
//!
//! It gets its messages as packets over the deadline socket. The other end is held by the keeper, by `tf` and by the
//! guardian, so any of them can end the fuse when the run is over, whichever is left.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use nix::poll::PollFlags;

use crate::crash_point;
use crate::sys::boot_clock::KillTimer;
use crate::sys::hangup_pipe::HangupPipe;
use crate::sys::packet_socket::{Packet, PacketSocket};
use crate::sys::{poll, session};

/// The length of the longest message and of an answer, in bytes.
const MESSAGE_BYTES: usize = 1 + 8;
const ANSWER_BYTES: usize = 1 + 4 + 8;

/// A message to the fuse.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Message {
    /// A renewal was confirmed, and terraform may work until this time of `sys::boot_clock`. The fuse answers.
    Deadline(Duration),
    /// A renewal is about to be sent after which terraform may work until this time. It counts only if the fuse has no
    /// deadline yet. Otherwise a keeper that was started anew would extend the deadline by a renewal that may never
    /// arrive. The fuse answers.
    FirstDeadline(Duration),
    /// The packet has the write end of the kill pipe. There is no answer.
    KillPipe,
    /// The run is over. There is no answer.
    Over,
}

// The kinds of all packets: those of `Message` and `Answer`, and that to a spare fuse.
const DEADLINE: u8 = 1;
const KILL_PIPE: u8 = 2;
const OVER: u8 = 3;
const ARMED: u8 = 4;
const CANNOT: u8 = 5;
const STOP_PIPE: u8 = 6;
const FIRST_DEADLINE: u8 = 7;

impl Message {
    fn encode(self) -> Vec<u8> {
        match self {
            Self::Deadline(deadline) => [&[DEADLINE][..], &nanoseconds(deadline)].concat(),
            Self::FirstDeadline(deadline) => [&[FIRST_DEADLINE][..], &nanoseconds(deadline)].concat(),
            Self::KillPipe => vec![KILL_PIPE],
            Self::Over => vec![OVER],
        }
    }

    /// Returns the message in `packet`. `None` if it has none.
    fn decode(packet: &[u8]) -> Option<Self> {
        match packet {
            [kind @ (DEADLINE | FIRST_DEADLINE), time @ ..] => {
                let time = Duration::from_nanos(u64::from_le_bytes(time.try_into().ok()?));
                Some(if *kind == DEADLINE { Self::Deadline(time) } else { Self::FirstDeadline(time) })
            }
            [KILL_PIPE] => Some(Self::KillPipe),
            [OVER] => Some(Self::Over),
            _ => None,
        }
    }
}

/// The fuse's answer to a deadline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Answer {
    /// The number of the fuse that answers. Each fuse of a run has another number. So an old answer cannot pass for one
    /// of a new fuse.
    pub(crate) fuse: u32,
    /// When the fuse will die. It is the deadline that the message had, or a later one of an earlier message. `None` if
    /// the fuse has no timer, so that nothing will kill it in time.
    pub(crate) deadline: Option<Duration>,
}

impl Answer {
    fn encode(self) -> Vec<u8> {
        let kind = if self.deadline.is_some() { ARMED } else { CANNOT };
        [&[kind][..], &self.fuse.to_le_bytes(), &nanoseconds(self.deadline.unwrap_or_default())].concat()
    }

    fn decode(packet: &[u8]) -> Option<Self> {
        let (&kind, rest) = packet.split_first()?;
        let (fuse, time) = rest.split_first_chunk::<4>()?;
        let time = Duration::from_nanos(u64::from_le_bytes(time.try_into().ok()?));
        let deadline = match kind {
            ARMED => Some(time),
            CANNOT => None,
            _ => return None,
        };
        Some(Self { fuse: u32::from_le_bytes(*fuse), deadline })
    }
}

/// Returns the nanoseconds of `time` in a packet. 2^64 ns are more than 500 years.
fn nanoseconds(time: Duration) -> [u8; 8] {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX).to_le_bytes()
}

/// Sends the fuse the deadline of a confirmed renewal: a time of `sys::boot_clock`. `socket` is the keeper's end of the
/// deadline socket. The fuse takes the latest deadline that it got, and answers each one ([`receive_answer`]).
///
/// # Errors
/// `WouldBlock` if the fuse has not read its earlier messages; `BrokenPipe` or `ConnectionReset` if no process holds
/// the fuse's end.
pub(crate) fn send_deadline(socket: &PacketSocket, deadline: Duration) -> io::Result<()> {
    socket.send(&Message::Deadline(deadline).encode())
}

/// Sends the fuse the deadline of a renewal that is about to be sent. It counts only if the fuse has no deadline yet.
/// The fuse answers.
///
/// # Errors
/// As [`send_deadline`].
pub(crate) fn send_first_deadline(socket: &PacketSocket, deadline: Duration) -> io::Result<()> {
    socket.send(&Message::FirstDeadline(deadline).encode())
}

/// Sends the fuse the write end of the kill pipe. The kill pipe does not hang up while the packet is on its way.
///
/// # Errors
/// As [`send_deadline`].
pub(crate) fn send_kill_pipe(socket: &PacketSocket, write_end: &OwnedFd) -> io::Result<()> {
    socket.send_with_descriptor(&Message::KillPipe.encode(), write_end.as_fd())
}

/// Tells the fuse that the run is over. It disarms both pipes and exits, so no process of terraform's group is
/// signalled.
///
/// # Errors
/// As [`send_deadline`].
pub(crate) fn send_over(socket: &PacketSocket) -> io::Result<()> {
    socket.send(&Message::Over.encode())
}

/// Returns the next answer of the fuse, without waiting. `None` if there is none. A caller that waits for an answer
/// must wait for a hang-up of the stop pipe or for a limited time too, because a fuse that has died does not answer,
/// and another process may hold its end.
///
/// # Errors
/// `UnexpectedEof` if no process holds the fuse's end, so that no answer can arrive; or the error of recvmsg(2).
pub(crate) fn receive_answer(socket: &PacketSocket) -> io::Result<Option<Answer>> {
    let mut buffer = [0; ANSWER_BYTES];
    loop {
        match socket.receive(&mut buffer) {
            Ok(Packet::Bytes(length, _)) => {
                if let Some(answer) = Answer::decode(&buffer[..length]) {
                    return Ok(Some(answer));
                }
            }
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {}
            Ok(Packet::NotReady) => return Ok(None),
            Ok(Packet::EndOfSource) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Err(error) => return Err(error),
        }
    }
}

/// Discards everything that has arrived at `socket`.
pub(crate) fn drain(socket: &PacketSocket) {
    let mut buffer = [0; ANSWER_BYTES];
    loop {
        match socket.receive(&mut buffer) {
            Ok(Packet::Bytes(..)) => {}
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {}
            Ok(Packet::NotReady | Packet::EndOfSource) | Err(_) => return,
        }
    }
}

/// What the fuse has seen of its socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Event {
    Message(Message),
    /// The keeper, `tf` and the guardian are gone.
    EndOfSource,
}

/// What the fuse knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct State {
    /// Whether it has a timer.
    has_timer: bool,
    /// The time for which its timer is set. `None` before the first deadline.
    deadline: Option<Duration>,
}

/// What the fuse does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Step {
    /// It sets its timer for this time, and answers.
    SetTimer(Duration),
    /// It answers with the deadline that it has.
    Answer,
    /// It keeps the descriptor of the packet open.
    KeepDescriptor,
    /// It reads its socket no more, and waits for its timer.
    StopListening,
    /// It disarms both pipes and exits.
    End,
}

/// Decides what the fuse does about `event`.
///
/// A deadline that is earlier than the timer's changes nothing: it is from a message that was sent before the later one
/// was. The later deadline follows from a confirmed renewal.
///
/// At the end of its socket, nobody can renew the lease any more. Terraform may then work until the deadline and no
/// longer. A fuse without a deadline guards no lease, so it must not stay behind.
fn decide(state: State, event: Event) -> Step {
    match event {
        Event::Message(Message::Deadline(new)) if state.has_timer && state.deadline.is_none_or(|old| new > old) => {
            Step::SetTimer(new)
        }
        Event::Message(Message::FirstDeadline(first)) if state.has_timer && state.deadline.is_none() => {
            Step::SetTimer(first)
        }
        Event::Message(Message::Deadline(_) | Message::FirstDeadline(_)) => Step::Answer,
        Event::Message(Message::KillPipe) => Step::KeepDescriptor,
        Event::EndOfSource if state.deadline.is_some() => Step::StopListening,
        Event::Message(Message::Over) | Event::EndOfSource => Step::End,
    }
}

/// What a fuse holds. Everything else of its process is closed.
#[derive(Debug)]
pub(crate) struct Fuse {
    /// Its number among the fuses of the run.
    pub(crate) number: u32,
    pub(crate) socket: PacketSocket,
    pub(crate) stop: HangupPipe,
    pub(crate) kill: HangupPipe,
    pub(crate) role: Role,
    /// `None` if it comes in a packet.
    pub(crate) kill_write_end: Option<OwnedFd>,
}

/// Whether a fuse is in use.
#[derive(Debug)]
pub(crate) enum Role {
    /// It holds this write end of the stop pipe.
    InUse(OwnedFd),
    /// It waits at this socket for the write end of the stop pipe. The other end is held by `tf` alone.
    Spare(PacketSocket),
}

/// Makes a spare fuse the fuse of the run. `socket` is the other end of its [`Role::Spare`].
///
/// # Errors
/// `BrokenPipe` or `ConnectionReset` if the spare fuse is gone.
pub(crate) fn send_stop_pipe(socket: &PacketSocket, write_end: &OwnedFd) -> io::Result<()> {
    socket.send_with_descriptor(&[STOP_PIPE], write_end.as_fd())
}

impl Fuse {
    /// Runs the fuse in its own process. Returns when the run is over; the process must then exit at once.
    ///
    /// A spare fuse first waits until it is in use. It ends if `tf` ends before that.
    pub(crate) fn run(mut self) {
        let timer = KillTimer::new().ok();
        if let Role::Spare(socket) = &self.role {
            crash_point::reached("spare: begun");
            let Some(write_end) = receive_stop_pipe(socket) else {
                crash_point::reached("spare: told over");
                return;
            };
            self.role = Role::InUse(write_end);
            session::name_this_process(c"tf-fuse");
            crash_point::reached("fuse: in use");
        } else {
            crash_point::reached("fuse: begun");
        }
        let mut state = State { has_timer: timer.is_some(), deadline: None };
        loop {
            let (event, descriptor) = self.next_event();
            match decide(state, event) {
                Step::SetTimer(deadline) => {
                    crash_point::reached("fuse: has a deadline");
                    if timer.as_ref().is_some_and(|timer| timer.set(deadline).is_ok()) {
                        state.deadline = Some(deadline);
                        crash_point::reached("fuse: armed");
                        self.answer(state.deadline);
                        crash_point::reached("fuse: has answered");
                    } else {
                        self.answer(None);
                    }
                }
                Step::Answer => self.answer(state.deadline),
                Step::KeepDescriptor => {
                    self.kill_write_end = descriptor.or(self.kill_write_end.take());
                    crash_point::reached("fuse: has the kill pipe");
                }
                Step::StopListening => break,
                Step::End => {
                    crash_point::reached("fuse: told over");
                    let _ = self.stop.disarm();
                    let _ = self.kill.disarm();
                    crash_point::reached("fuse: has disarmed");
                    return;
                }
            }
        }
        crash_point::reached("fuse: alone");
        // The write ends stay open until the timer kills this process.
        loop {
            poll::wait(&[], None);
        }
    }

    /// Waits for the next event. Returns it with the descriptor of its packet.
    fn next_event(&self) -> (Event, Option<OwnedFd>) {
        let mut buffer = [0; MESSAGE_BYTES];
        loop {
            poll::wait(&[(self.socket.as_fd(), PollFlags::POLLIN)], None);
            match self.socket.receive(&mut buffer) {
                Ok(Packet::Bytes(length, descriptor)) => {
                    if let Some(message) = Message::decode(&buffer[..length]) {
                        return (Event::Message(message), descriptor);
                    }
                }
                Ok(Packet::NotReady) => {}
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {}
                // A socket that cannot be read brings no messages any more.
                Ok(Packet::EndOfSource) | Err(_) => return (Event::EndOfSource, None),
            }
        }
    }

    /// Answers a deadline. An answer that cannot be sent is lost: the keeper then sends no renewal.
    fn answer(&self, deadline: Option<Duration>) {
        let _ = self.socket.send(&Answer { fuse: self.number, deadline }.encode());
    }
}

/// Waits for the write end of the stop pipe. `None` if `tf` is gone, or if the write end cannot be received.
fn receive_stop_pipe(socket: &PacketSocket) -> Option<OwnedFd> {
    loop {
        poll::wait(&[(socket.as_fd(), PollFlags::POLLIN)], None);
        match socket.receive(&mut [0]) {
            Ok(Packet::Bytes(_, descriptor)) => return descriptor,
            Ok(Packet::NotReady) => {}
            Ok(Packet::EndOfSource) | Err(_) => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVENTS: [Event; 7] = [
        Event::Message(Message::FirstDeadline(Duration::from_secs(2))),
        Event::Message(Message::Deadline(Duration::from_secs(1))),
        Event::Message(Message::Deadline(Duration::from_secs(2))),
        Event::Message(Message::Deadline(Duration::from_secs(3))),
        Event::Message(Message::KillPipe),
        Event::Message(Message::Over),
        Event::EndOfSource,
    ];

    /// Every sequence of five events, up to the one after which the fuse does not listen any more.
    #[test]
    fn the_latest_deadline_counts_and_only_a_fuse_with_a_deadline_outlives_its_socket() {
        for has_timer in [false, true] {
            for number in 0..EVENTS.len().pow(5) {
                let mut state = State { has_timer, deadline: None };
                let mut latest = None;
                for place in 0..5 {
                    let event = EVENTS[number / EVENTS.len().pow(place) % EVENTS.len()];
                    let step = decide(state, event);
                    match event {
                        Event::Message(Message::Deadline(new)) => {
                            let is_later = has_timer && latest < Some(new);
                            assert_eq!(step, if is_later { Step::SetTimer(new) } else { Step::Answer });
                            if is_later {
                                latest = Some(new);
                                state.deadline = latest;
                            }
                            // What it answers is what it does: there is a deadline exactly if there is a timer.
                            assert_eq!(state.deadline.is_some(), has_timer);
                        }
                        Event::Message(Message::FirstDeadline(new)) => {
                            let is_first = has_timer && latest.is_none();
                            assert_eq!(step, if is_first { Step::SetTimer(new) } else { Step::Answer });
                            if is_first {
                                latest = Some(new);
                                state.deadline = latest;
                            }
                        }
                        Event::Message(Message::KillPipe) => assert_eq!(step, Step::KeepDescriptor),
                        Event::EndOfSource if latest.is_some() => assert_eq!(step, Step::StopListening),
                        Event::Message(Message::Over) | Event::EndOfSource => assert_eq!(step, Step::End),
                    }
                    if matches!(step, Step::End | Step::StopListening) {
                        break;
                    }
                }
            }
        }
    }

    #[test]
    fn messages_and_answers_are_read_back_and_other_packets_are_not() {
        for deadline in [Duration::ZERO, Duration::new(7, 1), Duration::from_nanos(u64::MAX)] {
            for message in
                [Message::Deadline(deadline), Message::FirstDeadline(deadline), Message::KillPipe, Message::Over]
            {
                let packet = message.encode();
                assert!(packet.len() <= MESSAGE_BYTES);
                assert_eq!(Message::decode(&packet), Some(message));
                assert_eq!(Message::decode(&[&packet[..], b"x"].concat()), None);
                assert_eq!(Message::decode(&packet[..packet.len() - 1]), None);
                assert_eq!(Answer::decode(&packet), None);
            }
            for answer in [Answer { fuse: 7, deadline: Some(deadline) }, Answer { fuse: u32::MAX, deadline: None }] {
                let packet = answer.encode();
                assert_eq!(packet.len(), ANSWER_BYTES);
                assert_eq!(Answer::decode(&packet), Some(answer));
                assert_eq!(Answer::decode(&packet[..packet.len() - 1]), None);
                assert_eq!(Message::decode(&packet), None);
            }
        }
        // A time that no packet can hold counts as the latest one.
        assert_eq!(nanoseconds(Duration::MAX), u64::MAX.to_le_bytes());
    }

    #[test]
    fn an_answer_is_found_behind_what_is_none_and_a_drained_socket_is_empty() {
        let (fuse, keeper) = match PacketSocket::pair() {
            // Without such sockets there is no fuse.
            Err(error) if error.kind() == io::ErrorKind::Unsupported => return,
            pair => pair.unwrap(),
        };
        assert_eq!(receive_answer(&keeper).unwrap(), None);
        let answer = Answer { fuse: 1, deadline: Some(Duration::from_secs(5)) };
        fuse.send(b"?").unwrap();
        fuse.send(&[0; 40]).unwrap();
        fuse.send(&answer.encode()).unwrap();
        assert_eq!(receive_answer(&keeper).unwrap(), Some(answer));
        fuse.send(&answer.encode()).unwrap();
        fuse.send(&[0; 40]).unwrap();
        drain(&keeper);
        assert_eq!(receive_answer(&keeper).unwrap(), None);
        send_deadline(&keeper, Duration::from_secs(1)).unwrap();
        send_over(&keeper).unwrap();
        drop(keeper);
        drain(&fuse);
        assert!(matches!(fuse.receive(&mut [0; 8]), Ok(Packet::EndOfSource)));
        // A caller that waits for an answer would wait for ever, and its socket stays readable.
        assert_eq!(receive_answer(&fuse).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
