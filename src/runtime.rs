//! Runs work that sends requests to AWS, in a process that has one thread.

use std::io;

use tokio::runtime::{Builder, Runtime};

/// Runs `work` on a new tokio runtime with one thread, and returns its result.
///
/// # Errors
/// If the runtime cannot be created, for example because no file descriptor is available.
pub(crate) fn block_on<T>(work: impl Future<Output = T>) -> io::Result<T> {
    let runtime = ShutDown(Some(Builder::new_current_thread().enable_all().build()?));
    let ShutDown(Some(running)) = &runtime else { return Err(io::ErrorKind::Other.into()) };
    Ok(running.block_on(work))
}

/// A runtime whose threads are not waited for when it is dropped, also after a panic: a name lookup may hang in one of
/// them.
struct ShutDown(Option<Runtime>);

impl Drop for ShutDown {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::{Duration, Instant};

    use super::*;
    use crate::panics;

    #[test]
    fn a_thread_that_hangs_is_not_waited_for_even_after_a_panic() {
        for panics in [false, true] {
            let (end, ended) = mpsc::channel::<()>();
            let work = async move {
                drop(tokio::task::spawn_blocking(move || ended.recv_timeout(Duration::from_mins(1))));
                assert!(!panics, "on purpose");
                7
            };
            let begun = Instant::now();
            let done = panics::caught(|| block_on(work));
            assert_eq!(done.map(Result::unwrap), (!panics).then_some(7));
            assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
            drop(end);
        }
    }
}
