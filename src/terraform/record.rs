//! One record of Terraform's core log, as hclog writes it (go-hclog, intlogger.go).
//!
//! ```text
//! 2026-11-23T01:46:07.593Z [INFO]  backend-s3: Locked remote state (DynamoDB only): tf_backend.lock.id=5e75... x="a b"
//!   | a value with a newline in it goes on like this
//! ```
//!
//! Any text in a record may come from outside terraform: the core log contains diagnostics unchanged, and an API error
//! with a newline in it can put a well-formed record at the beginning of a line. So this module only parses.
//! `lock::proof` decides whether to trust a record.

use jiff::Timestamp;

/// The name of the field that contains the key of the state, in records of the S3 backend.
pub(crate) const KEY: &str = "tf_backend.s3.path";

/// A record: one line, and the indented lines of each value that contains a newline.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LogRecord<'a> {
    /// The time of the record, with milliseconds, by the clock of this host.
    pub(crate) time: Timestamp,
    /// The module: `backend-s3` in the example. Empty if the record has none.
    pub(crate) module: &'a str,
    /// The message: `Locked remote state (DynamoDB only)` in the example.
    pub(crate) message: &'a str,
    fields: &'a str,
}

impl<'a> LogRecord<'a> {
    /// Parses a record: its first line, alone or together with the lines that continue it. `None` if the text is not a
    /// record, for example a line that continues one, a truncated line or a line in another format.
    pub(crate) fn parse(text: &'a str) -> Option<Self> {
        let (time, rest) = text.split_once(' ')?;
        let time = parse_time(time)?;
        let (level, rest) = rest.strip_prefix('[')?.split_once(']')?;
        if !matches!(level, "TRACE" | "DEBUG" | "INFO" | "WARN" | "ERROR") {
            return None;
        }
        let rest = rest.trim_start_matches(' ');
        // The name of a module contains no space. Without a module, the text begins with the words of the message.
        let (module, rest) = match rest.split_once(": ") {
            Some((module, rest)) if !module.contains(' ') => (module, rest),
            _ => ("", rest),
        };
        let separator = |at: &usize| rest[at + 1..].starts_with([' ', '\n']);
        let end = rest.match_indices(':').map(|(at, _)| at).find(separator);
        let (message, fields) = end.map_or((rest, ""), |at| (&rest[..at], &rest[at + 2..]));
        Some(Self { time, module, message, fields })
    }

    /// Returns the text after the message.
    pub(crate) fn rest(&self) -> &'a str {
        self.fields
    }

    /// Whether further lines belong to this record of the S3 backend, because the key of the state contains a newline.
    /// The key is the last field of every such record, because fields are sorted (backend/remote-state/s3/client.go,
    /// `logger`).
    pub(crate) fn goes_on(&self) -> bool {
        self.module == "backend-s3" && self.fields.starts_with("tf_backend.") && self.field(KEY).is_none()
    }

    /// Returns the value of the field `name`. `None` if the record has no such field, or more than one.
    pub(crate) fn field(&self, name: &str) -> Option<String> {
        let mut found = None;
        for (key, value) in (Fields { rest: self.fields, only_escaped: false }) {
            if key == name && found.replace(value).is_some() {
                return None;
            }
        }
        found
    }
}

/// Iterates over the `key=value` pairs of a record (go-hclog, intlogger.go, `logPlain`). A value is quoted if it
/// contains any character outside the range `-` to `~`. A value with a newline has its own lines, each with the prefix
/// `  | `.
struct Fields<'a> {
    rest: &'a str,
    /// Whether no quote in `rest` is known to close a value for certain. Then no later value is searched to its end for
    /// one, which would take quadratic time.
    only_escaped: bool,
}

/// The prefix of each line of a value that contains a newline.
const INDENT: &str = "  | ";

