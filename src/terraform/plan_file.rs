//! A plan that `terraform plan -out` has written, and the backend and the workspace in it. `terraform apply PLANFILE`
//! uses these instead of those in the data directory (internal/command/meta_backend.go, `BackendForLocalPlan`).
//!
//! A plan is a ZIP archive (internal/plans/planfile/writer.go). Its entry `tfplan` is a Protocol Buffers message
//! (internal/plans/planproto/planfile.proto), which contains the attributes of the backend as MessagePack. OpenTofu can
//! encrypt a plan; `tf` cannot read such a plan.

use std::fs::File;
use std::io::Read;

use prost::Message;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::backend::CachedBackend;
use super::data_directory::DataDirectory;

/// The maximum size of the entry `tfplan`: 256 MiB, in bytes. A larger plan is not read. `tf` then searches for the
/// lock in the backend of the data directory.
const MAX_PLAN_BYTES: u64 = 256 << 20;

/// The maximum depth of the attributes of a backend, which is also serde_json's limit for JSON. The deepest attribute
/// of the s3 backend, `assume_role.tags`, has 3 levels. The default of rmp_serde, 1024, needs up to 4 MiB of stack.
const MAX_DEPTH: usize = 128;

/// The fields of the message `Plan` that `tf` needs. All other fields are skipped.
#[derive(Message)]
struct PlanMessage {
    #[prost(message, optional, tag = "13")]
    backend: Option<Backend>,
    #[prost(string, tag = "14")]
    terraform_version: String,
}

#[derive(Message)]
struct Backend {
    #[prost(string, tag = "1")]
    kind: String,
    #[prost(message, optional, tag = "2")]
    config: Option<Dynamic>,
    #[prost(string, tag = "3")]
    workspace: String,
}

#[derive(Message)]
struct Dynamic {
    #[prost(bytes = "vec", tag = "1")]
    msgpack: Vec<u8>,
}

