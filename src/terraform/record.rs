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

/// A record: one line, and the indented lines that go on with its values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Record<'a> {
    /// When, to the millisecond, by the clock of this host.
    pub(crate) time: Timestamp,
    /// `backend-s3` in the example; empty where there is none.
    pub(crate) module: &'a str,
    /// `Locked remote state (DynamoDB only)` in the example.
    pub(crate) message: &'a str,
    fields: &'a str,
}

impl<'a> Record<'a> {
    /// Reads the first line of a record. `None` for what is not one: a continuation, a torn line, a foreign line.
    pub(crate) fn parse(line: &'a str) -> Option<Self> {
        let (time, rest) = line.split_once(' ')?;
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
        let (message, fields) = rest.split_once(": ").unwrap_or((rest, ""));
        Some(Self { time, module, message, fields })
    }

    /// What stands behind the message.
    pub(crate) fn rest(&self) -> &'a str {
        self.fields
    }

    /// The value of field `name`, if the record has exactly one such field and its value stands on this line.
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

/// The `key=value` pairs of a record; a value with anything but plain characters is quoted as Go quotes strings.
struct Fields<'a>(&'a str);

impl<'a> Iterator for Fields<'a> {
    type Item = (&'a str, String);

    fn next(&mut self) -> Option<Self::Item> {
        let text = self.0.trim_start_matches(' ');
        let (key, rest) = text.split_once('=')?;
        if key.contains(' ') {
            self.0 = "";
            return None;
        }
        if let Some(quoted) = rest.strip_prefix('"') {
            let (value, rest) = unquote(quoted)?;
            self.0 = rest;
            return Some((key, value));
        }
        let end = rest.find(' ').unwrap_or(rest.len());
        self.0 = &rest[end..];
        Some((key, rest[..end].to_owned()))
    }
}

/// Reads a Go-quoted string behind its opening quote. Escapes that no bucket, key or name needs end the reading.
fn unquote(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut characters = text.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return Some((value, &text[at + 1..])),
            '\\' => match characters.next()?.1 {
                escaped @ ('"' | '\\') => value.push(escaped),
                'n' => value.push('\n'),
                't' => value.push('\t'),
                _ => return None,
            },
            other => value.push(other),
        }
    }
    None
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
        let record = Record::parse(LINE).unwrap();
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
        assert_eq!(Record::parse(&line).unwrap().field("tf_backend.lock.id"), None);
    }

    #[test]
    fn a_time_with_an_offset_is_the_same_moment() {
        let here = Record::parse("2026-11-23T03:46:07.593+0200 [INFO]  backend-s3: m").unwrap();
        let there = Record::parse("2026-11-23T01:46:07.593Z [INFO]  backend-s3: m").unwrap();
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
            assert_eq!(Record::parse(line), None, "{line:?}");
        }
    }

    #[test]
    fn a_torn_record_never_panics() {
        for end in 0..LINE.len() {
            if let Some(record) = Record::parse(&LINE[..end]) {
                let _ = record.field("tf_backend.lock.path");
            }
        }
    }
}