impl<'a> Iterator for Fields<'a> {
    type Item = (&'a str, String);

    fn next(&mut self) -> Option<Self::Item> {
        let text = self.rest.trim_start_matches([' ', '\n']);
        let (key, rest) = text.split_once('=')?;
        if key.contains([' ', '\n']) {
            self.rest = "";
            return None;
        }
        if let Some(lines) = rest.strip_prefix('\n') {
            let (value, rest) = indented(lines);
            self.rest = rest;
            return Some((key, value));
        }
        if let Some(quoted) = rest.strip_prefix('"') {
            let (end, is_escaped) = end_of_quoted(quoted, self.only_escaped)?;
            self.only_escaped |= is_escaped;
            self.rest = &quoted[end + 1..];
            return Some((key, unescape(&quoted[..end], true)));
        }
        let end = rest.find([' ', '\n']).unwrap_or(rest.len());
        self.rest = &rest[end..];
        Some((key, rest[..end].to_owned()))
    }
}

/// Parses the lines of a value that contains a newline. Returns the value, and the text after it. If the value contains
/// two or more newlines, one at its very end is lost, because the log does not show it.
fn indented(text: &str) -> (String, &str) {
    let mut lines = Vec::new();
    let mut rest = text;
    while let Some(line) = rest.strip_prefix(INDENT) {
        let (line, behind) = line.split_once('\n').unwrap_or((line, ""));
        lines.push(unescape(line, false));
        rest = behind;
    }
    match lines.as_slice() {
        [only] => (format!("{only}\n"), rest),
        lines => (lines.join("\n"), rest),
    }
}

/// Returns the position of the quote that closes a value, and whether a backslash is before it. `None` if no quote
/// closes it. hclog does not escape backslashes. So if a value ends with a backslash, its closing quote looks like an
/// escaped quote, and only the text after the quote shows which of the two it is. With `only_escaped`, no other quote
/// is searched for.
fn end_of_quoted(text: &str, only_escaped: bool) -> Option<(usize, bool)> {
    let mut first_escaped = None;
    for (at, _) in text.match_indices('"').filter(|(at, _)| is_between_fields(&text[at + 1..])) {
        if !text[..at].ends_with('\\') {
            return Some((at, false));
        }
        if only_escaped {
            return Some((at, true));
        }
        first_escaped.get_or_insert(at);
    }
    first_escaped.map(|at| (at, true))
}

/// Whether a value can end directly before `text`: the record ends there, or another field begins there.
fn is_between_fields(text: &str) -> bool {
    let Some(rest) = text.strip_prefix([' ', '\n']) else { return text.is_empty() };
    let name = rest.trim_start_matches(' ');
    let end = name.find(|character: char| !character.is_ascii_alphanumeric() && !"_.-@".contains(character));
    end.is_some_and(|end| end > 0 && name[end..].starts_with('='))
}

/// Reverses hclog's `writeEscapedForOutput`, which escapes unprintable characters, and quotes in quoted values, but not
/// backslashes. So a backslash that does not begin an escape is a backslash of the value. If the value itself contains
/// the text of an escape, the result is wrong: no lock with that text is found, and the lock is reported instead of
/// released.
fn unescape(text: &str, quoted: bool) -> String {
    let mut value = String::new();
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        value.push_str(&rest[..at]);
        let (character, length) = escape(&rest[at + 1..], quoted).unwrap_or(('\\', 0));
        value.push(character);
        rest = &rest[at + 1 + length..];
    }
    value.push_str(rest);
    value
}

