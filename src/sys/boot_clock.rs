//! The clock that counts the time since boot, including the time in which the machine was suspended, and a timer of
//! this clock.

use std::time::Duration;

/// Returns the time since boot, including suspend: `CLOCK_BOOTTIME` (clock_gettime(2)), or `CLOCK_MONOTONIC_RAW` on
/// macOS. `CLOCK_MONOTONIC` counts suspend there too, but is wrong for a moment when the time of day is set: it is
/// calculated from two values that are set one after the other (gen/clock_gettime.c of Libc, osfmk/kern/clock.c of
/// xnu).
pub(crate) fn now() -> Duration {
    #[cfg(target_os = "linux")]
    const CLOCK: libc::clockid_t = libc::CLOCK_BOOTTIME;
    #[cfg(not(target_os = "linux"))]
    const CLOCK: libc::clockid_t = libc::CLOCK_MONOTONIC_RAW;
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call writes one timespec. It cannot fail for a clock that the system has.
    unsafe { libc::clock_gettime(CLOCK, &raw mut time) };
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}

#[cfg(target_os = "linux")]
pub(crate) use linux::KillTimer;
#[cfg(not(target_os = "linux"))]
pub(crate) use other::KillTimer;

#[cfg(target_os = "linux")]
mod linux {
    use std::io;
    use std::time::Duration;

    /// A timer of [`now`](super::now) that kills this process with SIGKILL when it expires. The kernel sends the
    /// signal, so the process does not have to run for it: it may be stopped, blocked, or frozen in a cgroup v2. A
    /// forked process does not inherit the timer (timer_create(2)). When this value is dropped, the timer is deleted.
    #[derive(Debug)]
    pub(crate) struct KillTimer(libc::timer_t);

    impl KillTimer {
        /// Creates a timer that is not set.
        ///
        /// # Errors
        /// EAGAIN if this user has no signal left (RLIMIT_SIGPENDING, getrlimit(2)).
        pub(crate) fn new() -> io::Result<Self> {
            // SAFETY: a zeroed sigevent is valid, and the call writes one timer_t.
            unsafe {
                let mut event: libc::sigevent = std::mem::zeroed();
                event.sigev_notify = libc::SIGEV_SIGNAL;
                event.sigev_signo = libc::SIGKILL;
                let mut timer: libc::timer_t = std::ptr::null_mut();
                if libc::timer_create(libc::CLOCK_BOOTTIME, &raw mut event, &raw mut timer) == 0 {
                    Ok(Self(timer))
                } else {
                    Err(io::Error::last_os_error())
                }
            }
        }

        /// Sets the time at which the timer expires, on the clock of [`now`](super::now), in place of an earlier
        /// setting. A time that has passed kills this process at once.
        ///
        /// # Errors
        /// EINVAL if `at` is more than the system's time type can hold.
        pub(crate) fn set(&self, at: Duration) -> io::Result<()> {
            // A time of zero would unset the timer (timer_settime(2)).
            let at = at.max(Duration::from_nanos(1));
            let seconds = at.as_secs().try_into().map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
            // The type of tv_nsec depends on the architecture, and every type can hold a number below 10^9.
            #[allow(clippy::allow_attributes, clippy::unnecessary_fallible_conversions, reason = "see above")]
            let nanoseconds = at.subsec_nanos().try_into().unwrap_or(0);
            let zero = libc::timespec { tv_sec: 0, tv_nsec: 0 };
            let value = libc::timespec { tv_sec: seconds, tv_nsec: nanoseconds };
            let setting = libc::itimerspec { it_interval: zero, it_value: value };
            // SAFETY: the timer exists as long as `self`, and `setting` is complete.
            let set =
                unsafe { libc::timer_settime(self.0, libc::TIMER_ABSTIME, &raw const setting, std::ptr::null_mut()) };
            if set == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
        }
    }

    impl Drop for KillTimer {
        fn drop(&mut self) {
            // SAFETY: the timer exists, and nothing uses it after this.
            unsafe { libc::timer_delete(self.0) };
        }
    }
}

#[cfg(not(target_os = "linux"))]
mod other {
    use std::io;
    use std::time::Duration;

    /// A timer that kills this process. Only Linux has it.
    #[derive(Debug)]
    pub(crate) struct KillTimer(());

    impl KillTimer {
        /// # Errors
        /// Always `Unsupported`.
        pub(crate) fn new() -> io::Result<Self> {
            Err(io::ErrorKind::Unsupported.into())
        }

        /// # Errors
        /// Always `Unsupported`.
        pub(crate) fn set(&self, at: Duration) -> io::Result<()> {
            let (Self(()), _) = (self, at);
            Err(io::ErrorKind::Unsupported.into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_does_not_go_back() {
        let first = now();
        assert!(first > Duration::ZERO && now() >= first);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_timer_can_be_set_again_and_a_dropped_one_kills_nobody() {
        let timer = KillTimer::new().unwrap();
        timer.set(now() + Duration::from_hours(1)).unwrap();
        timer.set(now() + Duration::from_hours(2)).unwrap();
        assert!(timer.set(Duration::MAX).is_err());
    }
}
