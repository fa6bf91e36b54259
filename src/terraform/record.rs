//! One record of Terraform's core log, as hclog writes it (go-hclog, intlogger.go).
//!
//! ```text
//! 2026-11-23T01:46:07.593Z [INFO]  backend-s3: Locked remote state (DynamoDB only): tf_backend.lock.id=5e75... x="a b"
//!   | a value with a newline in it goes on like this
//! ```
//!
//! Everything in it may be a stranger's text: core logs diagnostics raw, and an API error with a newline can put a
//! perfect record at the beginning of a line. So this only reads; what a record is worth is decided in `lock::proof`.

use jiff::Timestamp;

/// The key of the state that a record of the S3 backend is about.
pub(crate) const KEY: &str = "tf_backend.s3.path";

/// A record: one line, and the indented lines with the values that have a newline in them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LogRecord<'a> {
    /// When, to the millisecond, by the clock of this host.
    pub(crate) time: Timestamp,
    /// `backend-s3` in the example; empty where there is none.
    pub(crate) module: &'a str,
    /// `Locked remote state (DynamoDB only)` in the example.
    pub(crate) message: &'a str,
    fields: &'a str,
}

impl<'a> LogRecord<'a> {
    /// Reads a record: its first line, or that with the lines that go on with it. `None` for what is not one: a
    /// continuation, a torn line, a foreign line.
    pub(crate) fn parse(text: &'a str) -> Option<Self> {
        let (time, rest) = text.split_once(' ')?;
        let time = parse_time(time)?;
        let (level, rest) = rest.strip_prefix('[')?.split_once(']')?;
        if !matches!(level, "TRACE" | "DEBUG" | "INFO" | "WARN" | "ERROR") {
            return None;
        }
        let rest = rest.trim_start_matches(' ');
        // A module has no spaces; a message without a module begins with words.
        let (module, rest) = match rest.split_once(": ") {
            Some((module, rest)) if !module.contains(' ') => (module, rest),
            _ => ("", rest),
        };
        let separator = |at: &usize| rest[at + 1..].starts_with([' ', '\n']);
        let end = rest.match_indices(':').map(|(at, _)| at).find(separator);
        let (message, fields) = end.map_or((rest, ""), |at| (&rest[..at], &rest[at + 2..]));
        Some(Self { time, module, message, fields })
    }

    /// What stands behind the message.
    pub(crate) fn rest(&self) -> &'a str {
        self.fields
    }

    /// Whether it is a record of the S3 backend's about a state whose key has a newline in it: further lines belong to it.
    /// The key is the last field of each such record (backend/remote-state/s3/client.go, `logger`; fields are sorted).
    pub(crate) fn goes_on(&self) -> bool {
        self.module == "backend-s3" && self.fields.starts_with("tf_backend.") && self.field(KEY).is_none()
    }

    /// The value of field `name`, if the record has exactly one such field.
    pub(crate) fn field(&self, name: &str) -> Option<String> {
        let mut found = None;
        for (key, value) in Fields(self.fields) {
            if key == name && found.replace(value).is_some() {
                return None;
            }
        }
        found
    }
}

/// The `key=value` pairs of a record (go-hclog, intlogger.go, `logPlain`). A value with anything but the characters from `-`
/// to `~` is quoted; one with a newline stands on lines of its own, each behind `  | `.
struct Fields<'a>(&'a str);

/// What each line of a value with a newline begins with.
const INDENT: &str = "  | ";

impl<'a> Iterator for Fields<'a> {
    type Item = (&'a str, String);

    fn next(&mut self) -> Option<Self::Item> {
        let text = self.0.trim_start_matches([' ', '\n']);
        let (key, rest) = text.split_once('=')?;
        if key.contains([' ', '\n']) {
            self.0 = "";
            return None;
        }
        if let Some(lines) = rest.strip_prefix('\n') {
            let (value, rest) = indented(lines);
            self.0 = rest;
            return Some((key, value));
        }
        if let Some(quoted) = rest.strip_prefix('"') {
            let end = end_of_quoted(quoted)?;
            self.0 = &quoted[end + 1..];
            return Some((key, unescape(&quoted[..end], true)));
        }
        let end = rest.find([' ', '\n']).unwrap_or(rest.len());
        self.0 = &rest[end..];
        Some((key, rest[..end].to_owned()))
    }
}

/// Reads the lines of a value, and gives what stands behind them. A newline at the very end of the value cannot be seen if
/// there is another one.
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

/// Where the quote is that closes a value. A backslash is not escaped, so a value may end with one: then its closing quote
/// looks like an escaped one, and only what stands behind it tells the two apart.
fn end_of_quoted(text: &str) -> Option<usize> {
    let closing: Vec<usize> =
        text.match_indices('"').map(|(at, _)| at).filter(|&at| is_between_fields(&text[at + 1..])).collect();
    let escaped = |at: usize| text[..at].ends_with('\\');
    closing.iter().copied().find(|&at| !escaped(at)).or_else(|| closing.first().copied())
}

/// Whether a field can end in front of `text`: it is the end of the record, or another field begins.
fn is_between_fields(text: &str) -> bool {
    let Some(rest) = text.strip_prefix([' ', '\n']) else { return text.is_empty() };
    let name = rest.trim_start_matches(' ');
    let end = name.find(|character: char| !character.is_ascii_alphanumeric() && !"_.-@".contains(character));
    end.is_some_and(|end| end > 0 && name[end..].starts_with('='))
}

/// Undoes hclog's `writeEscapedForOutput`, which escapes what is not printable, and quotes within quotes, but no backslash:
/// one that begins no such escape is itself. A text with a backslash of its own in front of what looks like an escape is
/// read as another one than it was; the lock that has it is then found nowhere, and named.
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

/// The character that is escaped so, and how many bytes behind the backslash say it.
fn escape(text: &str, quoted: bool) -> Option<(char, usize)> {
    let hexadecimal = |digits: usize| {
        let text =
            text.get(1..=digits).filter(|text| text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')))?;
        let character = char::from_u32(u32::from_str_radix(text, 16).ok()?)?;
        // What is printable is never escaped.
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

/// hclog's time: `2006-01-02T15:04:05.000Z0700`, so the offset is `Z` or `+0200`.
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

    /// What terraform 1.11.4 writes for a state's key, in `tf_backend.s3.path`, with the field before it.
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
            // Where a backslash hides the closing quote the next one closes, and nothing agrees with what is read.
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
