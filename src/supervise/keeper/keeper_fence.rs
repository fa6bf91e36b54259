//! What a keeper holds of the fence: it tells the fuse the deadlines, and sees whether the fuse is gone.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use crate::supervise::fuse;
use crate::sys::hangup_pipe::HangupPipe;
use crate::sys::packet_socket::PacketSocket;
use crate::sys::readiness::Readiness;

/// How long the fuse may take to answer.
pub(super) const FUSE_TIMEOUT: Duration = Duration::from_secs(1);

/// What a keeper holds of the fence.
pub(super) struct KeeperFence {
    pub(super) socket: PacketSocket,
    /// The same socket, to wait for it.
    answers: Readiness,
    pub(super) stop_pipe: HangupPipe,
    /// Not used: see [`super::Inherited`].
    _kill_pipe: OwnedFd,
}

impl KeeperFence {
    /// Takes the descriptors. `None` if there are none.
    pub(super) fn of(mut descriptors: impl Iterator<Item = OwnedFd>) -> io::Result<Option<Self>> {
        let (Some(socket), Some(stop_pipe), Some(kill_pipe)) =
            (descriptors.next(), descriptors.next(), descriptors.next())
        else {
            return Ok(None);
        };
        let answers = Readiness::of(socket.try_clone()?)?;
        let stop_pipe = HangupPipe::from_read_end(stop_pipe);
        Ok(Some(Self { socket: socket.into(), answers, stop_pipe, _kill_pipe: kill_pipe }))
    }

    /// Sends the fuse the deadline of a confirmed renewal, and waits for the answer to it or to a later one.
    pub(super) async fn arm(&self, deadline: Duration) -> Option<fuse::Answer> {
        fuse::send_deadline(&self.socket, deadline).ok()?;
        self.answer(|answer| answer.deadline.is_none_or(|armed| armed >= deadline)).await
    }

    /// Sends the fuse the deadline of a renewal that is about to be sent, and waits for an answer.
    pub(super) async fn arm_first(&self, deadline: Duration) -> Option<fuse::Answer> {
        fuse::send_first_deadline(&self.socket, deadline).ok()?;
        self.answer(|_| true).await
    }

    async fn answer(&self, is_awaited: impl Fn(&fuse::Answer) -> bool) -> Option<fuse::Answer> {
        loop {
            let mut ready = self.answers.readable().await.ok()?;
            // The runtime never clears the end of a socket, so only this call notices it.
            match fuse::receive_answer(&self.socket).ok()? {
                Some(answer) if is_awaited(&answer) => return Some(answer),
                Some(_) => {}
                None => ready.clear_ready(),
            }
        }
    }
}
