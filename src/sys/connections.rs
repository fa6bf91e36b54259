//! The TCP connections of this host, as far as they hold bytes that the peer has not confirmed. The kernel goes on
//! sending these bytes after their process was stopped, and even after it has ended.

use std::collections::HashSet;
use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use nix::unistd::Pid;

/// The bytes that processes which have ended had handed to the kernel, and which their peers have not confirmed.
///
/// The kernel repeats them for up to four minutes: `tcp_orphan_retries` is 8 unless it was changed, the time between
/// two attempts doubles from 0.2 s to at most 2 min, and is as long as the last outage was (tcp(7),
/// net/ipv4/tcp_timer.c).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct UnconfirmedBytes(HashSet<Connection>);

/// The time after the end of a process after which the kernel of Linux has given up the bytes that the process has left
/// ([`UnconfirmedBytes`]), for a caller that does not see them. They may be in another network namespace, so it proves
/// nothing about their network that a service answers here. Zero on other systems, where [`UNSEEN_INTERVAL`] is enough.
pub(crate) const UNSEEN_BYTES_TIMEOUT: Duration =
    if cfg!(target_os = "linux") { Duration::from_mins(4) } else { Duration::ZERO };

/// The longest time between two attempts of the kernel to send what a process has left, on a system without network
/// namespaces that does not show these bytes (`TCPTV_REXMTMAX`, bsd/netinet/tcp_timer.h of xnu). If a service answers
/// during all that time, the network works, and the next attempt succeeds. Zero on Linux ([`UNSEEN_BYTES_TIMEOUT`]).
pub(crate) const UNSEEN_INTERVAL: Duration =
    if cfg!(target_os = "linux") { Duration::ZERO } else { Duration::from_secs(64) };

/// The local and the remote address of a TCP connection, as the kernel prints them. While the connection exists, no
/// other one has the same two.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Connection {
    local: String,
    remote: String,
}

