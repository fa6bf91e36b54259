//! Selects the proxy for a request as Go's HTTP client does (golang.org/x/net/http/httpproxy), because terraform uses
//! that client. The SDK's own client uses no proxy, and other clients interpret the proxy variables differently.

use std::net::IpAddr;

use ipnet::IpNet;

/// The proxies from a backend and the environment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Proxies {
    /// The proxy for `http` URLs. `None` if there is none.
    pub(crate) http: Option<String>,
    /// The proxy for `https` URLs. `None` if there is none.
    pub(crate) https: Option<String>,
    exceptions: Vec<Exception>,
}

/// An entry of `no_proxy`: hosts to which requests are sent without a proxy.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Exception {
    Everything,
    Network(IpNet),
    /// `port` is compared as text. An empty one stands for every port.
    Address {
        address: IpAddr,
        port: String,
    },
    /// `port` as above.
    Domain {
        suffix: String,
        itself: bool,
        port: String,
    },
}

impl Proxies {
    /// Parses `http`, `https` and the comma-separated list `no_proxy`, in the form of a backend attribute or an
    /// environment variable. An empty `http` or `https` means no proxy.
    pub(crate) fn new(http: Option<String>, https: Option<String>, no_proxy: Option<&str>) -> Self {
        let set = |url: Option<String>| url.filter(|url| !url.is_empty()).map(with_scheme);
        let words = no_proxy.unwrap_or_default().split(',').map(|word| word.trim().to_lowercase());
        Self { http: set(http), https: set(https), exceptions: words.filter_map(|word| exception(&word)).collect() }
    }

    /// Returns the proxy for `scheme://host:port`. `None` if the request is sent without a proxy. A request to
    /// localhost or to a loopback address never uses a proxy.
    pub(crate) fn choose(&self, scheme: &str, host: &str, port: u16) -> Option<&str> {
        let proxy = if scheme == "https" { &self.https } else { &self.http }.as_deref()?;
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let address = host.parse().ok().map(|address: IpAddr| address.to_canonical());
        if host == "localhost" || address.is_some_and(|address| address.is_loopback()) {
            return None;
        }
        let (host, port) = (host.to_lowercase(), port.to_string());
        (!self.exceptions.iter().any(|exception| exception.covers(&host, address, &port))).then_some(proxy)
    }
}

impl Exception {
    fn covers(&self, host: &str, address: Option<IpAddr>, port: &str) -> bool {
        let fits = |wanted: &str| wanted.is_empty() || wanted == port;
        match self {
            Self::Everything => true,
            Self::Network(network) => address.is_some_and(|address| network.contains(&address)),
            Self::Address { address: wanted, port } => address == Some(*wanted) && fits(port),
            Self::Domain { suffix, itself, port } => {
                let named = host.ends_with(suffix.as_str()) || (*itself && host == &suffix[1..]);
                address.is_none() && named && fits(port)
            }
        }
    }
}

/// Adds `http://` to the URL of a proxy if the URL has no scheme.
fn with_scheme(url: String) -> String {
    if url.contains("://") { url } else { format!("http://{url}") }
}

fn exception(word: &str) -> Option<Exception> {
    if word.is_empty() {
        return None;
    }
    if word == "*" {
        return Some(Exception::Everything);
    }
    if let Some(network) = network(word) {
        return Some(Exception::Network(network));
    }
    let (host, port) = split_port(word).unwrap_or((word, ""));
    let port = port.to_owned();
    if host.is_empty() {
        return None;
    }
    if let Ok(address) = host.parse::<IpAddr>() {
        return Some(Exception::Address { address: address.to_canonical(), port });
    }
    let host = host.strip_prefix('*').filter(|rest| rest.starts_with('.')).unwrap_or(host);
    // `.example.com` covers only the subdomains. `example.com` also covers the domain itself.
    let itself = !host.starts_with('.');
    let suffix = if itself { format!(".{host}") } else { host.to_owned() };
    Some(Exception::Domain { suffix, itself, port })
}

