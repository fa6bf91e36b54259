//! Standard error and standard output, and text that is fit for them.
//!
//! A stderr that is closed, hung up or full must neither stop a release nor end the program, so nothing here can fail
//! or wait for long, and `println!` and `eprintln!`, which panic, are forbidden everywhere (clippy.toml).

use std::fmt::Write as _;
use std::io::IsTerminal;
use std::os::fd::AsFd;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::sys::entry::closed_standard_descriptors;
use crate::sys::locale;

/// How long a full stderr is waited for, in milliseconds: a pager that was left alone must not hold us for ever.
const WRITE_TIMEOUT_MS: u16 = 2000;

/// Writes `text` to stderr, each line with `tf: ` before it, in bold where stderr is a terminal and NO_COLOR is not set
/// (no-color.org).
pub(crate) fn say(text: &str) {
    let stderr = std::io::stderr();
    let colour = stderr.is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let mut message = String::new();
    for line in text.lines() {
        let prefix = if colour { "\u{1b}[1mtf:\u{1b}[0m" } else { "tf:" };
        let _ = writeln!(message, "{prefix} {line}");
    }
    let mut unsaid = UNSAID.lock().unwrap_or_else(PoisonError::into_inner);
    unsaid.push_str(&message);
    write_to(&stderr, &mut unsaid, WRITE_TIMEOUT_MS);
}

/// What a full stderr did not take yet.
static UNSAID: Mutex<String> = Mutex::new(String::new());

/// Tries to write what stderr did not take before, without waiting. Whether nothing is left of it.
pub(crate) fn say_the_rest() -> bool {
    let mut unsaid = UNSAID.lock().unwrap_or_else(PoisonError::into_inner);
    write_to(&std::io::stderr(), &mut unsaid, 0);
    unsaid.is_empty()
}

/// Writes `text` for as long as the reader takes something within `wait` milliseconds, and leaves what it does not take. What
/// nobody can read is thrown away.
fn write_to(stderr: &std::io::Stderr, text: &mut String, wait: u16) {
    while !text.is_empty() {
        let mut ready = [PollFd::new(stderr.as_fd(), PollFlags::POLLOUT)];
        if poll(&mut ready, PollTimeout::from(wait)) != Ok(1) {
            return;
        }
        // What poll(2) calls writable takes at least PIPE_BUF bytes at once.
        let piece = text.floor_char_boundary(512);
        match nix::unistd::write(stderr, &text.as_bytes()[..piece]) {
            Ok(length) if text.is_char_boundary(length) && length > 0 => drop(text.drain(..length)),
            _ => text.clear(),
        }
    }
}

/// Writes `text` and a new line to stdout: the result of a command of ours. What cannot be written is told by
/// [`print_failure`].
pub(crate) fn print(text: &str) {
    use std::io::Write as _;
    let write = || {
        stdout_is_open()?;
        let mut stdout = std::io::stdout().lock();
        stdout.write_all(format!("{}\n", text.trim_end()).as_bytes())?;
        stdout.flush()
    };
    if let Err(error) = write() {
        UNPRINTED.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error.kind());
    }
}

/// Whether there was a stdout when this process started: where it was closed, the runtime has opened /dev/null in its place.
///
/// # Errors
/// When there was none.
pub(crate) fn stdout_is_open() -> std::io::Result<()> {
    if closed_standard_descriptors().any(|descriptor| descriptor == 1) {
        return Err(std::io::ErrorKind::NotConnected.into());
    }
    Ok(())
}

/// What is said of a result that nobody can read.
pub(crate) const STDOUT_CLOSED: &str = "stdout is closed: the result was not written";

/// Why something could not be written to stdout.
static UNPRINTED: Mutex<Option<std::io::ErrorKind>> = Mutex::new(None);

/// Why something that was to be printed was not: stdout was closed when this process started ([`NotConnected`]), its reader
/// has exited, or its disk is full. `None` if everything was printed.
///
/// [`NotConnected`]: std::io::ErrorKind::NotConnected
pub(crate) fn print_failure() -> Option<std::io::ErrorKind> {
    *UNPRINTED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What stands in place of what was cut from a text, as this locale can show it.
pub(crate) fn ellipsis() -> &'static str {
    if locale::is_utf8() { "…" } else { "..." }
}

/// A stranger's text, fit for a terminal: control, escape and direction characters made visible, and in a locale without
/// Unicode everything that is not ASCII; and cut.
pub(crate) fn visible(text: &str) -> String {
    const MAX_SHOWN_CHARACTERS: usize = 200;
    match text.char_indices().nth(MAX_SHOWN_CHARACTERS) {
        Some((end, _)) => visible_whole(&text[..end]) + ellipsis(),
        None => visible_whole(text),
    }
}

/// The same, whole: for what is to be typed.
pub(crate) fn visible_whole(text: &str) -> String {
    let ascii_only = !locale::is_utf8();
    let mut shown = String::new();
    for character in text.chars() {
        let changes_direction = matches!(character, '\u{200e}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{61c}');
        if character.is_control() || changes_direction || (ascii_only && !character.is_ascii()) {
            let _ = write!(shown, "{}", character.escape_unicode());
        } else {
            shown.push(character);
        }
    }
    shown
}

/// An option of `tf locks` with its value, behind a space: a value that begins with a dash is none for whoever reads it, unless
/// it is part of the same word.
pub(crate) fn option(name: &str, value: &str) -> String {
    format!(" {name}{}{}", if value.starts_with('-') { '=' } else { ' ' }, quoted(value))
}

/// A stranger's text as the last word of a command: what is shown of it, in quotes where a shell wants them, and never taken
/// for an option.
pub(crate) fn argument(text: &str) -> String {
    let shown = visible_whole(text);
    let word = quoted(&shown);
    if shown.starts_with('-') { format!("-- {word}") } else { word }
}

/// A word that a shell takes as it is.
pub(crate) fn quoted(word: &str) -> String {
    let plain = |character: char| character.is_ascii_alphanumeric() || "-_./=:@%+,".contains(character);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

/// A length of time, in the largest units that matter.
pub(crate) fn length_of_time(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, seconds) => format!("{seconds} s"),
        (0, minutes, seconds) => format!("{minutes} min {seconds} s"),
        (hours @ 0..48, minutes, _) => format!("{hours} h {minutes} min"),
        (hours, ..) => format!("{} d {} h", hours / 24, hours % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_strangers_text_cannot_reach_the_terminal() {
        for text in ["\u{1b}]0;title\u{7}", "a\nb", "\u{202e}evil", "\r", "\u{9b}31m", "\u{2067}x"] {
            let shown = visible(text);
            assert!(shown.chars().all(|character| character.is_ascii_graphic() || character == ' '), "{shown:?}");
        }
        assert!(visible(&"x".repeat(300_000)).chars().count() <= 203);
    }

    #[test]
    fn a_length_of_time_reads_well() {
        for (seconds, expected) in
            [(0, "0 s"), (59, "59 s"), (75, "1 min 15 s"), (3600 * 2 + 60, "2 h 1 min"), (3600 * 50, "2 d 2 h")]
        {
            assert_eq!(length_of_time(Duration::from_secs(seconds)), expected);
        }
    }

    #[test]
    fn a_word_for_the_shell_stays_one_word() {
        assert_eq!(quoted("envs/prod"), "envs/prod");
        assert_eq!(quoted("my dir"), "'my dir'");
        assert_eq!(quoted("it's $HOME"), r"'it'\''s $HOME'");
        assert_eq!(quoted(""), "''");
    }
}
