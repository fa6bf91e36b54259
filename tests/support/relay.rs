//! Relays of TCP connections, for outages of the network. A [`super::proxy::Proxy`] reads whole requests, and answers
//! for the service that it has got them. A [`Relay`] stops reading the connection on which terraform writes its state,
//! so that what was sent stays in the kernel of the sender. A [`Cable`] can be cut.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use super::listener::Listener;
use super::system::{IS_LINUX, queued};
use super::wait_for;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// No write was seen.
    Passing,
    /// The connection of a write is not read.
    Stalled,
    /// It is read again.
    Resumed,
    /// Both directions of it have ended.
    Ended,
}

/// The relay. It stalls the first write of the state.
pub struct Relay {
    pub port: u16,
    phase: Arc<(Mutex<Phase>, Condvar)>,
    stalled: Arc<Mutex<Option<StalledWrite>>>,
    _listener: Listener,
}

/// The write whose connection is not read.
#[derive(Clone, Copy, Debug)]
struct StalledWrite {
    /// The sender's port.
    client: u16,
    /// How many bytes of it were read.
    read: usize,
    /// How many bytes the whole request has.
    length: usize,
}

/// The bytes that a connection takes which nobody reads.
const BUFFER: usize = 4096;

impl Relay {
    pub fn start(upstream: u16) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        // Each accepted connection inherits it (tcp(7)).
        rustix::net::sockopt::set_socket_recv_buffer_size(&listener, BUFFER).unwrap();
        let phase = Arc::new((Mutex::new(Phase::Passing), Condvar::new()));
        let stalled = Arc::new(Mutex::new(None));
        let of_listener = (phase.clone(), stalled.clone());
        let listener = Listener::start_on(listener, move |client| {
            let Ok(server) = TcpStream::connect(("127.0.0.1", upstream)) else { return };
            let (from_client, to_server) = (client.try_clone().unwrap(), server.try_clone().unwrap());
            let (phase, stalled) = of_listener.clone();
            let port = client.peer_addr().unwrap().port();
            std::thread::spawn(move || {
                let back = std::thread::spawn(move || copy(&server, &client, |_| true));
                let mut was_stalled = false;
                copy(&from_client, &to_server, |bytes| {
                    was_stalled |= stalls_at_write(bytes, &phase, |length| {
                        *stalled.lock().unwrap() = Some(StalledWrite { client: port, read: bytes.len(), length });
                    });
                    true
                });
                back.join().unwrap();
                if was_stalled {
                    *phase.0.lock().unwrap() = Phase::Ended;
                }
            });
        });
        Self { port: listener.port, phase, stalled, _listener: listener }
    }

    /// Waits until a write of the state has begun, whose rest is not read, and until the sender has handed all of it to
    /// its kernel. Otherwise, the death of the sender would cut it off. (macOS does not show that.)
    #[track_caller]
    pub fn wait_until_stalled(&self) {
        self.wait_for(Phase::Stalled);
        let stalled = || self.stalled.lock().unwrap().unwrap();
        let queues = || (queued(stalled().client, self.port), queued(self.port, stalled().client));
        let is_handed_over = || match queues() {
            // What was received and not acknowledged yet counts twice, so the sum must be exact.
            (Some((unacknowledged, _)), Some((_, received))) => {
                stalled().read + unacknowledged + received == stalled().length
            }
            _ => !IS_LINUX,
        };
        wait_for(
            "the whole write in the kernel",
            || is_handed_over().then_some(()),
            || format!("{:?} {:?}", stalled(), queues()),
        );
    }

    /// Waits for the end of that connection, after [`Relay::resume`]. Whatever it has carried was delivered then.
    #[track_caller]
    pub fn wait_until_ended(&self) {
        self.wait_for(Phase::Ended);
    }

    #[track_caller]
    fn wait_for(&self, phase: Phase) {
        let now = || *self.phase.0.lock().unwrap();
        wait_for("the connection of a write", || (now() == phase).then_some(()), || format!("{:?}", now()));
    }

    /// Reads the rest of that write.
    pub fn resume(&self) {
        *self.phase.0.lock().unwrap() = Phase::Resumed;
        self.phase.1.notify_all();
    }
}

/// Waits until [`Relay::resume`] if these bytes begin the first write of the state. Returns whether they do. `note` gets
/// the length of the whole request before.
fn stalls_at_write(bytes: &[u8], (phase, resumed): &(Mutex<Phase>, Condvar), note: impl FnOnce(usize)) -> bool {
    let text = String::from_utf8_lossy(bytes);
    let line = text.lines().next().unwrap_or_default();
    let is_write = line.starts_with("PUT ") && line.contains("prod.tfstate") && !line.contains(".tflock");
    let mut phase = phase.lock().unwrap();
    if !is_write || *phase != Phase::Passing {
        return false;
    }
    let (head, _) = text.split_once("\r\n\r\n").expect("the headers are shorter than the buffer");
    let length = head.lines().find_map(|line| line.to_lowercase().strip_prefix("content-length: ")?.parse().ok());
    let length: usize = length.unwrap_or_else(|| panic!("no length: {head}"));
    note(head.len() + 4 + length);
    *phase = Phase::Stalled;
    drop(resumed.wait_while(phase, |phase| *phase == Phase::Stalled).unwrap());
    true
}

/// Copies until the end or an error, or until `is_delivered` returns false. Then ends the other connection as well.
fn copy(mut from: &TcpStream, mut to: &TcpStream, mut is_delivered: impl FnMut(&[u8]) -> bool) {
    let mut buffer = [0; BUFFER];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        if !is_delivered(&buffer[..count]) || to.write_all(&buffer[..count]).is_err() {
            break;
        }
    }
    let _ = (to.shutdown(Shutdown::Write), from.shutdown(Shutdown::Read));
}

/// The network of its clients. While it is cut, nothing arrives in either direction, and no connection is refused or
/// closed. What was sent meanwhile arrives later, as the kernel of the sender would repeat it, unless the sender has
/// broken off its connection.
pub struct Cable {
    pub port: u16,
    is_cut: Arc<AtomicBool>,
    _listener: Listener,
}

impl Cable {
    pub fn to(upstream: u16) -> Self {
        let is_cut = Arc::new(AtomicBool::new(false));
        let of_listener = is_cut.clone();
        let listener = Listener::start(move |client| {
            let Ok(server) = TcpStream::connect(("127.0.0.1", upstream)) else { return };
            let ends = [(client.try_clone().unwrap(), server.try_clone().unwrap()), (server, client)];
            for (from, to) in ends {
                let is_cut = of_listener.clone();
                std::thread::spawn(move || copy(&from, &to, |_| is_delivered(&from, &is_cut)));
            }
        });
        Self { port: listener.port, is_cut, _listener: listener }
    }

    /// Cuts it, or mends it.
    pub fn cut(&self, is_cut: bool) {
        self.is_cut.store(is_cut, Ordering::SeqCst);
    }
}

impl Drop for Cable {
    /// Ends the threads that wait.
    fn drop(&mut self) {
        self.cut(false);
    }
}

/// Waits until the network is there. Returns whether the sender's connection still exists: a reset is an error of the
/// socket (tcp(7)).
fn is_delivered(from: &TcpStream, is_cut: &AtomicBool) -> bool {
    while is_cut.load(Ordering::SeqCst) {
        std::thread::sleep(Duration::from_millis(5));
    }
    matches!(from.take_error(), Ok(None))
}
