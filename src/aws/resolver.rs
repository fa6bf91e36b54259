//! Looks up the addresses of hosts.

use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::pin::Pin;
use std::task::{Context, Poll};

use aws_smithy_runtime_api::client::dns::{DnsFuture, ResolveDns, ResolveDnsError};
use hyper_util::client::legacy::connect::dns::Name;
use tokio::task;
use tower_service::Service;

use crate::aws::ask_system;
use crate::sys::frameworks;

/// Returns the addresses of `host` (getaddrinfo(3)), with the port 0.
pub(crate) fn look_up(host: &str) -> io::Result<Vec<SocketAddr>> {
    Ok((host, 0).to_socket_addrs()?.collect())
}

/// Looks up the addresses of hosts. A process that must not do that itself asks another `tf`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Resolver;

impl Resolver {
    async fn addresses(host: String) -> io::Result<Vec<SocketAddr>> {
        let looked_up = task::spawn_blocking(move || {
            if frameworks::are_allowed() {
                return look_up(&host);
            }
            let answer = ask_system::ask(&[ask_system::ADDRESSES, &host])?;
            let addresses = answer.lines().filter_map(|line| line.parse::<IpAddr>().ok());
            Ok(addresses.map(|address| SocketAddr::new(address, 0)).collect())
        });
        looked_up.await.map_err(io::Error::other)?
    }
}

impl ResolveDns for Resolver {
    fn resolve_dns<'a>(&'a self, name: &'a str) -> DnsFuture<'a> {
        let addresses = Self::addresses(name.to_owned());
        DnsFuture::new(async {
            let addresses = addresses.await.map_err(ResolveDnsError::new)?;
            Ok(addresses.iter().map(SocketAddr::ip).collect())
        })
    }
}

impl Service<Name> for Resolver {
    type Response = std::vec::IntoIter<SocketAddr>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, name: Name) -> Self::Future {
        let addresses = Self::addresses(name.as_str().to_owned());
        Box::pin(async {
            // The caller sets the port.
            Ok(addresses.await?.into_iter())
        })
    }
}
