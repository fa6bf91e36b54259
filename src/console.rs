//! Writes to stderr and stdout, and makes text safe for a terminal.
//!
//! A stderr that is closed, hung up or full must neither stop a release nor end the program. So no function here fails
//! or waits for long. `println!` and `eprintln!` can panic, so they are forbidden everywhere (clippy.toml).

use std::borrow::Cow;
use std::fmt::Write as _;
use std::io::IsTerminal;
use std::os::fd::AsFd;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::sys::entry::closed_standard_descriptors;
use crate::sys::locale;

/// The maximum time to wait for a full stderr, in milliseconds. A pager that does not read must not block `tf` for
/// ever.
const WRITE_TIMEOUT_MS: u16 = 2000;

/// Writes `text` to stderr, with `tf: ` before each line. `tf:` is bold if stderr is a terminal and NO_COLOR is unset
/// or empty (no-color.org). A message can contain text of anyone, for example of a lock service, so each line is
/// escaped as by [`visible_whole`].
pub(crate) fn say(text: &str) {
    if let Some(send) = DIVERSION.get() {
        return send(text);
    }
    let stderr = std::io::stderr();
    let colour = stderr.is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let message = message(text, if colour { "\u{1b}[1mtf:\u{1b}[0m" } else { "tf:" });
    let mut unsaid = UNSAID.lock().unwrap_or_else(PoisonError::into_inner);
    unsaid.push_str(&message);
    write_to(&stderr, &mut unsaid, WRITE_TIMEOUT_MS);
}

/// From now on, [`say`] calls `send` in this process, and does not write to stderr. For a forked process whose stderr
/// is not that of its parent. A second call has no effect.
pub(crate) fn divert(send: impl Fn(&str) + Send + Sync + 'static) {
    let _ = DIVERSION.set(Box::new(send));
}

/// What [`say`] calls with each text. Empty unless [`divert`] was called.
static DIVERSION: OnceLock<Box<SendText>> = OnceLock::new();

/// A function that sends one text.
type SendText = dyn Fn(&str) + Send + Sync;

/// Returns the lines of `text`, escaped, with `prefix` and a space before each.
fn message(text: &str, prefix: &str) -> String {
    text.lines().fold(String::new(), |message, line| message + prefix + " " + &visible_whole(line) + "\n")
}

/// The text that a full stderr has not accepted yet.
static UNSAID: Mutex<String> = Mutex::new(String::new());

/// Tries to write the text that stderr has not accepted yet, without waiting. Returns true if no text is left: stderr
/// has accepted all of it, or a write has failed and the text was discarded. Returns false if stderr is still full.
pub(crate) fn say_the_rest() -> bool {
    let mut unsaid = UNSAID.lock().unwrap_or_else(PoisonError::into_inner);
    write_to(&std::io::stderr(), &mut unsaid, 0);
    unsaid.is_empty()
}

/// Writes `text` to stderr, and removes what was written from `text`. Stops if stderr is not writable for `wait`
/// milliseconds. If a write fails, `text` is discarded, because nobody can read stderr any more.
fn write_to(stderr: &std::io::Stderr, text: &mut String, wait: u16) {
    while !text.is_empty() {
        let mut ready = [PollFd::new(stderr.as_fd(), PollFlags::POLLOUT)];
        if poll(&mut ready, PollTimeout::from(wait)) != Ok(1) {
            return;
        }
        // If poll(2) reports a descriptor as writable, a write of PIPE_BUF bytes does not wait. POSIX requires that
        // PIPE_BUF is 512 or more.
        let piece = text.floor_char_boundary(512);
        match nix::unistd::write(stderr, &text.as_bytes()[..piece]) {
            Ok(length) if text.is_char_boundary(length) && length > 0 => drop(text.drain(..length)),
            _ => text.clear(),
        }
    }
}

/// Writes `text`, which a person reads, to stdout, as [`print_for_program`] does. Each line is escaped as by
/// [`visible_whole`].
pub(crate) fn print(text: &str) {
    print_for_program(&text.lines().map(visible_whole).collect::<Vec<_>>().join("\n"));
}

/// Writes `text`, without its trailing whitespace, and a newline to stdout. `text` is the result of a command of `tf`
/// itself, in a format that a program reads. If this is the first write that fails, [`print_failure`] returns the
/// reason.
pub(crate) fn print_for_program(text: &str) {
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

/// Checks that stdout was open at the start of this process. If it was closed, Rust's runtime has opened /dev/null
/// instead.
///
/// # Errors
/// `NotConnected` if stdout was closed.
pub(crate) fn stdout_is_open() -> std::io::Result<()> {
    if closed_standard_descriptors().any(|descriptor| descriptor == 1) {
        return Err(std::io::ErrorKind::NotConnected.into());
    }
    Ok(())
}

/// The message about a result that was not written because stdout is closed.
pub(crate) const STDOUT_CLOSED: &str = "could not write the result: stdout is closed";

/// The reason for the first failed write to stdout. `None` if no write has failed.
static UNPRINTED: Mutex<Option<std::io::ErrorKind>> = Mutex::new(None);

/// Returns the reason for the first failed write to stdout: stdout was closed at the start of this process
/// ([`NotConnected`]), its reader has exited, or its disk is full. `None` if no write has failed.
///
/// [`NotConnected`]: std::io::ErrorKind::NotConnected
pub(crate) fn print_failure() -> Option<std::io::ErrorKind> {
    *UNPRINTED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns the sign that marks truncated text, in characters that this locale can show.
pub(crate) fn ellipsis() -> &'static str {
    if locale::is_utf8() { "…" } else { "..." }
}

/// Truncates untrusted text to 200 characters and makes it safe for a terminal. Control, escape and bidi characters are
/// escaped. In a locale without UTF-8, all characters that are not ASCII are escaped too.
pub(crate) fn visible(text: &str) -> String {
    visible_in_place(text).into_owned()
}

/// Does the same as [`visible`], but makes no copy of a text that needs no change. Almost every text needs none.
pub(crate) fn visible_in_place(text: &str) -> Cow<'_, str> {
    const MAX_SHOWN_CHARACTERS: usize = 200;
    if text.len() <= MAX_SHOWN_CHARACTERS && is_plain(text) {
        return Cow::Borrowed(text);
    }
    Cow::Owned(match text.char_indices().nth(MAX_SHOWN_CHARACTERS) {
        Some((end, _)) => visible_whole(&text[..end]) + ellipsis(),
        None => visible_whole(text),
    })
}

