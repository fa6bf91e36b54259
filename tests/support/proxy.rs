//! A proxy in front of the loopback cloud, for what a real server does not do on demand: hold a request and deliver it
//! after the death of its sender, lose a response, or send another response.

use std::collections::HashMap;
use std::io::{BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Condvar, Mutex};

use super::authority::Authority;
use super::http::{Kind, Message};
use super::listener::Listener;
use super::wait_for;

/// What the proxy does with a request.
pub enum ProxyAction {
    /// Forwards it.
    Pass,
    /// Forwards it to another port.
    PassTo(u16),
    /// Holds it until [`Proxy::let_go`], then forwards it.
    Hold,
    /// Forwards it, discards the response, and closes the connection.
    LoseAnswer,
    /// Closes the connection, and does not forward the request.
    Close,
    /// Sends this response, and does not forward the request.
    Answer(Message),
    /// Forwards it, and changes the `Date` of the response by so many seconds.
    PassDated(i64),
    /// Forwards it, and sends the body of the response at one byte per second.
    Trickle,
    /// Accepts a CONNECT, and acts as the requested host, with a certificate from this authority.
    Tunnel(Arc<Authority>),
}

type Rule = dyn Fn(&Message) -> ProxyAction + Send + Sync;

struct Shared {
    rule: Box<Rule>,
    upstream: u16,
    held: Mutex<(usize, bool)>,
    changed: Condvar,
    delivered: Mutex<Vec<String>>,
    /// The connections that are served now, each with its number.
    clients: Mutex<HashMap<usize, TcpStream>>,
}

#[must_use]
pub struct Proxy {
    pub port: u16,
    shared: Arc<Shared>,
    _listener: Listener,
}

impl Drop for Proxy {
    /// Ends the threads that serve connections.
    fn drop(&mut self) {
        self.let_go();
        self.close_connections();
    }
}

impl Proxy {
    pub fn start(upstream: u16, rule: impl Fn(&Message) -> ProxyAction + Send + Sync + 'static) -> Self {
        Self::listen(upstream, rule, |stream, shared| serve(Box::new(stream), shared, |_| {}))
    }

    /// Like [`Proxy::start`], but changes each request before it is forwarded.
    pub fn start_changing(
        upstream: u16,
        change: fn(&mut Message),
        rule: impl Fn(&Message) -> ProxyAction + Send + Sync + 'static,
    ) -> Self {
        Self::listen(upstream, rule, move |stream, shared| serve(Box::new(stream), shared, change))
    }

    fn listen(
        upstream: u16,
        rule: impl Fn(&Message) -> ProxyAction + Send + Sync + 'static,
        serve: impl Fn(TcpStream, &Shared) + Clone + Send + 'static,
    ) -> Self {
        let shared = Arc::new(Shared {
            rule: Box::new(rule),
            upstream,
            held: Mutex::new((0, false)),
            changed: Condvar::new(),
            delivered: Mutex::default(),
            clients: Mutex::default(),
        });
        let for_listener = Arc::clone(&shared);
        let mut number = 0;
        let listener = Listener::start(move |stream| {
            let (shared, serve) = (Arc::clone(&for_listener), serve.clone());
            number += 1;
            if let Ok(copy) = stream.try_clone() {
                shared.clients.lock().unwrap().insert(number, copy);
            }
            std::thread::spawn(move || {
                serve(stream, &shared);
                // The connection is closed only when no copy is left.
                shared.clients.lock().unwrap().remove(&number);
            });
        });
        Self { port: listener.port, shared, _listener: listener }
    }

    /// Like [`Proxy::start_changing`], but its clients use TLS, for the hosts 127.0.0.1 and localhost.
    pub fn start_tls(
        upstream: u16,
        authority: &Authority,
        change: fn(&mut Message),
        rule: impl Fn(&Message) -> ProxyAction + Send + Sync + 'static,
    ) -> Self {
        let config = authority.server(&["127.0.0.1", "localhost"]);
        Self::listen(upstream, rule, move |stream, shared| serve(by_tls(Box::new(stream), &config), shared, change))
    }

    /// Waits until a request is held.
    #[track_caller]
    pub fn wait_until_held(&self) {
        self.wait_until_held_times(1);
    }

    /// Waits until `times` requests were held.
    #[track_caller]
    pub fn wait_until_held_times(&self, times: usize) {
        let held = || self.shared.held.lock().unwrap().0;
        wait_for("a held request", || (held() >= times).then_some(()), || format!("{} of {times}", held()));
    }