/// Returns the backend and the workspace of a plan. `None` if the file is not a plan, cannot be read, or contains no
/// backend.
pub(crate) fn read(file: &File) -> Option<DataDirectory> {
    let mut archive = zip::ZipArchive::new(file).ok()?;
    let entry = archive.by_name("tfplan").ok()?;
    let mut message = Vec::new();
    entry.take(MAX_PLAN_BYTES + 1).read_to_end(&mut message).ok().filter(|length| *length as u64 <= MAX_PLAN_BYTES)?;
    let plan = PlanMessage::decode(message.as_slice()).ok()?;
    let backend = plan.backend?;
    let msgpack = backend.config?.msgpack;
    let mut attributes = rmp_serde::Deserializer::from_read_ref(&msgpack);
    attributes.set_max_depth(MAX_DEPTH);
    let config = Map::<String, Value>::deserialize(&mut attributes).ok()?;
    Some(DataDirectory {
        backend: Some(CachedBackend::of_parts(&backend.kind, config, &plan.terraform_version)),
        workspace: backend.workspace,
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn plan(entry: &str, message: &[u8]) -> File {
        let file = tempfile::tempfile().unwrap();
        let mut archive = zip::ZipWriter::new(&file);
        archive.start_file(entry, zip::write::SimpleFileOptions::default()).unwrap();
        archive.write_all(message).unwrap();
        archive.finish().unwrap();
        file
    }

    fn message() -> Vec<u8> {
        let config = serde_json::json!({"bucket": "b", "key": "k", "region": null, "endpoints": {"s3": "http://x"},
                                        "max_retries": 5, "shared_config_files": ["a"]});
        let backend = Backend {
            kind: "s3".into(),
            config: Some(Dynamic { msgpack: rmp_serde::to_vec(&config).unwrap() }),
            workspace: "green".into(),
        };
        PlanMessage { backend: Some(backend), terraform_version: "1.11.4".into() }.encode_to_vec()
    }

    #[test]
    fn the_backend_of_a_plan_is_read() {
        let read = read(&plan("tfplan", &message())).unwrap();
        assert_eq!(read.workspace, "green");
        let backend = read.backend.unwrap();
        assert_eq!(backend.string("bucket"), Some("b"));
        assert_eq!(backend.string("endpoints.s3"), Some("http://x"));
        assert_eq!(backend.string("region"), None);
        assert_eq!(backend.state_key("green").unwrap(), "env:/green/k");
    }

    #[test]
    fn what_is_no_plan_is_none() {
        assert!(read(&plan("other", &message())).is_none());
        assert!(read(&plan("tfplan", b"\xff\xff\xff")).is_none());
        for cut in 0..message().len() {
            let _ = read(&plan("tfplan", &message()[..cut]));
        }
        let mut file = tempfile::tempfile().unwrap();
        // This is the form of an encrypted plan of OpenTofu.
        file.write_all(b"{\"meta\":{},\"encrypted_data\":\"x\",\"encryption_version\":\"v0\"}").unwrap();
        assert!(read(&file).is_none());
        assert!(read(&tempfile::tempfile().unwrap()).is_none());
    }

    use proptest::prelude::*;

    /// A value of a backend's attribute, at most 4 levels deep.
    fn value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<u64>().prop_map(Value::from),
            any::<i32>().prop_map(|half| Value::from(f64::from(half) / 2.0)),
            "\\PC{0,40}".prop_map(Value::from),
            (250..270_usize).prop_map(|length| Value::from("x".repeat(length))),
            prop::collection::vec(any::<i8>(), 14..18).prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 16, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map("[a-z_]{1,12}", inner, 0..4)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    /// The attributes of a backend.
    fn config() -> impl Strategy<Value = Map<String, Value>> {
        prop::collection::btree_map("[a-z_]{1,12}", value(), 0..6).prop_map(|map| map.into_iter().collect())
    }

    /// Writes `value` as MessagePack. `widths` chooses one of the forms in which the format can write a number or a
    /// length. The format does not require the shortest one.
    fn pack(value: &Value, widths: &mut impl Iterator<Item = usize>, into: &mut Vec<u8>) {
        /// Writes a length after the shortest marker that fits, or after a longer one.
        fn length(length: usize, short: Option<u8>, markers: &[(u8, usize)], width: usize, into: &mut Vec<u8>) {
            let fits = |bytes: usize| bytes >= 8 || length < 1 << (8 * bytes);
            let fitting: Vec<_> = markers.iter().filter(|(_, bytes)| fits(*bytes)).collect();
            match short {
                Some(short) if width.is_multiple_of(2) => into.push(short),
                _ => {
                    let (marker, bytes) = fitting[width / 2 % fitting.len()];
                    into.push(*marker);
                    into.extend(&(length as u64).to_be_bytes()[8 - bytes..]);
                }
            }
        }
        let short = |base: u8, count: usize, most: usize| {
            u8::try_from(count).ok().filter(|_| count <= most).map(|count| base | count)
        };
        let width = widths.next().unwrap_or_default();
        let text = |text: &str, width, into: &mut Vec<u8>| {
            length(text.len(), short(0xa0, text.len(), 31), &[(0xd9, 1), (0xda, 2), (0xdb, 4)], width, into);
            into.extend(text.as_bytes());
        };
        match value {
            Value::Null => into.push(0xc0),
            Value::Bool(is_true) => into.push(if *is_true { 0xc3 } else { 0xc2 }),
            Value::Number(number) => match (number.as_u64(), number.as_i64()) {
                (Some(number), _) => match usize::try_from(number) {
                    Ok(number) => {
                        let markers = [(0xcc, 1), (0xcd, 2), (0xce, 4), (0xcf, 8)];
                        length(number, short(0, number, 127), &markers, width, into);
                    }
                    Err(_) => into.extend([0xcf].into_iter().chain(number.to_be_bytes())),
                },
                (None, Some(number)) => into.extend([0xd3].into_iter().chain(number.to_be_bytes())),
                (None, None) => {
                    into.extend([0xcb].into_iter().chain(number.as_f64().unwrap_or_default().to_be_bytes()));
                }
            },
            Value::String(string) => text(string, width, into),
            Value::Array(values) => {
                length(values.len(), short(0x90, values.len(), 15), &[(0xdc, 2), (0xdd, 4)], width, into);
                for value in values {
                    pack(value, widths, into);
                }
            }
            Value::Object(map) => {
                length(map.len(), short(0x80, map.len(), 15), &[(0xde, 2), (0xdf, 4)], width, into);
                for (name, value) in map {
                    text(name, widths.next().unwrap_or_default(), into);
                    pack(value, widths, into);
                }
            }
        }
    }

    fn packed(config: Map<String, Value>, widths: &[usize]) -> Vec<u8> {
        let mut bytes = Vec::new();
        pack(&Value::Object(config), &mut widths.iter().copied().cycle(), &mut bytes);
        bytes
    }

    fn message_with(msgpack: Vec<u8>) -> Vec<u8> {
        let backend = Backend { kind: "s3".into(), config: Some(Dynamic { msgpack }), workspace: "green".into() };
        PlanMessage { backend: Some(backend), terraform_version: "1.11.4".into() }.encode_to_vec()
    }

    #[test]
    fn every_attribute_of_a_plan_is_read_in_whatever_form_its_length_is_written() {
        let strategy = (config(), prop::collection::vec(0..8_usize, 1..20));
        crate::generated_input::for_all(file!(), &strategy, |(config, widths)| {
            let message = message_with(packed(config.clone(), &widths));
            let read = read(&plan("tfplan", &message)).ok_or_else(|| TestCaseError::fail("not read"))?;
            prop_assert_eq!(read.backend, Some(CachedBackend::of_parts("s3", config, "1.11.4")));
            prop_assert_eq!(read.workspace, "green");
            Ok(())
        });
    }

    #[test]
    fn attributes_with_any_change_are_rejected_or_read() {
        let strategy = (config(), prop::collection::vec(0..8_usize, 1..20))
            .prop_flat_map(|(config, widths)| crate::generated_input::changed(packed(config, &widths)));
        crate::generated_input::for_all(file!(), &strategy, |msgpack| {
            let _ = read(&plan("tfplan", &message_with(msgpack)));
            Ok(())
        });
    }

    /// Lengths that no attribute has, and values in values. Neither may cost memory or stack that the bytes do not
    /// have.
    #[test]
    fn a_length_beyond_the_end_and_a_value_in_thousands_of_others_are_rejected() {
        for header in [&[0xdb_u8][..], &[0xc6], &[0xdd], &[0xdf], &[0x81, 0xa1, b'a', 0xdd], &[0x81, 0xdb]] {
            let msgpack = [header, &[0xff; 4]].concat();
            assert!(read(&plan("tfplan", &message_with(msgpack))).is_none(), "{header:x?}");
        }
        for nested in [&[0x91_u8][..], &[0x81, 0xa1, b'a']] {
            let msgpack = [&[0x81, 0xa1, b'a'], nested.repeat(100_000).as_slice(), &[0xc0]].concat();
            assert!(read(&plan("tfplan", &message_with(msgpack))).is_none(), "{nested:x?}");
        }
    }

    /// One entry of an archive: its name, whether it is compressed, and its content.
    type Entry = (String, bool, Vec<u8>);

    /// Entries beside `tfplan`, as terraform writes them and with other names.
    fn entries() -> impl Strategy<Value = Vec<Entry>> {
        let name = prop_oneof![
            prop::sample::select(vec![
                "tfstate",
                "tfstate-prev",
                "tfconfig/modules.json",
                ".terraform.lock.hcl",
                "tfplan/"
            ])
            .prop_map(str::to_owned),
            "[a-z./\\\\é-]{1,12}",
        ];
        let content = prop_oneof![
            prop::collection::vec(any::<u8>(), 0..200),
            (any::<u8>(), 0..5000_usize).prop_map(|(byte, length)| vec![byte; length]),
        ];
        prop::collection::vec((name, any::<bool>(), content), 0..6).prop_filter("a name twice", |entries| {
            let names: std::collections::BTreeSet<_> = entries.iter().map(|(name, ..)| name).collect();
            names.len() == entries.len() && !names.contains(&"tfplan".to_owned())
        })
    }

    fn archive(entries: &[Entry], comment: &str) -> Vec<u8> {
        let mut archive = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
        for (name, is_compressed, content) in entries {
            let method = if *is_compressed { zip::CompressionMethod::Deflated } else { zip::CompressionMethod::Stored };
            let options = zip::write::SimpleFileOptions::default().compression_method(method);
            archive.start_file(name, options).unwrap();
            archive.write_all(content).unwrap();
        }
        archive.set_comment(comment).unwrap();
        archive.finish().unwrap().into_inner()
    }

    /// An archive with a plan in any place among other entries.
    fn archive_with_plan() -> impl Strategy<Value = Vec<u8>> {
        (entries(), any::<prop::sample::Index>(), any::<bool>(), "[ -~]{0,20}").prop_map(
            |(mut entries, at, is_compressed, comment)| {
                let at = at.index(entries.len() + 1);
                entries.insert(at, ("tfplan".to_owned(), is_compressed, message()));
                archive(&entries, &comment)
            },
        )
    }

    fn read_bytes(archive: &[u8]) -> Option<DataDirectory> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(archive).unwrap();
        read(&file)
    }

    #[test]
    fn the_plan_is_found_among_any_other_entries() {
        crate::generated_input::for_all(file!(), &archive_with_plan(), |archive| {
            let read = read_bytes(&archive).ok_or_else(|| TestCaseError::fail("not read"))?;
            prop_assert_eq!(read.workspace, "green");
            prop_assert_eq!(
                read.backend.and_then(|backend| backend.string("key").map(str::to_owned)),
                Some("k".into())
            );
            Ok(())
        });
    }

    #[test]
    fn an_archive_of_any_entries_with_any_change_is_rejected_or_read() {
        let strategy = archive_with_plan().prop_flat_map(crate::generated_input::changed);
        crate::generated_input::for_all(file!(), &strategy, |archive| {
            let _ = read_bytes(&archive);
            Ok(())
        });
    }

    /// Changes one number in the headers of the archive: a size, an offset, a count, a method or a flag.
    #[test]
    fn a_wrong_number_in_a_header_of_an_archive_is_rejected_or_read() {
        let numbers = prop::sample::select(vec![0_u32, 1, 8, 0x7fff_ffff, 0xffff, 0xffff_fffe, 0xffff_ffff]);
        let strategy = (archive_with_plan(), any::<prop::sample::Index>(), 4..46_usize, 1..=4_usize, numbers);
        crate::generated_input::for_all(file!(), &strategy, |(mut archive, header, field, width, number)| {
            // The local headers, those of the directory, and the end of the directory.
            let is_header = |bytes: &[u8]| matches!(bytes, b"PK\x03\x04" | b"PK\x01\x02" | b"PK\x05\x06");
            let headers: Vec<usize> =
                archive.windows(4).enumerate().filter(|(_, bytes)| is_header(bytes)).map(|(at, _)| at).collect();
            let from = (headers[header.index(headers.len())] + field).min(archive.len());
            let to = (from + width).min(archive.len());
            archive[from..to].copy_from_slice(&number.to_le_bytes()[..to - from]);
            let _ = read_bytes(&archive);
            Ok(())
        });
    }

    #[test]
    fn a_plan_with_any_change_is_rejected_or_read() {
        crate::generated_input::for_all(file!(), &crate::generated_input::changed(message()), |message| {
            let _ = read(&plan("tfplan", &message));
            Ok(())
        });
    }

    #[test]
    fn an_archive_with_any_change_is_rejected_or_read() {
        use std::io::{Read, Seek};
        let mut archive = Vec::new();
        let mut file = plan("tfplan", &message());
        file.rewind().unwrap();
        file.read_to_end(&mut archive).unwrap();
        crate::generated_input::for_all(file!(), &crate::generated_input::changed(archive), |archive| {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(&archive).unwrap();
            let _ = read(&file);
            Ok(())
        });
    }
}
