//! The HTTP client for the SDK. It uses the same proxies, certificate authorities and certificate checks as terraform.
//!
//! The SDK's default client uses no proxy and always checks certificates. `tf` builds its connectors from the SDK's
//! parts where it can. No connector of the SDK accepts every certificate, so `tf` has its own for a backend with
//! `insecure = true`.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use aws_smithy_http_client::proxy::ProxyConfig;
use aws_smithy_http_client::{Connector, tls};
use aws_smithy_runtime_api::client::http::{
    HttpClient, HttpConnector, HttpConnectorFuture, HttpConnectorSettings, SharedHttpClient, SharedHttpConnector,
};
use aws_smithy_runtime_api::client::orchestrator::{HttpRequest, HttpResponse};
use aws_smithy_runtime_api::client::result::ConnectorError;
use aws_smithy_runtime_api::client::runtime_components::RuntimeComponents;
use aws_smithy_types::body::SdkBody;
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::proxy::Tunnel;
use hyper_util::client::legacy::connect::{Connect, HttpConnector as Tcp};
use hyper_util::client::proxy::matcher::{Intercept as Through, Matcher};
use hyper_util::rt::TokioExecutor;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{DigitallySignedStruct, SignatureScheme};
use tokio::task;

use crate::aws::authorities;
use crate::aws::proxies::Proxies;
use crate::aws::resolver::Resolver;
use crate::sys::frameworks;

/// The network settings for requests to AWS.
#[derive(Clone, Debug, Default)]
pub(crate) struct Network {
    pub(crate) proxies: Proxies,
    /// The only certificate authorities to trust, in PEM. If `None`, the authorities of the system are trusted.
    pub(crate) authorities: Option<Vec<u8>>,
    /// Whether every certificate is accepted.
    pub(crate) insecure: bool,
}

impl Network {
    /// Returns the HTTP client for the SDK.
    pub(crate) fn client(self) -> SharedHttpClient {
        SharedHttpClient::new(Routes { network: Arc::new(self), connectors: Arc::default() })
    }

    /// Returns a connector for requests through `proxy`, or for direct requests if it is `None`.
    ///
    /// # Errors
    /// Why no certificate can be checked, for the user.
    fn connector(
        &self,
        proxy: Option<&str>,
        settings: &HttpConnectorSettings,
        https: bool,
    ) -> Result<SharedHttpConnector, String> {
        if self.insecure && https {
            return Ok(unverified(proxy));
        }
        let proxy_scheme = proxy.and_then(|proxy| proxy.parse::<http::Uri>().ok()?.into_parts().scheme);
        let trusted = match &self.authorities {
            // Plain HTTP needs no authorities, and works on a machine that has none.
            _ if !https && proxy_scheme != Some(http::uri::Scheme::HTTPS) => tls::TrustStore::empty(),
            Some(pem) => tls::TrustStore::empty().with_pem_certificate(pem.clone()),
            None => tls::TrustStore::empty().with_pem_certificate(authorities::of_system()?),
        };
        let mut builder = Connector::builder()
            .connector_settings(settings.clone())
            .tls_provider(tls::Provider::Rustls(tls::rustls_provider::CryptoMode::AwsLc));
        if let Ok(context) = tls::TlsContext::builder().with_trust_store(trusted).build() {
            builder = builder.tls_context(context);
        }
        if let Some(proxy) = proxy.and_then(|proxy| ProxyConfig::all(proxy).ok()) {
            builder = builder.proxy_config(proxy);
        }
        let is_allowed = frameworks::are_allowed();
        let connector = if is_allowed { builder.build() } else { builder.build_with_resolver(Resolver) };
        Ok(SharedHttpConnector::new(connector))
    }
}

/// Which requests a connector is for: those through a proxy (`None` for direct connections), whether by HTTPS, and with
/// which connect and read timeouts.
type RouteKey = (Option<String>, bool, [Option<Duration>; 2]);

/// The connectors. Each keeps its connections open for reuse.
type Connectors = Mutex<HashMap<RouteKey, SharedHttpConnector>>;

/// An HTTP client that chooses the proxy and the connector for each request.
#[derive(Clone, Debug)]
struct Routes {
    network: Arc<Network>,
    connectors: Arc<Connectors>,
}

impl Routes {
    /// Returns the connector of `route`, which is created if there is none.
    ///
    /// # Errors
    /// As [`Network::connector`].
    fn connector(&self, route: RouteKey, settings: &HttpConnectorSettings) -> Result<SharedHttpConnector, String> {
        let mut connectors = self.connectors.lock().unwrap_or_else(PoisonError::into_inner);
        let (proxy, https, _) = route.clone();
        match connectors.entry(route) {
            Entry::Occupied(known) => Ok(known.get().clone()),
            Entry::Vacant(place) => {
                Ok(place.insert(self.network.connector(proxy.as_deref(), settings, https)?).clone())
            }
        }
    }
}

impl HttpClient for Routes {
    fn http_connector(&self, settings: &HttpConnectorSettings, _: &RuntimeComponents) -> SharedHttpConnector {
        SharedHttpConnector::new(Route { routes: self.clone(), settings: settings.clone() })
    }
}

#[derive(Debug)]
struct Route {
    routes: Routes,
    settings: HttpConnectorSettings,
}

