//! HTTP/1.1, as far as the tests need it: complete messages over a socket.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;

/// The kind of message that is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A request. If the client waits for `100 Continue`, it is sent.
    Request,
    /// A response.
    Answer,
    /// A response to a HEAD. It has no body, even if it has a length.
    AnswerToHead,
}

/// A request or a response: its first line, its headers and its body.
#[derive(Clone, Debug)]
pub struct Message {
    pub start: String,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Message {
    /// Returns the value of a header. The case of the name does not matter. `None` if there is no such header.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    /// Whether a request comes from `tf`, and not from terraform or from a test.
    pub fn is_ours(&self) -> bool {
        self.header("user-agent").is_some_and(|agent| agent.contains("aws-sdk-rust"))
    }

    /// Whether a request is for DynamoDB's `operation`.
    pub fn asks_for(&self, operation: &str) -> bool {
        self.header("x-amz-target")
            .and_then(|target| target.rsplit_once('.'))
            .is_some_and(|(_, asked)| asked == operation)
    }

    /// Returns the response of the service of this request, DynamoDB or S3, to a caller that lacks the permission. If
    /// one service answered in the other's form, `tf` would take that for the response of a proxy.
    pub fn denied(&self) -> Self {
        if self.header("x-amz-target").is_some() {
            let body = r#"{"__type":"com.amazon.coral.service#AccessDeniedException","message":"not you"}"#;
            Self::answer("400 Bad Request", body)
        } else {
            let body = r#"<?xml version="1.0"?><Error><Code>AccessDenied</Code><Message>not you</Message></Error>"#;
            Self::answer("403 Forbidden", body)
        }
    }

    /// Returns a response with a JSON body.
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

    /// Returns the message as it is sent, with a body that is not chunked.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = format!("{}\r\n", self.start).into_bytes();
        for (name, value) in &self.headers {
            bytes.extend(format!("{name}: {value}\r\n").into_bytes());
        }
        bytes.extend(b"\r\n");
        bytes.extend(&self.body);
        bytes
    }

    /// Reads a message. `None` if the connection ends before the message is complete.
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

/// Sends one request to a port of this machine, and reads the response. `None` if there is none.
pub fn ask(port: u16, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Option<Message> {
    // localbucket 1.2.1 closes the connection without an answer if an object is deleted while it reads it
    // (`object_etag` in its `_get`). A read can be repeated, as every SDK does.
    let ask = || ask_once(port, method, path, headers, body);
    ask().or_else(|| if method == "GET" { ask() } else { None })
}

fn ask_once(port: u16, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Option<Message> {
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