impl UnconfirmedBytes {
    /// Reads the connections of this network namespace. Only connections that this host has begun count, so a server on
    /// this host whose clients are slow does not. `None` if the kernel does not list them: on systems other than Linux,
    /// and if `/proc/net` cannot be read, for example because /proc is mounted with `subset=pid` (proc(5)).
    fn read() -> Option<Self> {
        let read = |path| std::fs::read_to_string(path);
        let ports = read("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
        let ports = parse_port_range(&ports).unwrap_or(DEFAULT_PORTS);
        let lists = [read("/proc/net/tcp").ok()?, sixth(read("/proc/net/tcp6")).ok()?];
        Some(Self(lists.iter().flat_map(|list| list.lines()).filter_map(|line| unconfirmed(line, ports)).collect()))
    }

    /// Reads again. Returns those of these connections that still hold unconfirmed bytes. `None` as in [`Self::read`].
    fn still(&self) -> Option<Self> {
        Some(Self(self.0.intersection(&Self::read()?.0).cloned().collect()))
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// What the kernel still sends for processes that had ended when this value was made. A process ends before the caller
/// makes this value, so what the kernel begins to send later is not that process's.
#[derive(Debug)]
pub(crate) struct StillSending(Option<UnconfirmedBytes>);

impl StillSending {
    /// Begins to look. `is_network_shared` is whether the processes were in the network namespace of this process.
    pub(crate) fn begin(is_network_shared: bool) -> Self {
        Self(UnconfirmedBytes::read().filter(|_| is_network_shared))
    }

    /// Whether the bytes are seen. If not, see [`UNSEEN_BYTES_TIMEOUT`] and [`UNSEEN_INTERVAL`].
    pub(crate) fn is_seen(&self) -> bool {
        self.0.is_some()
    }

    /// Whether there were bytes at the last look.
    pub(crate) fn has_bytes(&self) -> bool {
        self.0.as_ref().is_some_and(|bytes| !bytes.is_empty())
    }

    /// Looks again. Returns whether there were bytes at the look before: some of them may have arrived just now. After
    /// that, the bytes may also be unseen, if the connections could not be read.
    pub(crate) fn look(&mut self) -> bool {
        let had_bytes = self.has_bytes();
        if had_bytes {
            self.0 = self.0.as_ref().and_then(UnconfirmedBytes::still);
        }
        had_bytes
    }
}

/// Returns the number of the network namespace of this process. While a connection of a namespace exists, no other
/// namespace has its number (network_namespaces(7)). `None` on systems other than Linux, and if /proc does not show it.
pub(crate) fn network_namespace() -> Option<u64> {
    #[cfg(target_os = "linux")]
    {
        use std::os::unix::fs::MetadataExt;
        Some(std::fs::metadata("/proc/self/ns/net").ok()?.ino())
    }
    #[cfg(not(target_os = "linux"))]
    None
}

/// Returns the list of the IPv6 connections, from the result of reading it. It does not exist if the kernel has no IPv6
/// (`ipv6.disable=1`), so it is empty then.
fn sixth(list: io::Result<String>) -> io::Result<String> {
    match list {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        list => list,
    }
}

/// The first and the last local port of connections that this host begins, if the kernel was not told others (ip(7)).
const DEFAULT_PORTS: (u16, u16) = (32768, 60999);

/// Parses `/proc/sys/net/ipv4/ip_local_port_range` (ip(7)). `None` if it has another form.
fn parse_port_range(text: &str) -> Option<(u16, u16)> {
    let mut ports = text.split_whitespace().map(str::parse);
    Some((ports.next()?.ok()?, ports.next()?.ok()?))
}

/// Returns the connection in one line of `/proc/net/tcp` or `/proc/net/tcp6` (proc_net_tcp in the kernel's
/// documentation), if no process has it any more, its local port is one of `ports`, and it holds bytes that were not
/// confirmed.
fn unconfirmed(line: &str, ports: (u16, u16)) -> Option<Connection> {
    /// States of a connection that was closed here, and whose end the peer has not confirmed: `TCP_FIN_WAIT1`,
    /// `TCP_LAST_ACK` and `TCP_CLOSING` of net/tcp_states.h.
    const CLOSED_HERE: [&str; 3] = ["04", "09", "0B"];
    let mut fields = line.split_ascii_whitespace();
    let (local, remote, state, queues) =
        (fields.nth(1)?.to_owned(), fields.next()?.to_owned(), fields.next()?, fields.next()?);
    // Then come the timer, the retransmissions, the user, the time-outs, and the inode of the socket.
    let inode = fields.nth(4)?;
    let sent = u64::from_str_radix(queues.split_once(':')?.0, 16).ok()?;
    let port = u16::from_str_radix(local.rsplit_once(':')?.1, 16).ok()?;
    // The mark of the end counts as one byte.
    let holds_bytes = CLOSED_HERE.contains(&state) && inode == "0" && sent > 1;
    (holds_bytes && (ports.0..=ports.1).contains(&port)).then_some(Connection { local, remote })
}

/// Breaks off every TCP connection of a process: the kernel discards what the peer has not confirmed and sends a reset,
/// and the process gets `ECONNRESET` (connect(2) with `AF_UNSPEC`, RFC 793 "ABORT"). `process` is the handle of `pid`
/// ([`super::process::ProcessHandle`]), so this never reaches a later process with the same pid. Returns the number of
/// connections. 0 also if this process may not trace that one (pidfd_getfd(2), Linux 5.6; ptrace(2)), and on systems
/// other than Linux.
///
/// The process must be stopped, or else it may open another connection meanwhile.
pub(crate) fn abort(pid: Pid, process: impl AsFd) -> usize {
    #[cfg(target_os = "linux")]
    {
        use rustix::net::sockopt::socket_protocol;
        use rustix::net::{connect_unspec, getpeername, ipproto};
        use rustix::process::{PidfdGetfdFlags, pidfd_getfd};
        let aborted = |name: std::ffi::OsString| {
            let is_socket = std::fs::read_link(format!("/proc/{pid}/fd/{}", name.to_str()?)).ok()?;
            is_socket.to_str()?.starts_with("socket:").then_some(())?;
            let socket = pidfd_getfd(&process, name.to_str()?.parse().ok()?, PidfdGetfdFlags::empty()).ok()?;
            // Go uses MPTCP if it is told to (GODEBUG=multipathtcp=1).
            [Some(ipproto::TCP), Some(ipproto::MPTCP)].contains(&socket_protocol(&socket).ok()?).then_some(())?;
            // A listening socket has no peer.
            getpeername(&socket).ok()??;
            connect_unspec(&socket).ok()
        };
        let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd"));
        descriptors.into_iter().flatten().flatten().filter_map(|entry| aborted(entry.file_name())).count()
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = (pid, process);
        0
    }
}

/// A process that can open no connection and no file, until [`Barred::lift`]. It keeps those that it has.
#[derive(Debug)]
pub(crate) struct Barred {
    pid: Pid,
    /// The limit that the process had (`RLIMIT_NOFILE`).
    #[cfg(target_os = "linux")]
    limit: libc::rlimit,
}

impl Barred {
    /// Sets the limit of the descriptors of `pid` to 0, so that socket(2) fails with EMFILE (prlimit(2)). The caller
    /// must know that `pid` is not that of a later process. `None` if the process has another user, is gone or has this
    /// limit already, and on systems other than Linux.
    pub(crate) fn new(pid: Pid) -> Option<Self> {
        #[cfg(target_os = "linux")]
        {
            let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
            // SAFETY: the kernel writes one rlimit into `limit`, and reads none.
            let is_read = unsafe { libc::prlimit(pid.as_raw(), libc::RLIMIT_NOFILE, std::ptr::null(), &raw mut limit) };
            if is_read != 0 || limit.rlim_cur == 0 {
                return None;
            }
            // The hard limit stays: only root could raise it again.
            let barred = Self { pid, limit };
            barred.set(&libc::rlimit { rlim_cur: 0, ..limit }).then_some(barred)
        }
        #[cfg(not(target_os = "linux"))]
        {
            let _ = pid;
            None
        }
    }

    /// Sets the limit back. The same condition applies to the process as in [`Barred::new`].
    pub(crate) fn lift(self) {
        #[cfg(target_os = "linux")]
        self.set(&self.limit);
        #[cfg(not(target_os = "linux"))]
        let _ = self.pid;
    }

    /// Sets the limit. Returns whether the kernel has accepted it.
    #[cfg(target_os = "linux")]
    fn set(&self, limit: &libc::rlimit) -> bool {
        // SAFETY: the kernel reads one rlimit from `limit`, and writes none.
        unsafe { libc::prlimit(self.pid.as_raw(), libc::RLIMIT_NOFILE, limit, std::ptr::null_mut()) == 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_os = "linux")]
    #[expect(clippy::disallowed_methods, reason = "a test has no terraform")]
    fn a_barred_process_opens_nothing_until_the_bar_is_lifted() {
        use std::io::{BufRead, BufReader, Write};
        use std::process::{Command, Stdio};
        let script = "while read -r _; do if (: < /dev/null) 2> /dev/null; then echo opens; else echo fails; fi; done";
        let mut shell = Command::new("bash");
        let mut shell = shell.args(["-c", script]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (mut input, output) = (shell.stdin.take().unwrap(), shell.stdout.take().unwrap());
        let mut lines = BufReader::new(output).lines();
        let mut answer = || {
            input.write_all(b"\n").unwrap();
            lines.next().unwrap().unwrap()
        };
        let pid = Pid::from_raw(shell.id().try_into().unwrap());
        assert_eq!(answer(), "opens");
        let barred = Barred::new(pid).unwrap();
        assert_eq!(answer(), "fails");
        // The limit that it had must not be forgotten.
        assert!(Barred::new(pid).is_none());
        barred.lift();
        assert_eq!(answer(), "opens");
        shell.kill().unwrap();
        shell.wait().unwrap();
        assert!(Barred::new(pid).is_none());
    }

    #[test]
    fn a_list_that_cannot_be_read_is_not_an_empty_one() {
        assert_eq!(sixth(Ok("text".to_owned())).unwrap(), "text");
        assert_eq!(sixth(Err(io::ErrorKind::NotFound.into())).unwrap(), "", "the kernel has no IPv6");
        for error in [libc::EACCES, libc::EMFILE, libc::ENFILE, libc::ENOMEM] {
            assert!(sixth(Err(io::Error::from_raw_os_error(error))).is_err(), "{error}");
        }
    }

    const LINE: &str = "  12: 0100007F:8F2B 0200007F:01BB 04 00000A00:00000000 01:00000062 00000004     0        0 0 3 \
                        0000000000000000 1600 4 1 10 -1";

    #[test]
    fn only_bytes_of_a_connection_that_this_host_has_begun_and_no_process_has_count() {
        let expected = Connection { local: "0100007F:8F2B".to_owned(), remote: "0200007F:01BB".to_owned() };
        assert_eq!(unconfirmed(LINE, DEFAULT_PORTS), Some(expected.clone()));
        for (from, to, counts) in [
            (" 04 ", " 09 ", true),
            (" 04 ", " 0B ", true),
            // It is open, or only its end is missing, or nothing.
            (" 04 ", " 01 ", false),
            ("00000A00:", "00000001:", false),
            ("00000A00:", "00000000:", false),
            ("00000A00:", "00000002:", true),
            // A process has it.
            (" 0 3 ", " 4711 3 ", false),
            // It was accepted at a port of this host.
            (":8F2B", ":01BB", false),
            // Another form.
            ("00000A00:", "00000A00", false),
            ("00000A00:", "x:", false),
            (" 04 ", " ", false),
        ] {
            let line = LINE.replace(from, to);
            assert_ne!(line, LINE);
            assert_eq!(unconfirmed(&line, DEFAULT_PORTS).is_some(), counts, "{line}");
        }
        let sixth = LINE.replace("0100007F", "00000000000000000000000001000000");
        assert!(unconfirmed(&sixth, DEFAULT_PORTS).is_some());
        assert_eq!(unconfirmed("  sl  local_address rem_address   st tx_queue rx_queue tr", DEFAULT_PORTS), None);
        assert_eq!(unconfirmed("", DEFAULT_PORTS), None);
        assert_eq!(parse_port_range("1024\t65535\n"), Some((1024, 65535)));
        for text in ["", "1024", "1024 x", "1024 65536"] {
            assert_eq!(parse_port_range(text), None, "{text}");
        }
    }

    #[cfg(target_os = "linux")]
    mod with_connections {
        use std::io::{Read, Write};
        use std::net::{Ipv4Addr, Ipv6Addr, TcpListener, TcpStream};
        use std::time::Instant;

        use super::*;
        use crate::sys::process::ProcessHandle;

        /// Returns both ends of a connection. The client's end has sent more than the server's end can take.
        fn full_connection(listener: &TcpListener) -> (TcpStream, TcpStream) {
            let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let server = listener.accept().unwrap().0;
            client.set_nonblocking(true).unwrap();
            while (&client).write(&[7; 1 << 13]).is_ok() {}
            client.set_nonblocking(false).unwrap();
            (client, server)
        }

        /// Waits until `is_met` returns true. If that takes too long, fails with the connections of this host.
        fn wait_until(is_met: impl Fn() -> bool) {
            let begun = Instant::now();
            while !is_met() {
                let connections = || std::fs::read_to_string("/proc/net/tcp").unwrap();
                assert!(begun.elapsed() < Duration::from_secs(20), "{}", connections());
            }
        }

        /// Reads until the end or an error. Returns how many bytes came.
        fn drain(mut server: &TcpStream) -> Result<usize, (usize, std::io::ErrorKind)> {
            let (mut total, mut buffer) = (0, vec![0; 1 << 16]);
            loop {
                match server.read(&mut buffer) {
                    Ok(0) => return Ok(total),
                    Ok(count) => total += count,
                    Err(error) => return Err((total, error.kind())),
                }
            }
        }

        #[test]
        fn what_a_closed_connection_has_not_delivered_is_seen_until_the_peer_has_it() {
            for address in [std::net::IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()] {
                let Ok(listener) = TcpListener::bind((address, 0)) else { continue };
                let (client, server) = full_connection(&listener);
                let port = format!(":{:04X}", client.local_addr().unwrap().port());
                let of_client = |bytes: Option<UnconfirmedBytes>| {
                    let all = bytes.unwrap().0.into_iter();
                    UnconfirmedBytes(all.filter(|connection| connection.local.ends_with(&port)).collect())
                };
                assert!(of_client(UnconfirmedBytes::read()).is_empty(), "a process has it");
                drop(client);
                // A child that another test has just forked has the connection too, until it has called execve(2).
                wait_until(|| of_client(UnconfirmedBytes::read()).0.len() == 1);
                let seen = of_client(UnconfirmedBytes::read());
                assert_eq!(seen.still(), Some(seen.clone()));
                drain(&server).unwrap();
                wait_until(|| seen.still().unwrap().is_empty());
            }
            assert!(UnconfirmedBytes::default().still().unwrap().is_empty());
        }

        #[test]
        fn an_aborted_connection_delivers_no_more_and_is_not_seen_after_its_end() {
            // The process of the tests has other connections. So the connection is one of a child's.
            const SENT: usize = 100_000_000;
            let over_tcp = |port| {
                let mut command = std::process::Command::new("bash");
                command.args(["-c", &format!("exec >/dev/tcp/127.0.0.1/{port} && exec head -c {SENT} /dev/zero")]);
                command
            };
            is_broken_off(over_tcp, SENT);
            // Go makes such connections if it is told to. A kernel without MPTCP has none.
            let over_mptcp = |port| {
                let mut command = std::process::Command::new("python3");
                let script = "import socket, sys\nport, count = map(int, sys.argv[1:])\n\
                              connection = socket.socket(proto=262)\nconnection.connect(('127.0.0.1', port))\n\
                              connection.sendall(bytes(count))";
                command.args(["-c", script, &format!("{port}"), &SENT.to_string()]);
                command
            };
            let kind = (rustix::net::AddressFamily::INET, rustix::net::SocketType::STREAM);
            if rustix::net::socket(kind.0, kind.1, Some(rustix::net::ipproto::MPTCP)).is_ok() {
                is_broken_off(over_mptcp, SENT);
            }
        }

        /// Checks that the connection of a process that sends `count` bytes to a port is broken off.
        #[expect(clippy::disallowed_methods, reason = "a test has no terraform")]
        fn is_broken_off(sends: impl Fn(u16) -> std::process::Command, count: usize) {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let port = listener.local_addr().unwrap().port();
            let mut child = sends(port).stderr(std::process::Stdio::piped()).spawn().unwrap();
            let server = listener.accept().unwrap().0;
            // It is sending, and soon it must wait.
            server.peek(&mut [0]).unwrap();
            let pid = Pid::from_raw(i32::try_from(child.id()).unwrap());
            let process = ProcessHandle::open(pid).unwrap();
            assert_eq!(abort(pid, &process), 1);
            let (arrived, error) = drain(&server).unwrap_err();
            assert_eq!(error, std::io::ErrorKind::ConnectionReset);
            assert!(arrived < count);
            let mut reason = String::new();
            child.stderr.take().unwrap().read_to_string(&mut reason).unwrap();
            assert!(["reset by peer", "Broken pipe"].iter().any(|text| reason.contains(text)), "{reason}");
            assert!(!child.wait().unwrap().success());
            assert_eq!(abort(pid, &process), 0, "it has ended");
        }
    }
}
