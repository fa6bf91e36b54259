//! Decides whether the holder of a lock is alive. [`host`] collects what this host shows about the holder, and
//! [`evidence`] decides what these facts prove.
//!
//! Only the journal of this host, including its pending requests, proves anything. A lease that was renewed in time
//! counts as a proof too: its holder works by it. So does the answer of a witness ([`witness`]) about a holder whose
//! identity travelled with the lock. Everything else only makes a verdict likely, and a person must decide: a lock's
//! `Who` consists of a user name and a host name, and two machines may have the same user name and the same host name.
//!
//! [`facts`] collects what a run with a lease says about itself to other hosts, and [`ci_job`] its CI job.

pub(crate) mod ci_job;
pub(crate) mod evidence;
pub(crate) mod facts;
pub(crate) mod host;
pub(crate) mod lease_text;
pub(crate) mod next_step;
pub(crate) mod witness;
