//! Asks the metadata service of this host's cloud whether the host is about to end. [`service`] says where that service
//! is, [`answer`] says what its answers mean, and [`requests`] sends the requests.

pub(crate) mod answer;
pub(crate) mod requests;
pub(crate) mod service;
