//! Relays of TCP connections, for outages of the network. A [`super::proxy::Proxy`] reads whole requests, and answers
//! for the service that it has got them. A [`Relay`] stops reading the connection on which terraform writes its state,
//! so that what was sent stays in the kernel of the sender. A [`Cable`] can be cut.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use super::listener::Listener;
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
    _listener: Listener,
}

/// The bytes that a connection takes which nobody reads.
const BUFFER: usize = 4096;

impl Relay {
    pub fn start(upstream: u16) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        // Each accepted connection inherits it (tcp(7)).
        rustix::net::sockopt::set_socket_recv_buffer_size(&listener, BUFFER).unwrap();
        let phase = Arc::new((Mutex::new(Phase::Passing), Condvar::new()));
        let of_listener = phase.clone();
        let listener = Listener::start_on(listener, move |client| {
            let Ok(server) = TcpStream::connect(("127.0.0.1", upstream)) else { return };
            let (from_client, to_server) = (client.try_clone().unwrap(), server.try_clone().unwrap());
            let phase = of_listener.clone();
            std::thread::spawn(move || {
                let back = std::thread::spawn(move || copy(&server, &client, |_| true));
                let mut was_stalled = false;
                copy(&from_client, &to_server, |bytes| {
                    was_stalled |= stalls_at_write(bytes, &phase);
                    true
                });
                back.join().unwrap();
                if was_stalled {
                    *phase.0.lock().unwrap() = Phase::Ended;
                }
            });
        });
        Self { port: listener.port, phase, _listener: listener }
    }

    /// Waits until a write of the state has begun, whose rest is not read.
    #[track_caller]
    pub fn wait_until_stalled(&self) {
        self.wait_for(Phase::Stalled);
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

/// Waits until [`Relay::resume`] if these bytes begin the first write of the state. Returns whether they do.
fn stalls_at_write(bytes: &[u8], (phase, resumed): &(Mutex<Phase>, Condvar)) -> bool {
    let text = String::from_utf8_lossy(bytes);
    let line = text.lines().next().unwrap_or_default();
    let is_write = line.starts_with("PUT ") && line.contains("prod.tfstate") && !line.contains(".tflock");
    let mut phase = phase.lock().unwrap();
    if !is_write || *phase != Phase::Passing {
        return false;
    }
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
