//! Writes JSON that contains only ASCII characters, because the content is untrusted and is printed on terminals. No
//! information is lost, because every JSON parser converts an escape such as `\u202e` back into the character. Also
//! reads texts as Go does, and the names of an object's members without storing the values.

use std::fmt;
use std::io::{self, Write};

use serde::de::{DeserializeOwned, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::ser::{Formatter, Serializer};

/// Whether `text` has only ASCII characters, and no DEL. Looks at eight bytes at once, because most texts are short.
fn is_plain_ascii(text: &str) -> bool {
    const ONES: u64 = u64::from_ne_bytes([0x01; 8]);
    const HIGH_BITS: u64 = u64::from_ne_bytes([0x80; 8]);
    let (words, rest) = text.as_bytes().as_chunks::<8>();
    // Plus 1, a DEL has its high bit set. There is no carry into the next byte, except from a byte that is not ASCII.
    let add = |all: u64, word: u64| all | word | word.wrapping_add(ONES);
    let all = words.iter().fold(0, |all, word| add(all, u64::from_ne_bytes(*word)));
    let all = rest.iter().fold(all, |all, byte| add(all, u64::from(*byte)));
    all & HIGH_BITS == 0
}

struct Ascii;

impl Formatter for Ascii {
    fn write_string_fragment<W: ?Sized + Write>(&mut self, writer: &mut W, fragment: &str) -> io::Result<()> {
        // Almost every text is plain.
        if is_plain_ascii(fragment) {
            return writer.write_all(fragment.as_bytes());
        }
        let is_other = |byte: u8| byte >= 0x7f;
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

/// Parses JSON as Go's encoding/json does: a `\ud800` that is half of no pair is read as U+FFFD. serde_json refuses it.
///
/// # Errors
/// Fails if `json` is not JSON, or is not a `T`.
pub(crate) fn parse<T: DeserializeOwned>(json: &str) -> serde_json::Result<T> {
    // Almost every text has no such half.
    serde_json::from_str(json).or_else(|error| {
        if json.contains("\\u") { serde_json::from_str(&without_half_pairs(json)) } else { Err(error) }
    })
}

/// Replaces each `\ud800` that is half of no pair by `\ufffd` (decode.go of Go's encoding/json, `unquoteBytes`).
fn without_half_pairs(json: &str) -> String {
    const LENGTH: usize = r"\ud800".len();
    let (mut whole, mut rest) = (String::with_capacity(json.len()), json);
    while let Some(at) = rest.find('\\') {
        let (before, escape) = rest.split_at(at);
        whole.push_str(before);
        let kept = match (code_unit(escape), escape.get(LENGTH..).and_then(code_unit)) {
            (Some(0xd800..=0xdbff), Some(0xdc00..=0xdfff)) => 2 * LENGTH,
            (Some(0xd800..=0xdfff), _) => {
                whole.push_str(r"\ufffd");
                rest = &escape[LENGTH..];
                continue;
            }
            _ if escape.starts_with(r"\\") => 2,
            _ => 1,
        };
        whole.push_str(&escape[..kept]);
        rest = &escape[kept..];
    }
    whole + rest
}

/// Returns the UTF-16 code unit of an escape such as `\ud800` at the beginning of `text`. `None` if there is no such
/// escape.
fn code_unit(text: &str) -> Option<u16> {
    let digits = text.strip_prefix(r"\u")?.get(..4)?;
    let are_digits = digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    are_digits.then(|| u16::from_str_radix(digits, 16).ok()).flatten()
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
    fn a_text_is_plain_if_each_of_its_characters_is() {
        for (character, is_plain) in
            [('\0', true), ('~', true), ('\u{7f}', false), ('\u{80}', false), ('\u{fff}', false)]
        {
            for (before, after) in (0..20).flat_map(|before| (0..20).map(move |after| (before, after))) {
                let text = format!("{}{character}{}", "~".repeat(before), "a".repeat(after));
                assert_eq!(is_plain_ascii(&text), is_plain, "{text:?}");
            }
        }
    }

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
        for (json, expected) in [
            (r#""plain""#, "plain"),
            (r#""gr\u00fcn \ud83d\udd12""#, "grün 🔒"),
            (r#""""#, ""),
            (r#""a\ud800b""#, "a\u{fffd}b"),
            (r#""a\uDC00\n""#, "a\u{fffd}\n"),
            (r#""\ud800\ud800ü""#, "\u{fffd}\u{fffd}ü"),
            (r#""\ud83d\ud83d\udd12\udd12""#, "\u{fffd}🔒\u{fffd}"),
            (r#""\\ud800\ud800\\""#, "\\ud800\u{fffd}\\"),
            (r#""\ud800\u0041""#, "\u{fffd}A"),
        ] {
            assert_eq!(parse::<String>(json).unwrap(), expected, "{json}");
        }
        for json in
            ["7", "null", "[97]", "{}", r#""a"#, "\"\n\"", r#""\ud800"#, r#""\ud8""#, r#""\u+800""#, r#""\ud800\""#]
        {
            assert!(parse::<String>(json).is_err(), "{json}");
        }
    }

    #[test]
    fn names_keep_their_order_and_their_duplicates() {
        let MemberNames(names) = serde_json::from_str(r#"{"b": {"x": 1}, "a": [2], "b": null}"#).unwrap();
        assert_eq!(names, ["b", "a", "b"]);
        // Values that serde_json can skip, but not store.
        let deep = format!(r#"{{"a": {}{}, "b": 1e400, "\ud800": "\udc00"}}"#, "[".repeat(9000), "]".repeat(9000));
        assert_eq!(parse::<MemberNames>(&deep).unwrap().0.len(), 3);
        for text in ["[]", "\"b\"", "null", r#"{"b": 1"#] {
            assert!(parse::<MemberNames>(text).is_err(), "{text}");
        }
    }
}