/// Parses `ADDRESS/LENGTH` as Go's `net.ParseCIDR` does. A network of IPv4 addresses that are written as IPv6 becomes
/// one of IPv4 addresses, as in Go's `IPNet.Contains`.
fn network(word: &str) -> Option<IpNet> {
    let (address, length) = word.split_once('/')?;
    let address: IpAddr = address.parse().ok()?;
    let length: u8 = if length.bytes().all(|byte| byte.is_ascii_digit()) { length.parse().ok()? } else { return None };
    match address.to_canonical() {
        IpAddr::V4(short) if address.is_ipv6() && length >= 96 => IpNet::new(short.into(), length - 96).ok(),
        _ => IpNet::new(address, length).ok(),
    }
}

/// Splits `HOST:PORT` or `[HOST]:PORT` as Go's `net.SplitHostPort` does. `None` where that returns an error.
fn split_port(word: &str) -> Option<(&str, &str)> {
    let (host, port) = word.rsplit_once(':')?;
    let host = match host.strip_prefix('[') {
        Some(host) => host.strip_suffix(']')?,
        None if host.contains(':') => return None,
        None => host,
    };
    (!host.contains(['[', ']']) && !port.contains(['[', ']'])).then_some((host, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proxies(no_proxy: &str) -> Proxies {
        Proxies::new(Some("plain:1".into()), Some("http://secure:2".into()), Some(no_proxy))
    }

    #[test]
    fn each_scheme_has_its_proxy() {
        let both = proxies("");
        assert_eq!(both.choose("http", "x.example", 80), Some("http://plain:1"));
        assert_eq!(both.choose("https", "x.example", 443), Some("http://secure:2"));
        let none = Proxies::new(None, Some(String::new()), None);
        assert_eq!(none.choose("https", "x.example", 443), None);
        assert_eq!(none.choose("http", "x.example", 80), None);
    }

    #[test]
    fn this_machine_is_reached_directly() {
        for host in ["localhost", "127.0.0.1", "127.9.9.9", "::1", "[::1]"] {
            assert_eq!(proxies("").choose("http", host, 80), None, "{host}");
        }
        assert!(proxies("").choose("http", "169.254.169.254", 80).is_some());
    }

    /// The file has terraform's own answers: `go_rules` in `tests/real` asks for them.
    #[test]
    fn exceptions_are_read_as_terraform_reads_them() {
        let golden: Vec<(String, String, u16, bool)> =
            serde_json::from_str(include_str!("../../tests/golden/no_proxy.json")).unwrap();
        for (no_proxy, host, port, direct) in golden {
            assert_eq!(proxies(&no_proxy).choose("http", &host, port).is_none(), direct, "{no_proxy:?} {host}:{port}");
        }
        // What terraform cannot be asked without a network: addresses other than 0.0.0.0 and [::].
        for (no_proxy, host, direct) in [
            ("10.0.0.0/8", "10.1.2.3", true),
            ("10.0.0.0/8", "11.1.2.3", false),
            ("fd00::/8", "fd12::1", true),
            ("fd12::1", "[fd12::1]", true),
            ("169.254.169.254", "169.254.169.254", true),
        ] {
            assert_eq!(proxies(no_proxy).choose("http", host, 80).is_none(), direct, "{no_proxy:?} {host}");
        }
    }

    #[test]
    fn no_list_of_exceptions_panics_and_an_exception_never_chooses_another_proxy() {
        use proptest::prelude::*;
        let list =
            crate::generated_input::changed_text("a.example,.b.org:8080,10.0.0.0/8,[::1]:443,*.c,192.168.1.1:80");
        let strategy = (list, "[a-z.:0-9\\[\\]]{0,20}", any::<u16>());
        crate::generated_input::for_all(file!(), &strategy, |(list, host, port)| {
            let proxies = Proxies::new(Some("http://p".into()), Some("p:1".into()), Some(&list));
            let chosen = (proxies.choose("http", &host, port), proxies.choose("https", &host, port));
            prop_assert!(matches!(chosen, (None, None) | (Some("http://p"), Some("http://p:1"))), "{chosen:?}");
            let all = Proxies::new(Some("http://p".into()), None, Some(&format!("{list},*")));
            prop_assert_eq!(all.choose("http", &host, port), None);
            Ok(())
        });
    }
}