/// Whether each character of `text` is a printable ASCII character. Then a terminal shows the text as it is, and one
/// column for each byte.
pub(crate) fn is_plain(text: &str) -> bool {
    // The whole text is looked at, because such a loop is several times as fast as a search.
    text.bytes().fold(true, |plain, byte| plain & matches!(byte, b' '..=b'~'))
}

/// Makes untrusted text safe for a terminal as [`visible`] does, but does not truncate it, because a person must be
/// able to type the whole text.
pub(crate) fn visible_whole(text: &str) -> String {
    if is_plain(text) {
        return text.to_owned();
    }
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

/// Returns the text that [`visible_whole`] shows as `shown`. `None` if `shown` has no escaped character.
pub(crate) fn shown_as(shown: &str) -> Option<String> {
    let mut parts = shown.split("\\u{");
    let mut text = parts.next()?.to_owned();
    let mut is_escaped = false;
    for part in parts {
        let escaped = part
            .split_once('}')
            .and_then(|(digits, rest)| Some((u32::from_str_radix(digits, 16).ok().and_then(char::from_u32)?, rest)));
        is_escaped |= escaped.is_some();
        match escaped {
            Some((character, rest)) => text.extend([&*character.to_string(), rest]),
            None => text.extend(["\\u{", part]),
        }
    }
    is_escaped.then_some(text)
}

/// Formats an option of `tf locks` and its value, with a space before them. A value that begins with a dash is joined
/// with `=`, because as a separate word it would be parsed as an option.
pub(crate) fn option(name: &str, value: &str) -> String {
    format!(" {name}{}{}", if value.starts_with('-') { '=' } else { ' ' }, quoted(value))
}

/// Formats untrusted text as the last word of a command. The text is escaped as by [`visible_whole`], quoted if a shell
/// requires it, and preceded by `--` if it would be parsed as an option.
pub(crate) fn argument(text: &str) -> String {
    let shown = visible_whole(text);
    let word = quoted(&shown);
    if shown.starts_with('-') { format!("-- {word}") } else { word }
}

/// Quotes a word if a shell would not take it literally.
pub(crate) fn quoted(word: &str) -> String {
    let plain = |character: char| character.is_ascii_alphanumeric() || "-_./=:@%+,".contains(character);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

/// Formats a duration with one or two units, from days to seconds.
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
    fn a_text_is_found_by_what_is_shown_of_it() {
        for text in ["a\nb", "\u{1b}[2J", "caf\u{e9}\u{202e}\\u{", "\u{0}'\"\\"] {
            assert_eq!(shown_as(&visible_whole(text)).as_deref(), Some(text), "{text:?}");
        }
        for text in ["", "bucket/dir/prod.tfstate", "\\u{", "\\u{}", "\\u{zz}", "\\u{d800}", "\\u{110000}"] {
            assert_eq!(shown_as(text), None, "{text}");
        }
    }

    #[test]
    fn a_strangers_text_cannot_reach_the_terminal() {
        for text in ["\u{1b}]0;title\u{7}", "a\nb", "\u{202e}evil", "\r", "\u{9b}31m", "\u{2067}x"] {
            let shown = visible(text);
            assert!(shown.chars().all(|character| character.is_ascii_graphic() || character == ' '), "{shown:?}");
        }
        assert!(visible(&"x".repeat(300_000)).chars().count() <= 203);
    }

    #[test]
    fn a_message_with_a_strangers_text_changes_nothing_but_the_lines() {
        assert_eq!(message("a\nb 'c' \\d\n", "tf:"), "tf: a\ntf: b 'c' \\d\n");
        assert_eq!(
            message("x\u{1b}]0;title\u{7}\r\ny\u{9b}31m", "tf:"),
            "tf: x\\u{1b}]0;title\\u{7}\ntf: y\\u{9b}31m\n"
        );
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

    #[test]
    fn no_text_reaches_the_terminal_as_more_than_text() {
        use proptest::prelude::*;
        let strategy = crate::generated_input::changed_text("a\u{1b}[2J\u{202e}b\r\n\u{7f}c\u{9b}31m");
        crate::generated_input::for_all(file!(), &strategy, |text| {
            for shown in [visible(&text), visible_whole(&text)] {
                let is_active = |one: char| one.is_control() || ('\u{202a}'..='\u{202e}').contains(&one);
                let active = shown.chars().find(|one| is_active(*one));
                prop_assert_eq!(active, None);
            }
            prop_assert!(visible(&text).chars().count() <= 200 * 10 + 3);
            Ok(())
        });
    }
}
