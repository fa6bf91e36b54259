//! The lease: a record beside a lock that its holder renews as long as it works. If it is not renewed in time, any host
//! may release the lock. These modules decide; they send no request and start no process.

pub(crate) mod fence;
pub(crate) mod grade;
pub(crate) mod info_field;
pub(crate) mod keeper;
pub(crate) mod notice;
pub(crate) mod observed;
pub(crate) mod obstacle;
pub(crate) mod record;
pub(crate) mod running_time;
pub(crate) mod takeover;
pub(crate) mod terms;
pub(crate) mod watchdog;
