//! Terraform's lock: the JSON in a DynamoDB item or in a `.tflock` object.

use std::fmt;

use jiff::Timestamp;
use serde::de::{DeserializeSeed, Error, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use crate::sys::user_database;
use crate::{json, random};

/// Terraform's `statemgr.LockInfo` (internal/states/statemgr/locker.go). The JSON names are the names of the Go fields.
/// The format has no other specification.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct LockInfo {
    /// The lock ID: 8-4-4-4-12 hexadecimal digits, generated anew for each lock. In Google Cloud Storage it is the
    /// generation of the lock object, a number.
    #[serde(rename = "ID")]
    pub(crate) id: String,
    /// The operation that took the lock: `OperationTypeApply`, `state-mv`, `init`...
    #[serde(default)]
    pub(crate) operation: String,
    /// The user and the host of the holder: `user@host`.
    #[serde(default)]
    pub(crate) who: String,
    /// Terraform's version, without a suffix such as `-rc1`.
    #[serde(default)]
    pub(crate) version: String,
    /// When the holder began to request the lock, in RFC 3339, by the clock of the holder's host.
    #[serde(default)]
    pub(crate) created: String,
    /// The path of the state. For S3 it is `bucket/key`.
    #[serde(default)]
    pub(crate) path: String,
}

impl LockInfo {
    /// Parses a lock as terraform does (Go's encoding/json): the case of a name is ignored, the last of two equal names
    /// counts, `null` leaves a field empty, and a member that is not a field may have any value. `None` if the text is
    /// not a lock. Also `None` if the lock has no ID: terraform writes no such lock, and no command could select it.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let Parsed(lock) = json::parse(text).ok()?;
        (!lock.id.is_empty()).then_some(lock)
    }

    /// Returns the field with this name in JSON. `None` if there is no such field.
    fn field(&mut self, name: &str) -> Option<&mut String> {
        let is = |known: &str| known.eq_ignore_ascii_case(name);
        Some(match name.len() {
            2 if is("ID") => &mut self.id,
            9 if is("Operation") => &mut self.operation,
            3 if is("Who") => &mut self.who,
            7 if is("Version") => &mut self.version,
            7 if is("Created") => &mut self.created,
            4 if is("Path") => &mut self.path,
            _ => return None,
        })
    }

    /// Parses the existing lock from the error message of a terraform that could not acquire it (statemgr.LockError,
    /// `Error`). Each line has a name, a colon and a value. The text of an API error may contain such lines too, so
    /// only the lines after `Lock Info:` are parsed. `None` if these lines are missing, or if they lack `ID`,
    /// `Operation`, `Who`, `Version` or `Created`.
    pub(crate) fn of_refusal(said: &str) -> Option<Self> {
        let (_, block) = said.split_once("Lock Info:")?;
        let line = |name: &str| {
            let lines = block.lines().map(|line| line.trim_matches(['\u{2502}', ' ']));
            let value = lines.take(8).find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
            Some(value.trim().to_owned())
        };
        // Go prints a time as `2026-11-22 23:26:03.031578055 +0000 UTC`.
        let created = line("Created")?;
        let created = created.strip_suffix(" UTC").unwrap_or(&created);
        let created = Timestamp::strptime("%Y-%m-%d %H:%M:%S%.f %z", created).ok();
        Some(Self {
            id: line("ID")?,
            operation: line("Operation")?,
            who: line("Who")?,
            version: line("Version")?,
            created: created.map(|created| created.to_string()).unwrap_or_default(),
            path: line("Path").unwrap_or_default(),
        })
    }

    /// Returns `Created` as a point in time. `None` if it cannot be parsed.
    pub(crate) fn created(&self) -> Option<Timestamp> {
        self.created.parse().ok()
    }
}

/// A lock whose fields were read in the order of the text, with every duplicate. A `serde_json::Map` sorts them, so it
/// does not show which of `id` and `ID` is the last one.
struct Parsed(LockInfo);

impl<'de> Deserialize<'de> for Parsed {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InOrder;

