//! A listener of a test, on a port that the kernel chooses. It ends with the test: hundreds of tests are in one
//! process, and a usual limit is 1024 descriptors.

use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Passes each connection on until it is dropped. Then its port is closed.
#[must_use]
pub struct Listener {
    pub port: u16,
    has_ended: Arc<AtomicBool>,
}

impl Listener {
    /// Listens on 127.0.0.1. `accepted` must not wait: the next connection comes only after it has returned.
    pub fn start(accepted: impl FnMut(TcpStream) + Send + 'static) -> Self {
        Self::start_on(TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap(), accepted)
    }

    pub fn start_on(listener: TcpListener, mut accepted: impl FnMut(TcpStream) + Send + 'static) -> Self {
        let port = listener.local_addr().unwrap().port();
        let has_ended = Arc::new(AtomicBool::new(false));
        let of_thread = Arc::clone(&has_ended);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if of_thread.load(Ordering::SeqCst) {
                    return;
                }
                accepted(stream);
            }
        });
        Self { port, has_ended }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.has_ended.store(true, Ordering::SeqCst);
        // The thread waits for a connection, so it gets one.
        let _ = TcpStream::connect(SocketAddrV4::new(Ipv4Addr::LOCALHOST, self.port));
    }
}
