//! Asking the person at the terminal.

use crate::console;
use std::io::BufRead;

/// Whether the person at the terminal answers `question` with the word yes. Nothing shorter is taken for one.
pub(super) fn is_given(question: &str) -> bool {
    console::say(&format!("{question} Only \"yes\" is taken for one:"));
    let mut answer = String::new();
    let read = std::io::stdin().lock().read_line(&mut answer);
    read.is_ok() && answer.trim() == "yes"
}