impl HttpConnector for Route {
    fn call(&self, request: HttpRequest) -> HttpConnectorFuture {
        let network = &self.routes.network;
        let target: Option<http::Uri> = request.uri().parse().ok();
        let scheme = target.as_ref().and_then(http::Uri::scheme_str).unwrap_or("https");
        let host = target.as_ref().and_then(http::Uri::host).unwrap_or_default();
        let https = scheme == "https";
        let port = target.as_ref().and_then(http::Uri::port_u16).unwrap_or(if https { 443 } else { 80 });
        let proxy = network.proxies.choose(scheme, host, port);
        let key =
            (proxy.map(ToOwned::to_owned), https, [self.settings.connect_timeout(), self.settings.read_timeout()]);
        // Go's client also supports SOCKS proxies; the SDK and `tf` do not. This check is made for each request, so
        // that only the requests that need such a proxy fail.
        if proxy.is_some_and(|proxy| ProxyConfig::all(proxy).is_err()) {
            let why = "tf cannot use the proxy: its URL is neither http nor https";
            return HttpConnectorFuture::ready(Err(ConnectorError::user(why.into())));
        }
        let (routes, settings) = (self.routes.clone(), self.settings.clone());
        let connector = move || routes.connector(key, &settings).map_err(|reason| ConnectorError::user(reason.into()));
        if frameworks::are_allowed() {
            return match connector() {
                Ok(connector) => connector.call(request),
                Err(error) => HttpConnectorFuture::ready(Err(error)),
            };
        }
        // Another process may have to answer first. No timer of the runtime may wait for it.
        HttpConnectorFuture::new(async move {
            let connector = task::spawn_blocking(connector).await;
            connector.map_err(|error| ConnectorError::other(error.into(), None))??.call(request).await
        })
    }
}

/// Returns a connector that accepts every certificate, for `insecure = true`.
fn unverified(proxy: Option<&str>) -> SharedHttpConnector {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder =
        rustls::ClientConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions();
    let Ok(builder) = builder else {
        // This is never reached, because the provider supports TLS 1.2 and 1.3, but the compiler requires the branch.
        return SharedHttpConnector::new(Connector::builder().build_http());
    };
    let config = builder
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AcceptAnyCertificate(provider)))
        .with_no_client_auth();
    let mut tcp = Tcp::new_with_resolver(Resolver);
    tcp.enforce_http(false);
    tcp.set_nodelay(true);
    tcp.set_connect_timeout(Some(Duration::from_secs(3)));
    let direct = HttpsConnector::from((tcp, config.clone()));
    let Some(proxy) = proxy.and_then(through) else { return shared(direct) };
    // The password of the proxy is sent on the connection to the proxy. So this connection uses TLS if the URL of the
    // proxy is `https`. Every certificate of the proxy is accepted too.
    let mut tunnel = Tunnel::new(proxy.uri().clone(), direct);
    if let Some(credentials) = proxy.basic_auth() {
        tunnel = tunnel.with_auth(credentials.clone());
    }
    shared(HttpsConnector::from((tunnel, config)))
}

/// Parses the URL of a proxy. If the URL contains a user, the result has a `Proxy-Authorization` header, with `%`
/// escapes in the user and the password decoded. `None` if the URL cannot be parsed.
fn through(proxy: &str) -> Option<Through> {
    // The matcher uses this proxy for every host, so the URL that is passed here can have any host.
    Matcher::builder().all(proxy).build().intercept(&http::Uri::from_static("https://any"))
}

fn shared<C>(connector: C) -> SharedHttpConnector
where
    C: Connect + Clone + Send + Sync + 'static,
{
    SharedHttpConnector::new(Unverified(Client::builder(TokioExecutor::new()).build(connector)))
}

struct Unverified<C>(Client<C, SdkBody>);

impl<C> std::fmt::Debug for Unverified<C> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Unverified")
    }
}

impl<C> HttpConnector for Unverified<C>
where
    C: Connect + Clone + Send + Sync + 'static,
{
    fn call(&self, request: HttpRequest) -> HttpConnectorFuture {
        let request = match request.try_into_http1x() {
            Ok(request) => request,
            Err(error) => return HttpConnectorFuture::ready(Err(ConnectorError::user(error.into()))),
        };
        let answer = self.0.request(request);
        HttpConnectorFuture::new(async move {
            let answer = answer.await.map_err(|error| ConnectorError::io(error.into()))?;
            HttpResponse::try_from(answer.map(SdkBody::from_body_1_x))
                .map_err(|error| ConnectorError::other(error.into(), None))
        })
    }
}

/// A certificate check for `insecure = true`, which accepts every server certificate. It still checks the signatures of
/// the handshake.
#[derive(Debug)]
struct AcceptAnyCertificate(Arc<rustls::crypto::CryptoProvider>);

impl ServerCertVerifier for AcceptAnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proxys_user_is_told_as_go_tells_it() {
        for (proxy, uri, expected) in [
            ("http://proxy:3128", "http://proxy:3128/", None),
            ("http://anna@proxy:3128", "http://proxy:3128/", Some("anna:")),
            ("https://anna:p%40ss@proxy", "https://proxy/", Some("anna:p@ss")),
        ] {
            let through = through(proxy).unwrap();
            let expected = expected.map(|user| format!("Basic {}", aws_smithy_types::base64::encode(user)));
            assert_eq!(through.uri().to_string(), uri);
            assert_eq!(through.basic_auth().map(|header| header.to_str().unwrap().to_owned()), expected, "{proxy}");
        }
    }
}
