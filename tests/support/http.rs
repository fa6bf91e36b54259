//! HTTP/1.1 as far as the tests need it: whole messages over a socket.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;

/// What is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A request. A client that waits for `100 Continue` is told to go on.
    Request,
    /// An answer.
    Answer,
    /// An answer to a HEAD, which has no body whatever its length says.
    AnswerToHead,
}

/// A request or a response: its first line, its headers, its body.
#[derive(Clone, Debug)]
pub struct Message {
    pub start: String,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Message {
    /// The value of a header, its name in any case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    /// Whether a request is one of `tf`, and not terraform's or a test's.
    pub fn is_ours(&self) -> bool {
        self.header("user-agent").is_some_and(|agent| agent.contains("aws-sdk-rust"))
    }

    /// Whether a request asks DynamoDB for `operation`.
    pub fn asks_for(&self, operation: &str) -> bool {
        self.header("x-amz-target")
            .and_then(|target| target.rsplit_once('.'))
            .is_some_and(|(_, asked)| asked == operation)
    }

    /// DynamoDB's answer to somebody who may not do that.
    pub fn denied() -> Self {
        Self::answer(
            "400 Bad Request",
            r#"{"__type":"com.amazon.coral.service#AccessDeniedException","message":"not you"}"#,
        )
    }

    /// An answer with a JSON body.
    pub fn answer(status: &str, body: &str) -> Self {
        let headers =
            [("Content-Type", "application/x-amz-json-1.0".to_owned()), ("Content-Length", body.len().to_string())];
        Self {
            start: format!("HTTP/1.1 {status}"),
            headers: headers.into_iter().map(|(name, value)| (name.to_owned(), value)).collect(),
            body: body.as_bytes().to_vec(),
        }
    }

    pub fn status(&self) -> u16 {
        self.start.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or(0)
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The message as it goes over the wire, its body whole.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = format!("{}\r\n", self.start).into_bytes();
        for (name, value) in &self.headers {
            bytes.extend(format!("{name}: {value}\r\n").into_bytes());
        }
        bytes.extend(b"\r\n");
        bytes.extend(&self.body);
        bytes
    }

    /// Reads a message.
    pub fn read(stream: &mut BufReader<impl Read + Write>, kind: Kind) -> Option<Self> {
        let mut line = String::new();
        stream.read_line(&mut line).ok().filter(|length| *length > 0)?;
        let start = line.trim_end().to_owned();
        let mut headers = Vec::new();
        loop {
            line.clear();
            stream.read_line(&mut line).ok().filter(|length| *length > 0)?;
            match line.trim_end().split_once(':') {
                Some((name, value)) => headers.push((name.to_owned(), value.trim().to_owned())),
                None => break,
            }
        }
        let mut message = Self { start, headers, body: Vec::new() };
        if kind == Kind::Request && message.header("expect").is_some() {
            stream.get_mut().write_all(b"HTTP/1.1 100 Continue\r\n\r\n").ok()?;
            message.headers.retain(|(name, _)| !name.eq_ignore_ascii_case("expect"));
        }
        if message.start.contains(" 100 ") {
            return Self::read(stream, kind);
        }
        if kind == Kind::AnswerToHead || message.status() == 204 || message.status() == 304 {
            return Some(message);
        }
        if message.header("transfer-encoding").is_some_and(|value| value.contains("chunked")) {
            loop {
                line.clear();
                stream.read_line(&mut line).ok()?;
                let length = usize::from_str_radix(line.trim().split(';').next()?, 16).ok()?;
                let mut chunk = vec![0; length + 2];
                stream.read_exact(&mut chunk).ok()?;
                message.body.extend(&chunk[..length]);
                if length == 0 {
                    break;
                }
            }
            message.headers.retain(|(name, _)| !name.eq_ignore_ascii_case("transfer-encoding"));
            message.headers.push(("Content-Length".into(), message.body.len().to_string()));
        } else if let Some(length) = message.header("content-length").and_then(|length| length.parse().ok()) {
            message.body = vec![0; length];
            stream.read_exact(&mut message.body).ok()?;
        }
        Some(message)
    }
}

/// Sends one request to a port of this machine and reads the answer.
pub fn ask(port: u16, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Option<Message> {
    let stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    let mut headers: Vec<_> = headers.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    headers.push(("Host".into(), format!("127.0.0.1:{port}")));
    headers.push(("Content-Length".into(), body.len().to_string()));
    headers.push(("Connection".into(), "close".into()));
    let request = Message { start: format!("{method} {path} HTTP/1.1"), headers, body: body.to_vec() };
    let mut stream = BufReader::new(stream);
    stream.get_mut().write_all(&request.bytes()).ok()?;
    Message::read(&mut stream, if method == "HEAD" { Kind::AnswerToHead } else { Kind::Answer })
}
