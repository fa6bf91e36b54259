//! Writes JSON that contains only ASCII characters, because the content is untrusted and is printed on terminals. No
//! information is lost, because every JSON parser converts an escape such as `\u202e` back into the character. Also
//! reads texts as Go does, and the names of an object's members without storing the values.

use std::fmt;
use std::io::{self, Write};

use serde::de::{IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::ser::{Formatter, Serializer};

struct Ascii;

impl Formatter for Ascii {
    fn write_string_fragment<W: ?Sized + Write>(&mut self, writer: &mut W, fragment: &str) -> io::Result<()> {
        let is_other = |byte: u8| byte >= 0x7f;
        // Almost every text is plain. The whole of it is looked at, because such a loop is several times as fast as a
        // search.
        if !fragment.bytes().fold(false, |found, byte| found | is_other(byte)) {
            return writer.write_all(fragment.as_bytes());
        }
        let mut rest = fragment;
        // An index of a byte that is not ASCII, or is DEL, is one at which a character begins.
        while let Some(index) = rest.bytes().position(is_other) {
            let (plain, from) = rest.split_at(index);
            writer.write_all(plain.as_bytes())?;
            let mut characters = from.chars();
            for unit in characters.next().unwrap_or_default().encode_utf16(&mut [0; 2]) {
                write!(writer, "\\u{unit:04x}")?;
            }
            rest = characters.as_str();
        }
        writer.write_all(rest.as_bytes())
    }
}

/// Serializes `value` as JSON on one line.
///
/// # Errors
/// Fails in the same cases as [`serde_json::to_string`].
pub(crate) fn to_string<T: Serialize + ?Sized>(value: &T) -> serde_json::Result<String> {
    let mut bytes = Vec::with_capacity(1024);
    append(&mut bytes, value)?;
    String::from_utf8(bytes).map_err(serde::ser::Error::custom)
}

/// Does the same as [`to_string`], but appends the JSON to `bytes`.
///
/// # Errors
/// The same as [`to_string`]. The JSON in `bytes` is then incomplete.
pub(crate) fn append<T: Serialize + ?Sized>(bytes: &mut Vec<u8>, value: &T) -> serde_json::Result<()> {
    value.serialize(&mut Serializer::with_formatter(bytes, Ascii))
}

/// Parses JSON that may contain a [`GoText`] or [`MemberNames`].
///
/// # Errors
/// Fails if `json` is not JSON, or is not a `T`.
pub(crate) fn parse<'de, T: Deserialize<'de>>(json: &'de str) -> serde_json::Result<T> {
    // A visitor of bytes gets a string with a control character, which is not JSON. Between the tokens, it may be white
    // space.
    let is_control = |byte: u8| byte < b' ';
    if json.bytes().fold(false, |found, byte| found | is_control(byte)) {
        let IgnoredAny = serde_json::from_str(json)?;
    }
    serde_json::from_str(json)
}

/// A string of JSON, as Go's encoding/json reads it: a `\ud800` that is half of no pair becomes U+FFFD. serde_json
/// refuses such a string.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct GoText(pub(crate) String);

impl<'de> Deserialize<'de> for GoText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Bytes;

        impl Visitor<'_> for Bytes {
            type Value = GoText;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a JSON string")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<GoText, E> {
                Ok(GoText(text.to_owned()))
            }

            fn visit_bytes<E: serde::de::Error>(self, bytes: &[u8]) -> Result<GoText, E> {
                let text = std::str::from_utf8(bytes).map(ToOwned::to_owned);
                Ok(GoText(text.unwrap_or_else(|_| String::from_utf8_lossy(bytes).into_owned())))
            }
        }

        // serde_json gives half of a pair as three bytes that are not UTF-8 to a visitor of bytes.
        deserializer.deserialize_bytes(Bytes)
    }
}

/// The names of the members of a JSON object, in the order of the text, with every duplicate.
pub(crate) struct MemberNames(pub(crate) Vec<String>);

impl<'de> Deserialize<'de> for MemberNames {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InOrder;

        impl<'de> Visitor<'de> for InOrder {
            type Value = MemberNames;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a JSON object")
            }

            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<MemberNames, M::Error> {
                let mut names = Vec::new();
                while let Some((GoText(name), IgnoredAny)) = map.next_entry()? {
                    names.push(name);
                }
                Ok(MemberNames(names))
            }
        }

        deserializer.deserialize_map(InOrder)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_character_is_ascii_and_none_is_lost() {
        for text in ["a\nb\u{1b}[31m", "\u{202e}evil", "\u{7f}\u{9b}", "grün 🔒", "\"\\"] {
            let json = to_string(text).unwrap();
            assert!(json.chars().all(|character| (' '..='~').contains(&character)), "{json}");
            assert_eq!(serde_json::from_str::<String>(&json).unwrap(), text);
        }
    }

    #[test]
    fn a_text_is_read_as_go_reads_it() {
        for (json, expected) in [(r#""plain""#, "plain"), (r#""gr\u00fcn \ud83d\udd12""#, "grün 🔒"), (r#""""#, "")]
        {
            assert_eq!(parse::<GoText>(json).unwrap(), GoText(expected.to_owned()), "{json}");
        }
        for json in [r#""a\ud800b""#, r#""a\udc00b""#, r#""a\ud800\ud800b""#] {
            let GoText(text) = parse(json).unwrap();
            let middle = text.strip_prefix('a').unwrap().strip_suffix('b').unwrap();
            assert!(middle.chars().all(|character| character == '\u{fffd}') && !middle.is_empty(), "{text:?}");
        }
        for json in ["7", "null", "[97]", "{}", r#""a"#, "\"\n\""] {
            assert!(parse::<GoText>(json).is_err(), "{json}");
        }
    }

    #[test]
    fn names_keep_their_order_and_their_duplicates() {
        let MemberNames(names) = serde_json::from_str(r#"{"b": {"x": 1}, "a": [2], "b": null}"#).unwrap();
        assert_eq!(names, ["b", "a", "b"]);
        // Values that serde_json can skip, but not store.
        let deep = format!(r#"{{"a": {}{}, "b": 1e400, "\ud800": "\udc00"}}"#, "[".repeat(9000), "]".repeat(9000));
        assert_eq!(serde_json::from_str::<MemberNames>(&deep).unwrap().0.len(), 3);
        for text in ["[]", "\"b\"", "null", r#"{"b": 1"#] {
            assert!(serde_json::from_str::<MemberNames>(text).is_err(), "{text}");
        }
    }
}
