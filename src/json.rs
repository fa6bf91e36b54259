//! Writes JSON that contains only ASCII characters, because the content is untrusted and is printed on terminals. No
//! information is lost, because every JSON parser converts an escape such as `\u202e` back into the character. Also
//! reads the names of an object's members without storing the values.

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
    value.serialize(&mut Serializer::with_formatter(&mut bytes, Ascii))?;
    String::from_utf8(bytes).map_err(serde::ser::Error::custom)
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
                while let Some((name, IgnoredAny)) = map.next_entry()? {
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
    fn names_keep_their_order_and_their_duplicates() {
        let MemberNames(names) = serde_json::from_str(r#"{"b": {"x": 1}, "a": [2], "b": null}"#).unwrap();
        assert_eq!(names, ["b", "a", "b"]);
        for text in ["[]", "\"b\"", "null", r#"{"b": 1"#] {
            assert!(serde_json::from_str::<MemberNames>(text).is_err(), "{text}");
        }
    }
}
