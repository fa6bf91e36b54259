//! A plan that `terraform plan -out` has written, and the backend and the workspace in it. `terraform apply PLANFILE`
//! uses these instead of those in the data directory (internal/command/meta_backend.go, `BackendForLocalPlan`).
//!
//! A plan is a ZIP archive (internal/plans/planfile/writer.go). Its entry `tfplan` is a Protocol Buffers message
//! (internal/plans/planproto/planfile.proto), which contains the attributes of the backend as MessagePack. OpenTofu can
//! encrypt a plan; `tf` cannot read such a plan.

use std::fs::File;
use std::io::Read;

use prost::Message;
use serde_json::{Map, Value};

use super::backend::CachedBackend;
use super::data_directory::DataDirectory;

/// The maximum size of the entry `tfplan`: 256 MiB, in bytes. A larger plan is not read. `tf` then searches for the
/// lock in the backend of the data directory.
const MAX_PLAN_BYTES: u64 = 256 << 20;

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
    let config: Map<String, Value> = rmp_serde::from_slice(&backend.config?.msgpack).ok()?;
    Some(DataDirectory {
        backend: Some(CachedBackend::of_parts(&backend.kind, config, &plan.terraform_version)),
        workspace: backend.workspace,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

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
