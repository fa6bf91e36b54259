//! A relay of TCP connections that stops reading the one on which terraform writes its state. What was sent then stays in
//! the kernel of the sender, as in an outage of the network. A [`super::proxy::Proxy`] cannot do that, because it reads
//! whole requests.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex};

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
                let back = std::thread::spawn(move || copy(&server, &client, |_| ()));
                let mut was_stalled = false;
                copy(&from_client, &to_server, |bytes| was_stalled |= stalls_at_write(bytes, &phase));
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

/// Copies until the end or an error, and then ends the other connection as well.
fn copy(mut from: &TcpStream, mut to: &TcpStream, mut before_each: impl FnMut(&[u8])) {
    let mut buffer = [0; BUFFER];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        before_each(&buffer[..count]);
        if to.write_all(&buffer[..count]).is_err() {
            break;
        }
    }
    let _ = (to.shutdown(Shutdown::Write), from.shutdown(Shutdown::Read));
}