        impl<'de> Visitor<'de> for InOrder {
            type Value = Parsed;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a JSON object")
            }

            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Parsed, M::Error> {
                let mut lock = LockInfo::default();
                while let Some(field) = map.next_key_seed(FieldOf(&mut lock))? {
                    match field {
                        Some(field) => {
                            if let Some(text) = map.next_value()? {
                                *field = text;
                            }
                        }
                        None => drop(map.next_value::<IgnoredAny>()?),
                    }
                }
                Ok(Parsed(lock))
            }
        }

        deserializer.deserialize_map(InOrder)
    }
}

/// The name of a member of a lock. Its value is the field with this name ([`LockInfo::field`]). A scan reads 100,000
/// locks, so the name is not copied.
struct FieldOf<'a>(&'a mut LockInfo);

impl<'de, 'a> DeserializeSeed<'de> for FieldOf<'a> {
    type Value = Option<&'a mut String>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl<'a> Visitor<'_> for FieldOf<'a> {
    type Value = Option<&'a mut String>;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a name")
    }

    fn visit_str<E: Error>(self, name: &str) -> Result<Self::Value, E> {
        Ok(self.0.field(name))
    }
}

/// Whether `text` has the form of a lock ID. `tf` must never search for a truncated ID, or for an ID that terraform did
/// not generate.
pub(crate) fn is_lock_id(text: &str) -> bool {
    let lengths = [8, 4, 4, 4, 12];
    let parts: Vec<_> = text.split('-').collect();
    parts.len() == lengths.len()
        && parts.iter().zip(lengths).all(|(part, length)| {
            part.len() == length && part.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
        })
}

/// Generates a random ID in the form of terraform's lock IDs.
pub(crate) fn new_id() -> String {
    let (high, low) = (random::number(), random::number());
    format!(
        "{:08x}-{:04x}-{:04x}-{:04x}-{:012x}",
        high >> 32,
        high >> 16 & 0xffff,
        high & 0xffff,
        low >> 48,
        low & 0xffff_ffff_ffff
    )
}

/// Splits the path of a lock, `BUCKET/KEY`, into the bucket and the key. `None` if it has no slash.
///
/// The bucket may be the ARN of an access point, which can contain slashes itself: `arn:...:accesspoint/NAME`, and on
/// Outposts `arn:...:outpost/ID/accesspoint/NAME` (Amazon S3 User Guide, "Referencing access points").
pub(crate) fn split_path(path: &str) -> Option<(&str, &str)> {
    // An ARN has five fields before the resource.
    let resource = path.strip_prefix("arn:").and_then(|rest| rest.splitn(5, ':').nth(4)).unwrap_or_default();
    let slashes_in_bucket = match resource.split('/').next() {
        Some("accesspoint") => 1,
        Some("outpost") => 3,
        _ => 0,
    };
    let (end, _) = path.match_indices('/').nth(slashes_in_bucket)?;
    Some((&path[..end], &path[end + 1..]))
}

/// Returns the `Who` that a terraform started by this process writes into a lock: `user@host`.
///
/// Release builds of Terraform do not use the C library. So Go searches /etc/passwd for the user ID. If it is not
/// there, Go uses `$USER`, provided that `$HOME` is set too. If both fail, the name is empty (os/user/lookup_stubs.go;
/// statemgr.NewLockInfo). On macOS this function searches the system's user database before it uses `$USER`.
pub(crate) fn who() -> String {
    let uid = nix::unistd::getuid();
    let in_passwd = || user_in_passwd(&passwd()?, uid.as_raw());
    let user = in_passwd().or_else(|| user_database::name(uid)).or_else(|| {
        let set = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
        set("HOME").and(set("USER"))
    });
    let host = nix::unistd::gethostname().map(|host| host.to_string_lossy().into_owned());
    format!("{}@{}", user.unwrap_or_default(), host.unwrap_or_default())
}

/// Returns the text of /etc/passwd. `None` if it cannot be read. The real names in it may be in any encoding, which
/// terraform does not read, so a byte that is not UTF-8 is replaced.
pub(crate) fn passwd() -> Option<String> {
    let bytes = std::fs::read("/etc/passwd").ok()?;
    Some(text_of(&bytes))
}

fn text_of(passwd: &[u8]) -> String {
    String::from_utf8_lossy(passwd).into_owned()
}

