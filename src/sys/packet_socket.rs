//! A pair of connected sockets that carry whole packets, each with a descriptor if wanted (SOCK_SEQPACKET and
//! SCM_RIGHTS, unix(7)).
//!
//! A descriptor in a packet that nobody has received is open as long as any process holds the end at which the packet
//! arrived.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// One end of a pair. Several processes may hold the same end. Then each packet is received by one of them.
#[derive(Debug)]
pub(crate) struct PacketSocket(OwnedFd);

/// What was received.
#[derive(Debug)]
pub(crate) enum Packet {
    /// A packet of this many bytes, and the descriptor that came with it. That descriptor is closed on exec. `None` if
    /// the packet had none, or if this process cannot open another descriptor (RLIMIT_NOFILE).
    Bytes(usize, Option<OwnedFd>),
    /// No packet has arrived.
    NotReady,
    /// No process holds the other end any more, and every packet was received.
    EndOfSource,
}

/// A buffer for the control message of one descriptor, aligned as cmsghdr requires.
#[repr(C, align(8))]
struct Control([u8; CONTROL_BYTES as usize]);

/// The type of a message's length differs between systems, and each of them can hold this number.
const CONTROL_BYTES: u8 = 64;

impl PacketSocket {
    /// Creates two connected ends, which are closed on exec.
    ///
    /// # Errors
    /// The error of socketpair(2). `Unsupported` on systems other than Linux.
    pub(crate) fn pair() -> io::Result<(Self, Self)> {
        #[cfg(target_os = "linux")]
        {
            let mut ends: [RawFd; 2] = [-1; 2];
            let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
            // SAFETY: the call writes two descriptors, which nothing else owns.
            unsafe {
                if libc::socketpair(libc::AF_UNIX, kind, 0, ends.as_mut_ptr()) != 0 {
                    return Err(io::Error::last_os_error());
                }
                Ok((Self(OwnedFd::from_raw_fd(ends[0])), Self(OwnedFd::from_raw_fd(ends[1]))))
            }
        }
        #[cfg(not(target_os = "linux"))]
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Sends `bytes` as one packet, without waiting. `bytes` must not be empty, because the receiver could not tell an
    /// empty packet from the end of the source.
    ///
    /// # Errors
    /// `WouldBlock` if the socket is full; `BrokenPipe` or `ConnectionReset` if no process holds the other end.
    pub(crate) fn send(&self, bytes: &[u8]) -> io::Result<()> {
        self.send_message(bytes, None)
    }

    /// Sends `bytes` as one packet with a copy of `descriptor`, without waiting. `bytes` must not be empty.
    ///
    /// # Errors
    /// As [`PacketSocket::send`], and ETOOMANYREFS if this user has too many descriptors in packets (unix(7)).
    pub(crate) fn send_with_descriptor(&self, bytes: &[u8], descriptor: BorrowedFd<'_>) -> io::Result<()> {
        self.send_message(bytes, Some(descriptor))
    }

    fn send_message(&self, bytes: &[u8], descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
        debug_assert!(!bytes.is_empty());
        let mut part = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
        let mut control = Control([0; CONTROL_BYTES as usize]);
        // SAFETY: `message` refers to `part`, `bytes` and `control`, which exist until sendmsg returns. `control` has
        // room and alignment for the one header that is written into it.
        let sent = unsafe {
            let mut message: libc::msghdr = std::mem::zeroed();
            message.msg_iov = &raw mut part;
            message.msg_iovlen = 1;
            if let Some(descriptor) = descriptor {
                let length = libc::c_uint::try_from(size_of::<RawFd>()).unwrap_or(4);
                message.msg_control = control.0.as_mut_ptr().cast();
                message.msg_controllen = libc::CMSG_SPACE(length) as _;
                let header = libc::CMSG_FIRSTHDR(&raw const message);
                (*header).cmsg_level = libc::SOL_SOCKET;
                (*header).cmsg_type = libc::SCM_RIGHTS;
                (*header).cmsg_len = libc::CMSG_LEN(length) as _;
                libc::CMSG_DATA(header).cast::<RawFd>().write_unaligned(descriptor.as_raw_fd());
            }
            #[cfg(target_os = "linux")]
            let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
            #[cfg(not(target_os = "linux"))]
            let flags = libc::MSG_DONTWAIT;
            libc::sendmsg(self.0.as_raw_fd(), &raw const message, flags)
        };
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Receives the next packet into `buffer`, without waiting.
    ///
    /// # Errors
    /// `InvalidData` if the packet is longer than `buffer`. The packet is discarded.
    pub(crate) fn receive(&self, buffer: &mut [u8]) -> io::Result<Packet> {
        loop {
            match self.receive_once(buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Packet::NotReady),
                // ECONNRESET says once that the other end was closed with unread packets. Packets for this end may
                // still be there.
                Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::ConnectionReset) => {}
                result => return result,
            }
        }
    }

