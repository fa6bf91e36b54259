//! Selects the proxy for a request as Go's HTTP client does (golang.org/x/net/http/httpproxy), because terraform uses
//! that client. The SDK's own client uses no proxy, and other clients interpret the proxy variables differently.

use ipnet::IpNet;
use std::net::IpAddr;

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
    Address { address: IpAddr, port: Option<u16> },
    Domain { suffix: String, itself: bool, port: Option<u16> },
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
        let host = host.trim_start_matches('[').trim_end_matches(']').to_lowercase();
        let address: Option<IpAddr> = host.parse().ok();
        if host == "localhost" || address.is_some_and(|address| address.is_loopback()) {
            return None;
        }
        (!self.exceptions.iter().any(|exception| exception.covers(&host, address, port))).then_some(proxy)
    }
}

impl Exception {
    fn covers(&self, host: &str, address: Option<IpAddr>, port: u16) -> bool {
        let fits = |wanted: &Option<u16>| wanted.is_none_or(|wanted| wanted == port);
        match self {
            Self::Everything => true,
            Self::Network(network) => address.is_some_and(|address| network.contains(&address)),
            Self::Address { address: wanted, port } => address == Some(*wanted) && fits(port),
            Self::Domain { suffix, itself, port } => {
                (host.ends_with(suffix.as_str()) || (*itself && host == &suffix[1..])) && fits(port)
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
    if let Ok(network) = word.parse::<IpNet>() {
        return Some(Exception::Network(network));
    }
    let (host, port) = match word.rsplit_once(':') {
        // An IPv6 address without brackets contains colons, so the text after the last colon is not a port.
        Some((host, port)) if !host.contains(':') || host.ends_with(']') => match port.parse() {
            Ok(port) => (host, Some(port)),
            Err(_) => (word, None),
        },
        _ => (word, None),
    };
    let host = host.trim_start_matches('[').trim_end_matches(']');
    if let Ok(address) = host.parse() {
        return Some(Exception::Address { address, port });
    }
    if host.is_empty() {
        return None;
    }
    let host = host.strip_prefix('*').filter(|rest| rest.starts_with('.')).unwrap_or(host);
    // `.example.com` covers only the subdomains. `example.com` also covers the domain itself.
    let itself = !host.starts_with('.');
    let suffix = if itself { format!(".{host}") } else { host.to_owned() };
    Some(Exception::Domain { suffix, itself, port })
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

    #[test]
    fn exceptions_are_read_as_go_reads_them() {
        for (no_proxy, host, port, direct) in [
            ("*", "x.example", 443, true),
            ("example.com", "example.com", 443, true),
            ("example.com", "s3.example.com", 443, true),
            ("example.com", "notexample.com", 443, false),
            (".example.com", "example.com", 443, false),
            (".example.com", "s3.example.com", 443, true),
            ("*.example.com", "s3.example.com", 443, true),
            ("*.example.com", "example.com", 443, false),
            ("Example.COM", "S3.example.com", 443, true),
            ("example.com:443", "example.com", 443, true),
            ("example.com:8443", "example.com", 443, false),
            (" a , example.com ", "example.com", 443, true),
            ("10.0.0.0/8", "10.1.2.3", 443, true),
            ("10.0.0.0/8", "11.1.2.3", 443, false),
            ("10.0.0.0/99", "10.1.2.3", 443, false),
            ("fd00::/8", "fd12::1", 443, true),
            ("169.254.169.254", "169.254.169.254", 80, true),
            ("10.1.2.3:80", "10.1.2.3", 443, false),
            ("[fd12::1]:443", "fd12::1", 443, true),
            ("fd12::1", "[fd12::1]", 443, true),
            ("", "example.com", 443, false),
            (",,", "example.com", 443, false),
        ] {
            assert_eq!(proxies(no_proxy).choose("https", host, port).is_none(), direct, "{no_proxy} {host}:{port}");
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