fn user_in_passwd(passwd: &str, uid: u32) -> Option<String> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let number: u32 = fields.nth(1)?.parse().ok()?;
        (number == uid && !name.is_empty() && !name.starts_with('#')).then(|| name.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generated_input::{changed_text, for_all};

    #[test]
    fn an_id_is_whole_or_it_is_none() {
        assert!(is_lock_id(&new_id()) && new_id() != new_id());
        assert!(is_lock_id("5e75cb05-d70c-4132-39e0-d2abba1b3077"));
        for text in [
            "",
            "5e75cb",
            "5e75cb05-d70c-4132-39e0-d2abba1b307",
            "5E75CB05-D70C-4132-39E0-D2ABBA1B3077",
            "5e75cb05-d70c-4132-39e0-d2abba1b30777",
            "g e75cb05-d70c-4132-39e0-d2abba1b3077",
            "----",
        ] {
            assert!(!is_lock_id(text), "{text:?}");
        }
    }

    #[test]
    fn the_user_is_the_one_of_the_number() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\n#old:x:7:7::/:/bin/sh\nanna:x:1000:1000::/home/anna:/bin/sh\n";
        assert_eq!(user_in_passwd(passwd, 1000).as_deref(), Some("anna"));
        assert_eq!(user_in_passwd(passwd, 7), None);
        assert_eq!(user_in_passwd(passwd, 5), None);
        let latin1 = text_of(b"m:x:1001:1001:M\xfcller:/home/m:/bin/sh\nanna:x:1000:1000::/home/anna:/bin/sh\n");
        assert_eq!(user_in_passwd(&latin1, 1000).as_deref(), Some("anna"));
        assert_eq!(user_in_passwd(&latin1, 1001).as_deref(), Some("m"));
    }

    #[test]
    fn a_path_is_split_behind_the_bucket_which_may_be_an_access_point() {
        let arn = "arn:aws:s3:eu-west-1:123456789012:";
        for (path, expected) in [
            ("b/k".to_owned(), Some(("b".to_owned(), "k"))),
            ("b/env:/green/k".to_owned(), Some(("b".into(), "env:/green/k"))),
            (format!("{arn}accesspoint/ap/dir/k"), Some((format!("{arn}accesspoint/ap"), "dir/k"))),
            (format!("{arn}accesspoint:ap/dir/k"), Some((format!("{arn}accesspoint:ap"), "dir/k"))),
            ("arn:aws:s3::1:accesspoint/m.mrap/k".into(), Some(("arn:aws:s3::1:accesspoint/m.mrap".into(), "k"))),
            (
                "arn:aws:s3-outposts:r:1:outpost/op-1/accesspoint/ap/k".into(),
                Some(("arn:aws:s3-outposts:r:1:outpost/op-1/accesspoint/ap".into(), "k")),
            ),
            (format!("{arn}accesspoint/ap"), None),
            ("b".into(), None),
            ("arn:/k".into(), Some(("arn:".into(), "k"))),
        ] {
            let found = split_path(&path);
            assert_eq!(found, expected.as_ref().map(|(bucket, key)| (bucket.as_str(), *key)), "{path}");
        }
    }

    #[test]
    fn the_lock_that_refused_a_terraform_is_read() {
        let said = "Error: Error acquiring the state lock\n\nError message: writing failed: ID: 7\nLock Info:\n  \
                    ID:        1795580240844605\n  Path:      gs://b/p/default.tflock\n  Operation: OperationTypeApply\n  \
                    Who:       root@vm\n  Version:   1.11.4\n  Created:   2026-11-22 23:26:03.031578055 +0000 UTC\n  Info:      \n\n";
        let info = LockInfo::of_refusal(said).unwrap();
        assert_eq!((info.id.as_str(), info.who.as_str()), ("1795580240844605", "root@vm"));
        assert_eq!(info.created().unwrap().to_string(), "2026-11-22T23:26:03.031578055Z");
        let boxed: Vec<String> = said.lines().map(|line| format!("\u{2502} {line}")).collect();
        assert_eq!(LockInfo::of_refusal(&boxed.join("\n")), Some(info));
        assert_eq!(LockInfo::of_refusal("Error: No such resource instance"), None);
    }

    #[test]
    fn a_lock_is_read_and_junk_is_not() {
        let json = r#"{"ID":"5e75cb05-d70c-4132-39e0-d2abba1b3077","Operation":"OperationTypeApply","Info":"","Who":"root@vm","Version":"1.11.4","Created":"2026-11-22T23:26:03.031578055Z","Path":"bkt/dir/prod.tfstate"}"#;
        let info = LockInfo::parse(json).unwrap();
        assert_eq!(info.who, "root@vm");
        assert_eq!(info.created().unwrap().to_string(), "2026-11-22T23:26:03.031578055Z");
        let other_names = json.replace("\"ID\"", "\"Id\"").replace("\"Who\"", "\"who\"");
        assert_eq!(LockInfo::parse(&other_names), Some(info));
        assert_eq!(LockInfo::parse(r#"{"ID":"x","Who":null}"#).unwrap().who, "");
        for junk in [
            "",
            "{}",
            "null",
            "[]",
            r#"{"ID":7}"#,
            r#"{"ID":""}"#,
            r#"{"ID":"x","Who":7}"#,
            "{\"ID\":\"x\n\"}",
            &json[..40],
        ] {
            assert_eq!(LockInfo::parse(junk), None, "{junk:?}");
        }
    }

    /// A lock that terraform reads must not count as something that is not a lock: that can be released without a
    /// judgement of its holder.
    #[test]
    fn a_lock_may_have_other_members_with_any_value_and_texts_that_are_not_unicode() {
        let deep = format!("{}{}", "[".repeat(9000), "]".repeat(9000));
        for other in [r#""y":1e400"#, r#""y":"\ud800""#, r#""\ud800":1"#, &format!(r#""y":{deep}"#)] {
            for json in [format!(r#"{{"ID":"x","Who":"a@b",{other}}}"#), format!(r#"{{{other},"ID":"x","Who":"a@b"}}"#)]
            {
                let expected = LockInfo { id: "x".into(), who: "a@b".into(), ..LockInfo::default() };
                assert_eq!(LockInfo::parse(&json), Some(expected), "{}", &json[..40]);
            }
        }
        let info = LockInfo::parse(r#"{"ID":"x","Who":"a\ud800@b"}"#).unwrap();
        assert!(info.who.starts_with('a') && info.who.ends_with("\u{fffd}@b"), "{info:?}");
    }

    /// Go assigns the fields in the order of the text (encoding/json), so the last of two names counts, even if they
    /// differ in case.
    #[test]
    fn of_two_names_the_last_one_counts() {
        let names = proptest::collection::vec(proptest::sample::select(vec!["ID", "id", "Id", "iD"]), 1..5);
        for_all(file!(), &names, |names| {
            let fields: Vec<String> =
                names.iter().enumerate().map(|(number, name)| format!(r#""{name}":"{number}""#)).collect();
            let lock = LockInfo::parse(&format!("{{{}}}", fields.join(","))).unwrap();
            proptest::prop_assert_eq!(lock.id, (names.len() - 1).to_string());
            Ok(())
        });
    }

    #[test]
    fn a_lock_that_is_written_is_read_back() {
        let strategy = ("[ -~]{1,40}", ".{0,40}", ".{0,80}", ".{0,20}", ".{0,30}");
        for_all(file!(), &strategy, |(id, who, path, operation, created)| {
            let lock = LockInfo { id, who, path, operation, created, version: "1.11.4".to_owned() };
            proptest::prop_assert_eq!(LockInfo::parse(&serde_json::to_string(&lock).unwrap()), Some(lock));
            Ok(())
        });
    }

    #[test]
    fn no_text_makes_the_parser_of_a_lock_panic() {
        let lock = r#"{"ID":"5e75cb05-d70c-4132-39e0-d2abba1b3077","Operation":"OperationTypeApply","Info":"","Who":"root@vm","Version":"1.11.4","Created":"2026-11-22T23:26:03.03Z","Path":"b/k"}"#;
        for_all(file!(), &(changed_text(lock), ".{0,200}"), |(lock, text)| {
            let _ = LockInfo::parse(&text);
            if let Some(info) = LockInfo::parse(&lock) {
                proptest::prop_assert!(!info.id.is_empty());
                let _ = (info.created(), is_lock_id(&info.id));
            }
            let _ = LockInfo::of_refusal(&text);
            let _ = LockInfo::of_refusal(&format!("Lock Info:\n  ID: {text}\n  Created: {lock}"));
            Ok(())
        });
    }
}