/// Decodes one escape. `text` begins after the backslash. Returns the character, and the number of bytes of the escape
/// after the backslash. `None` if `text` does not begin with an escape.
fn escape(text: &str, quoted: bool) -> Option<(char, usize)> {
    let hexadecimal = |digits: usize| {
        let text =
            text.get(1..=digits).filter(|text| text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')))?;
        let character = char::from_u32(u32::from_str_radix(text, 16).ok()?)?;
        // hclog never escapes a printable character.
        (!character.is_ascii_graphic() && character != ' ').then_some((character, digits + 1))
    };
    Some(match text.bytes().next()? {
        b'"' if quoted => ('"', 1),
        b'a' => ('\u{7}', 1),
        b'b' => ('\u{8}', 1),
        b'f' => ('\u{c}', 1),
        b'r' => ('\r', 1),
        b't' => ('\t', 1),
        b'v' => ('\u{b}', 1),
        b'x' => hexadecimal(2)?,
        b'u' => hexadecimal(4)?,
        b'U' => hexadecimal(8)?,
        _ => return None,
    })
}

/// Parses hclog's time format, `2006-01-02T15:04:05.000Z0700`. The offset is `Z` or has the form `+0200`.
fn parse_time(text: &str) -> Option<Timestamp> {
    if text.ends_with('Z') {
        return text.parse().ok();
    }
    let (_, offset) = text.split_at_checked(text.len().checked_sub(5)?)?;
    offset.starts_with(['+', '-']).then(|| Timestamp::strptime("%Y-%m-%dT%H:%M:%S%.f%z", text).ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &str = "2026-11-23T01:46:07.593Z [INFO]  backend-s3: Attempting to lock remote state (S3 Native and DynamoDB)...: tf_backend.lock.id=5e75cb05-d70c-4132-39e0-d2abba1b3077 tf_backend.lock.info=\"\" tf_backend.lock.path=\"a b/c \\\"d\\\" tf_backend.lock.id=x\" tf_backend.req_id=r";

    #[test]
    fn a_record_is_read_by_its_fields() {
        let record = LogRecord::parse(LINE).unwrap();
        assert_eq!(record.module, "backend-s3");
        assert_eq!(record.message, "Attempting to lock remote state (S3 Native and DynamoDB)...");
        assert_eq!(record.field("tf_backend.lock.id").unwrap(), "5e75cb05-d70c-4132-39e0-d2abba1b3077");
        assert_eq!(record.field("tf_backend.lock.info").unwrap(), "");
        assert_eq!(record.field("tf_backend.lock.path").unwrap(), "a b/c \"d\" tf_backend.lock.id=x");
        assert_eq!(record.field("tf_backend.req_id").unwrap(), "r");
        assert_eq!(record.field("id"), None);
    }

    /// If each value were searched to the end of the record for a better quote, this would take minutes.
    #[test]
    fn a_record_of_thousands_of_values_is_read_at_once() {
        for value in ["\"x\\\"", "\"x\"", "\"\\\""] {
            let fields: String = (0..8000).fold(String::new(), |text, number| text + &format!(" f{number}={value}"));
            let line = format!("2026-11-23T01:46:07.593Z [INFO]  backend-s3: m:{fields}");
            let record = LogRecord::parse(&line).unwrap();
            let expected = value[1..value.len() - 1].to_owned();
            assert_eq!(record.field("f0"), Some(expected.clone()), "{value}");
            assert_eq!(record.field("f7999"), Some(expected), "{value}");
        }
    }

    #[test]
    fn a_field_that_stands_twice_is_no_field() {
        let line = format!("{LINE} tf_backend.lock.id=11111111-d70c-4132-39e0-d2abba1b3077");
        assert_eq!(LogRecord::parse(&line).unwrap().field("tf_backend.lock.id"), None);
    }

    #[test]
    fn a_time_with_an_offset_is_the_same_moment() {
        let here = LogRecord::parse("2026-11-23T03:46:07.593+0200 [INFO]  backend-s3: m").unwrap();
        let there = LogRecord::parse("2026-11-23T01:46:07.593Z [INFO]  backend-s3: m").unwrap();
        assert_eq!(here.time, there.time);
    }

    #[test]
    fn what_is_not_a_record_is_none() {
        for line in [
            "",
            "  | x",
            "2026-11-23T01:46:07.593Z",
            "2026-11-23T01:46:07.593Z [INFO",
            "hello world",
            "2026-13-45T01:46:07.593Z [INFO]  x",
            "2026-11-23T01:46:07.593Z [LOUD]  x: y",
            "\u{fc}\u{fc}\u{fc} [INFO] x",
        ] {
            assert_eq!(LogRecord::parse(line), None, "{line:?}");
        }
    }

    /// Each text is the field `tf_backend.s3.path` with the separator before it, as terraform 1.11.4 writes it for this
    /// key of a state.
    #[test]
    fn a_key_is_read_as_hclog_writes_it() {
        for (written, key) in [
            (" tf_backend.s3.path=a\\b", "a\\b"),
            (" tf_backend.s3.path=\"a b\"", "a b"),
            (" tf_backend.s3.path=\"a\\\"b\"", "a\"b"),
            (" tf_backend.s3.path=\"a\\\\\"b\"", "a\\\"b"),
            (" tf_backend.s3.path=\"a b\\\"", "a b\\"),
            (" tf_backend.s3.path=\"x\\\"\\\"", "x\"\\"),
            (" tf_backend.s3.path=\"a\\tb\"", "a\tb"),
            (" tf_backend.s3.path=\"a\\rb\"", "a\rb"),
            (" tf_backend.s3.path=\"a\\x01b\"", "a\u{1}b"),
            (" tf_backend.s3.path=\"a\\x00b\"", "a\u{0}b"),
            (" tf_backend.s3.path=\"a\\u007fb\"", "a\u{7f}b"),
            (" tf_backend.s3.path=\"a\\u00a0b\"", "a\u{a0}b"),
            (" tf_backend.s3.path=\"a\\U000e0001b\"", "a\u{e0001}b"),
            (" tf_backend.s3.path=\"\u{e9}/x\"", "\u{e9}/x"),
            (" tf_backend.s3.path=\"a=b c=d\"", "a=b c=d"),
            (" tf_backend.s3.path=\"a tf_backend.lock.id=x\"", "a tf_backend.lock.id=x"),
            (" tf_backend.s3.path=\"a\\u0041 b\"", "a\\u0041 b"),
            ("\n  tf_backend.s3.path=\n  | a\n  | b\n  ", "a\nb"),
            ("\n  tf_backend.s3.path=\n  | a\n  | \n  | b\"\\t\n  ", "a\n\nb\"\t"),
            ("\n  tf_backend.s3.path=\n  | \n  | x\n  ", "\nx"),
            ("\n  tf_backend.s3.path=\n  | a\n  |  \n  ", "a\n "),
            ("\n  tf_backend.s3.path=\n  | a\n  ", "a\n"),
            ("\n  tf_backend.s3.path=\n  | a tf_backend.s3.path=c\n  | b\n  ", "a tf_backend.s3.path=c\nb"),
        ] {
            let path = written.replacen("tf_backend.s3.path", "tf_backend.lock.path", 1);
            let line = format!(
                "2026-11-23T01:46:07.593Z [INFO]  backend-s3: Locking...: tf_backend.lock.id=i{path} \
                 tf_backend.lock.who=\"an na@vm\" tf_backend.s3.bucket=bkt{written}"
            );
            let record = LogRecord::parse(&line).unwrap();
            assert_eq!(record.message, "Locking...");
            let field = |name: &str| record.field(name);
            assert_eq!(field(KEY).as_deref(), Some(key), "{written}");
            assert_eq!(field("tf_backend.lock.id").as_deref(), Some("i"), "{written}");
            // If a value ends with a backslash, its closing quote is taken for an escaped quote, and the value ends at
            // a later quote. The resulting text is not that of any lock.
            if !key.ends_with('\\') {
                assert_eq!(field("tf_backend.lock.path").as_deref(), Some(key), "{written}");
                assert_eq!(field("tf_backend.lock.who").as_deref(), Some("an na@vm"), "{written}");
            }
        }
    }

    #[test]
    fn a_torn_record_never_panics() {
        for end in 0..LINE.len() {
            if let Some(record) = LogRecord::parse(&LINE[..end]) {
                let _ = record.field("tf_backend.lock.path");
            }
        }
    }
}
