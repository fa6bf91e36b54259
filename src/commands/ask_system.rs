//! The internal command `tf locks ask-system`: asks the system for what another `tf` must not ask it itself
//! ([`crate::aws::ask_system`]).

use std::ffi::OsString;

use nix::sys::signal::{SigSet, Signal};

use crate::aws::ask_system::{ADDRESSES, AUTHORITIES, written};
use crate::aws::{authorities, resolver};
use crate::console;
use crate::sys::{disposition, frameworks};

/// After this time, in seconds, this process kills itself: nobody waits for its answer any more.
const TIMEOUT: u32 = 20;

/// Answers the question in `words` on stdout. A question that is not known has no answer.
pub(super) fn answer(words: &[OsString]) {
    frameworks::allow();
    // This process has inherited a signal mask that blocks every signal.
    disposition::set_default(Signal::SIGALRM);
    let _ = SigSet::from(Signal::SIGALRM).thread_unblock();
    nix::unistd::alarm::set(TIMEOUT);
    let words: Vec<&str> = words.iter().filter_map(|word| word.to_str()).collect();
    let answer = match words[..] {
        [AUTHORITIES] => authorities::load(),
        [ADDRESSES, host] => match resolver::look_up(host) {
            Ok(addresses) => Ok(addresses.iter().fold(String::new(), |lines, at| lines + &at.ip().to_string() + "\n")),
            Err(error) => Err(error.to_string()),
        },
        _ => return,
    };
    console::print_for_program(&written(answer));
}