    /// Delivers the held requests, and holds no more requests from then on.
    pub fn let_go(&self) {
        self.shared.held.lock().unwrap().1 = true;
        self.shared.changed.notify_all();
    }

    /// Closes the connections of all clients, as a service does with idle ones.
    pub fn close_connections(&self) {
        for client in self.shared.clients.lock().unwrap().values() {
            // The client may have closed it.
            let _ = client.shutdown(Shutdown::Both);
        }
    }

    /// Waits until a held request was delivered and answered. Returns the first line of the response.
    #[track_caller]
    pub fn wait_until_delivered(&self) -> String {
        wait_for("a delivery", || self.shared.delivered.lock().unwrap().first().cloned(), || "none".to_owned())
    }
}

trait Duplex: Read + Write {}

impl<S: Read + Write> Duplex for S {}

fn by_tls(stream: Box<dyn Duplex>, config: &Arc<rustls::ServerConfig>) -> Box<dyn Duplex> {
    let connection = rustls::ServerConnection::new(Arc::clone(config)).unwrap();
    Box::new(rustls::StreamOwned::new(connection, stream))
}

fn serve(stream: Box<dyn Duplex>, shared: &Shared, change: fn(&mut Message)) {
    let mut client = BufReader::new(stream);
    while let Some(mut request) = Message::read(&mut client, Kind::Request) {
        let action = (shared.rule)(&request);
        if let ProxyAction::Tunnel(authority) = action {
            let host = request.start.split([' ', ':']).nth(1).unwrap_or_default().to_owned();
            if client.get_mut().write_all(b"HTTP/1.1 200 OK\r\n\r\n").is_ok() {
                serve(by_tls(client.into_inner(), &authority.server(&[&host])), shared, change);
            }
            return;
        }
        if matches!(action, ProxyAction::Close) {
            return;
        }
        let mut held = false;
        if matches!(action, ProxyAction::Hold) {
            let mut state = shared.held.lock().unwrap();
            if !state.1 {
                held = true;
                state.0 += 1;
                while !state.1 {
                    state = shared.changed.wait(state).unwrap();
                }
            }
        }
        if let ProxyAction::Answer(answer) = action {
            if client.get_mut().write_all(&answer.bytes()).is_err() {
                return;
            }
            continue;
        }
        let to_head = request.start.starts_with("HEAD ");
        change(&mut request);
        request.headers.retain(|(name, _)| !name.eq_ignore_ascii_case("connection"));
        request.headers.push(("Connection".into(), "close".into()));
        let port = if let ProxyAction::PassTo(port) = action { port } else { shared.upstream };
        let Ok(upstream) = TcpStream::connect(("127.0.0.1", port)) else { return };
        let mut upstream = BufReader::new(upstream);
        if upstream.get_mut().write_all(&request.bytes()).is_err() {
            return;
        }
        let Some(mut answer) = Message::read(&mut upstream, if to_head { Kind::AnswerToHead } else { Kind::Answer })
        else {
            return;
        };
        if held {
            shared.delivered.lock().unwrap().push(answer.start.clone());
        }
        if matches!(action, ProxyAction::LoseAnswer) {
            return;
        }
        answer.headers.retain(|(name, _)| !name.eq_ignore_ascii_case("connection"));
        if let ProxyAction::PassDated(seconds) = action {
            for (_, date) in answer.headers.iter_mut().filter(|(name, _)| name.eq_ignore_ascii_case("date")) {
                let time =
                    jiff::fmt::rfc2822::parse(date).unwrap().timestamp() + jiff::SignedDuration::from_secs(seconds);
                *date = jiff::fmt::rfc2822::DateTimePrinter::new().timestamp_to_rfc9110_string(&time).unwrap();
            }
        }
        if matches!(action, ProxyAction::Trickle) {
            let bytes = answer.bytes();
            let (start, body) = bytes.split_at(bytes.len() - answer.body.len());
            for piece in std::iter::once(start).chain(body.chunks(1)) {
                if client.get_mut().write_all(piece).and_then(|()| client.get_mut().flush()).is_err() {
                    return;
                }
                std::thread::sleep(std::time::Duration::from_secs(1));
            }
            continue;
        }
        if client.get_mut().write_all(&answer.bytes()).is_err() {
            return;
        }
    }
}