    fn receive_once(&self, buffer: &mut [u8]) -> io::Result<Packet> {
        let mut part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
        let mut control = Control([0; CONTROL_BYTES as usize]);
        #[cfg(target_os = "linux")]
        let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
        #[cfg(not(target_os = "linux"))]
        let flags = libc::MSG_DONTWAIT;
        // SAFETY: `message` refers to `part`, `buffer` and `control`, which exist until the end of this function. The
        // kernel has filled the headers that CMSG_FIRSTHDR and CMSG_NXTHDR return. Nothing else owns the descriptors.
        unsafe {
            let mut message: libc::msghdr = std::mem::zeroed();
            message.msg_iov = &raw mut part;
            message.msg_iovlen = 1;
            message.msg_control = control.0.as_mut_ptr().cast();
            message.msg_controllen = CONTROL_BYTES.into();
            let received = libc::recvmsg(self.0.as_raw_fd(), &raw mut message, flags);
            let Ok(length) = usize::try_from(received) else { return Err(io::Error::last_os_error()) };
            let mut descriptors = Vec::new();
            let mut header = libc::CMSG_FIRSTHDR(&raw const message);
            while !header.is_null() {
                if (*header).cmsg_level == libc::SOL_SOCKET && (*header).cmsg_type == libc::SCM_RIGHTS {
                    let bytes = (*header).cmsg_len as usize - libc::CMSG_LEN(0) as usize;
                    for place in 0..bytes / size_of::<RawFd>() {
                        let data = libc::CMSG_DATA(header).add(place * size_of::<RawFd>());
                        descriptors.push(OwnedFd::from_raw_fd(data.cast::<RawFd>().read_unaligned()));
                    }
                }
                header = libc::CMSG_NXTHDR(&raw const message, header);
            }
            if message.msg_flags & libc::MSG_TRUNC != 0 {
                return Err(io::ErrorKind::InvalidData.into());
            }
            // All descriptors but the first are closed here. A packet of this file has one at most.
            Ok(if length == 0 { Packet::EndOfSource } else { Packet::Bytes(length, descriptors.into_iter().next()) })
        }
    }
}

impl From<OwnedFd> for PacketSocket {
    /// Returns the end that `descriptor` is, for example an inherited descriptor.
    fn from(descriptor: OwnedFd) -> Self {
        Self(descriptor)
    }
}

impl From<PacketSocket> for OwnedFd {
    fn from(socket: PacketSocket) -> Self {
        socket.0
    }
}

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
#[cfg(target_os = "linux")]
mod tests {
    use nix::fcntl::{FcntlArg, FdFlag, fcntl};

    use super::*;
    use crate::sys::descriptor;

    #[test]
    fn packets_and_descriptors_arrive_whole_and_in_order() {
        let (here, there) = PacketSocket::pair().unwrap();
        let mut buffer = [0; 8];
        assert!(matches!(there.receive(&mut buffer), Ok(Packet::NotReady)));
        let (read_end, write_end) = descriptor::pipe().unwrap();
        here.send(b"first").unwrap();
        here.send_with_descriptor(b"2", write_end.as_fd()).unwrap();
        drop(write_end);
        here.send(b"too long a packet").unwrap();
        here.send(b"last").unwrap();

        assert!(matches!(there.receive(&mut buffer), Ok(Packet::Bytes(5, None))));
        assert_eq!(&buffer[..5], b"first");
        let Ok(Packet::Bytes(1, Some(received))) = there.receive(&mut buffer) else { panic!("no descriptor") };
        assert_eq!(fcntl(&received, FcntlArg::F_GETFD).unwrap(), FdFlag::FD_CLOEXEC.bits());
        nix::unistd::write(&received, b"x").unwrap();
        assert_eq!(nix::unistd::read(&read_end, &mut buffer).unwrap(), 1);
        drop(received);
        assert_eq!(nix::unistd::read(&read_end, &mut buffer).unwrap(), 0);
        assert_eq!(there.receive(&mut buffer).unwrap_err().kind(), io::ErrorKind::InvalidData);

        // The answer is never read, so the other end reports a reset before its last packet.
        there.send(b"answer").unwrap();
        drop(here);
        assert!(matches!(there.receive(&mut buffer), Ok(Packet::Bytes(4, None))));
        assert!(matches!(there.receive(&mut buffer), Ok(Packet::EndOfSource)));
        assert!(there.send(b"x").is_err());
    }

    #[test]
    fn a_descriptor_in_a_packet_is_open_until_the_receiving_end_is_closed() {
        let (here, there) = PacketSocket::pair().unwrap();
        let (pipe, write_end) = crate::sys::hangup_pipe::HangupPipe::new().unwrap();
        here.send_with_descriptor(b"x", write_end.as_fd()).unwrap();
        drop((write_end, here));
        assert!(!pipe.has_hung_up());
        drop(there);
        assert!(pipe.has_hung_up());
    }
}
