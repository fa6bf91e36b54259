//! Where the metadata service of a cloud is. It is a link-local address, which every machine of the cloud has.

use std::ffi::OsString;
use std::fmt;

use crate::lease::notice::Provider;

/// The address of the metadata service of each of the three clouds, and that of EC2 in IPv6 (EC2, "Instance Metadata
/// Service"). Google's service also has a name. The name is not used: a resolver could send the requests elsewhere.
const IPV4: &str = "http://169.254.169.254";
const EC2_IPV6: &str = "http://[fd00:ec2::254]";

/// The metadata service to ask.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Service {
    pub(crate) provider: Provider,
    /// The URL without a path and without a `/` at its end.
    pub(crate) address: String,
}

impl fmt::Display for Service {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "the {} metadata at {}", self.provider, self.address)
    }
}

/// Why no metadata service is asked although there is one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NotAsked {
    /// `AWS_EC2_METADATA_DISABLED=true`.
    Disabled,
    /// The variable with this name has a value that is no address of a service over plain HTTP.
    NoAddress(&'static str),
}

impl fmt::Display for NotAsked {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Disabled => formatter.write_str("AWS_EC2_METADATA_DISABLED is true"),
            Self::NoAddress(name) => write!(formatter, "{name} is not the address of a service over http"),
        }
    }
}

impl Service {
    /// Returns the service of `provider`. `variable` returns an environment variable: EC2's have the names and the
    /// meaning that they have for the AWS SDKs (SDK reference guide, "IMDS client"), and Google's the one that it has
    /// for Google's libraries. Azure has none. A debug build has one, for the tests.
    ///
    /// # Errors
    /// The reason for which the service must not be asked or cannot be asked.
    pub(crate) fn of(provider: Provider, variable: impl Fn(&str) -> Option<OsString>) -> Result<Self, NotAsked> {
        let set = |name| variable(name).filter(|value| !value.is_empty());
        let is = |name, expected: &str| set(name).is_some_and(|value| value.eq_ignore_ascii_case(expected));
        let (name, default) = match provider {
            Provider::Ec2 if is("AWS_EC2_METADATA_DISABLED", "true") => return Err(NotAsked::Disabled),
            Provider::Ec2 if is("AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE", "IPv6") => {
                (Some("AWS_EC2_METADATA_SERVICE_ENDPOINT"), EC2_IPV6)
            }
            Provider::Ec2 => (Some("AWS_EC2_METADATA_SERVICE_ENDPOINT"), IPV4),
            Provider::Azure => (cfg!(debug_assertions).then_some("TFW_TEST_AZURE_METADATA"), IPV4),
            Provider::Gcp => (Some("GCE_METADATA_HOST"), IPV4),
        };
        let Some((name, value)) = name.and_then(|name| Some((name, set(name)?))) else {
            return Ok(Self { provider, address: default.to_owned() });
        };
        let text = value.to_str().unwrap_or_default();
        // Google's variable has a host and perhaps a port.
        let url = if provider == Provider::Gcp { format!("http://{text}") } else { text.to_owned() };
        let address = address(&url).ok_or(NotAsked::NoAddress(name))?;
        Ok(Self { provider, address })
    }
}

/// Returns scheme, host and port of a URL. `None` if the scheme is not `http`, or if there is a user or a query.
fn address(url: &str) -> Option<String> {
    let uri: http::Uri = url.parse().ok()?;
    let authority = uri.authority()?;
    let is_plain = uri.scheme_str() == Some("http") && uri.query().is_none() && !authority.as_str().contains('@');
    is_plain.then(|| format!("http://{authority}{}", uri.path().trim_end_matches('/')))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ENDPOINT: &str = "AWS_EC2_METADATA_SERVICE_ENDPOINT";
    const MODE: &str = "AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE";
    const DISABLED: &str = "AWS_EC2_METADATA_DISABLED";

    fn address_of(provider: Provider, set: &[(&str, &str)]) -> Result<String, NotAsked> {
        let variable = |asked: &str| set.iter().find(|(name, _)| *name == asked).map(|(_, value)| (*value).into());
        Service::of(provider, variable).map(|service| service.address)
    }

    #[test]
    fn without_a_variable_the_address_is_link_local() {
        for provider in [Provider::Ec2, Provider::Azure, Provider::Gcp] {
            assert_eq!(address_of(provider, &[]), Ok("http://169.254.169.254".to_owned()));
        }
        assert_eq!(address_of(Provider::Ec2, &[(MODE, "ipv6")]), Ok("http://[fd00:ec2::254]".to_owned()));
        assert_eq!(address_of(Provider::Ec2, &[(ENDPOINT, ""), (DISABLED, "")]), Ok(IPV4.to_owned()));
    }

    #[test]
    fn the_variables_mean_what_they_mean_for_the_sdks() {
        for (value, expected) in [
            ("http://127.0.0.1:1338", Ok("http://127.0.0.1:1338")),
            ("http://127.0.0.1:1338/", Ok("http://127.0.0.1:1338")),
            ("http://[fd00:ec2::254]", Ok("http://[fd00:ec2::254]")),
            ("http://metadata/proxy/", Ok("http://metadata/proxy")),
            ("https://127.0.0.1", Err(NotAsked::NoAddress(ENDPOINT))),
            ("127.0.0.1:1338", Err(NotAsked::NoAddress(ENDPOINT))),
            ("http://", Err(NotAsked::NoAddress(ENDPOINT))),
            ("http://a:b@127.0.0.1", Err(NotAsked::NoAddress(ENDPOINT))),
            ("http://127.0.0.1/?x", Err(NotAsked::NoAddress(ENDPOINT))),
            ("no address", Err(NotAsked::NoAddress(ENDPOINT))),
        ] {
            let expected = expected.map(ToOwned::to_owned);
            assert_eq!(address_of(Provider::Ec2, &[(ENDPOINT, value), (MODE, "IPv4")]), expected, "{value}");
        }
        assert_eq!(address_of(Provider::Ec2, &[(DISABLED, "True")]), Err(NotAsked::Disabled));
        assert_eq!(address_of(Provider::Ec2, &[(DISABLED, "false")]), Ok(IPV4.to_owned()));
        let aws = [(ENDPOINT, "http://127.0.0.1:1"), (DISABLED, "true"), (MODE, "IPv6")];
        for provider in [Provider::Azure, Provider::Gcp] {
            assert_eq!(address_of(provider, &aws), Ok(IPV4.to_owned()));
        }
        let host = |host| address_of(Provider::Gcp, &[("GCE_METADATA_HOST", host)]);
        assert_eq!(host("127.0.0.1:80"), Ok("http://127.0.0.1:80".to_owned()));
        assert_eq!(host("a b"), Err(NotAsked::NoAddress("GCE_METADATA_HOST")));
    }
}
