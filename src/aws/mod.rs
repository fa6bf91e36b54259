//! Connects to AWS as terraform does: which settings apply, which credentials and which network to use, and what a
//! failed request means for the caller.

pub(crate) mod ask_system;
pub(crate) mod attributes;
pub(crate) mod authorities;
pub(crate) mod causes;
pub(crate) mod connect;
pub(crate) mod credentials;
pub(crate) mod failure;
pub(crate) mod identity;
pub(crate) mod network;
pub(crate) mod proxies;
pub(crate) mod redacted_backend;
pub(crate) mod resolver;
pub(crate) mod settings;
