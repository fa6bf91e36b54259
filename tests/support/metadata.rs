//! A stand-in for the metadata service of a cloud. The real ones exist only on machines of that cloud.

use std::io::{BufReader, Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use super::http::{Kind, Message};
use super::listener::Listener;
use super::wait_for;

/// What the stand-in does with a request.
pub enum Reply {
    /// Sends an answer with this status, these headers and this body.
    Answer(&'static str, Vec<(&'static str, String)>, String),
    /// Sends nothing, until the client closes the connection.
    Hang,
    /// Sends a body of 1 GB, until the client closes the connection.
    Huge,
    /// Sends these bytes, and closes the connection.
    CutOff(&'static str),
}

impl Reply {
    pub fn ok(body: &str) -> Self {
        Self::Answer("200 OK", Vec::new(), body.to_owned())
    }

    pub fn status(status: &'static str) -> Self {
        Self::Answer(status, Vec::new(), "<html>no</html>".to_owned())
    }

    /// Redirects the client to the same path of a service at this port of 127.0.0.1. A client that does not look at the
    /// status gets these headers and this body.
    pub fn redirect(
        request: &Message,
        port: u16,
        headers: impl IntoIterator<Item = (&'static str, String)>,
        body: &str,
    ) -> Self {
        let path = request.start.split(' ').nth(1).unwrap_or_default();
        let mut all = vec![("Location", format!("http://127.0.0.1:{port}{path}"))];
        all.extend(headers);
        Self::Answer("307 Temporary Redirect", all, body.to_owned())
    }
}

/// A request, and when it arrived.
#[derive(Clone, Debug)]
pub struct Asked {
    pub at: Instant,
    pub request: Message,
}

#[derive(Default)]
struct Seen {
    asked: Vec<Asked>,
    /// How many bytes of a huge body were accepted.
    accepted: u64,
}

pub struct Metadata {
    pub port: u16,
    seen: Arc<Mutex<Seen>>,
    _listener: Listener,
}

impl Metadata {
    /// Starts a stand-in on every address of this machine. `rule` may wait: each connection has its own thread.
    pub fn start(rule: impl Fn(&Message) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind(("0.0.0.0", 0)).unwrap();
        let (seen, rule) = (Arc::<Mutex<Seen>>::default(), Arc::new(rule));
        let for_listener = Arc::clone(&seen);
        let listener = Listener::start_on(listener, move |stream| {
            let (seen, rule) = (Arc::clone(&for_listener), Arc::clone(&rule));
            std::thread::spawn(move || serve(BufReader::new(stream), &seen, &*rule));
        });
        Self { port: listener.port, seen, _listener: listener }
    }

    pub fn asked(&self) -> Vec<Asked> {
        self.seen.lock().unwrap().asked.clone()
    }

    /// Returns how many bytes of a huge body were accepted so far.
    pub fn accepted(&self) -> u64 {
        self.seen.lock().unwrap().accepted
    }

    /// Returns the requests whose first line contains `text`.
    pub fn asked_for(&self, text: &str) -> Vec<Asked> {
        self.asked().into_iter().filter(|asked| asked.request.start.contains(text)).collect()
    }

    /// Waits until `times` requests have arrived whose first line contains `text`.
    #[track_caller]
    pub fn wait_for(&self, text: &str, times: usize) -> Vec<Asked> {
        let seen = || {
            let asked = self.asked();
            let lines: Vec<_> = asked.iter().map(|asked| format!("{:?} {}", asked.at, asked.request.start)).collect();
            lines.join("\n")
        };
        wait_for(text, || Some(self.asked_for(text)).filter(|asked| asked.len() >= times), seen)
    }
}

fn serve(mut client: BufReader<TcpStream>, seen: &Mutex<Seen>, rule: &(impl Fn(&Message) -> Reply + ?Sized)) {
    while let Some(request) = Message::read(&mut client, Kind::Request) {
        seen.lock().unwrap().asked.push(Asked { at: Instant::now(), request: request.clone() });
        match rule(&request) {
            Reply::Answer(status, headers, body) => {
                let mut answer = Message::answer(status, &body);
                answer.headers.extend(headers.into_iter().map(|(name, value)| (name.to_owned(), value)));
                if client.get_mut().write_all(&answer.bytes()).is_err() {
                    return;
                }
            }
            Reply::Hang => {
                let _ = client.read(&mut [0]);
                return;
            }
            Reply::CutOff(bytes) => {
                let _ = client.get_mut().write_all(bytes.as_bytes());
                return;
            }
            Reply::Huge => {
                let _ = client.get_mut().write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 1073741824\r\n\r\n");
                let part = [b'x'; 1 << 13];
                while client.get_mut().write_all(&part).is_ok() {
                    seen.lock().unwrap().accepted += part.len() as u64;
                }
                return;
            }
        }
    }
}

/// Returns an address of this machine for which a client would use a proxy. No client uses one for 127.0.0.1. If this
/// machine has no network, returns 127.0.0.1.
pub fn address_of_this_machine() -> String {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    // That sends nothing.
    let is_connected = socket.connect("192.0.2.1:9").is_ok();
    let address = socket.local_addr().unwrap().ip();
    if is_connected && !address.is_unspecified() { address.to_string() } else { "127.0.0.1".to_owned() }
}
