//! Asks the user at the terminal for confirmation.

use std::io::BufRead;

use crate::console;

/// Asks `question` and returns whether the user types the whole word `yes`. Any other answer, such as `y`, counts as
/// no, and so does a read error.
pub(super) fn is_given(question: &str) -> bool {
    console::say(&format!("{question} To confirm, type \"yes\":"));
    let mut answer = String::new();
    let read = std::io::stdin().lock().read_line(&mut answer);
    read.is_ok() && answer.trim() == "yes"
}
