//! Properties of the log's reader, tested with generated logs: records of several versions in any order, mixed with
//! other text, cut and resumed anywhere.

use proptest::prelude::*;

use super::other_versions::{tofu_life, v1_life};
use super::tests::{id_of, lock_line, unlock_line};
use super::*;
use crate::generated_input::{changed, for_all};

/// A piece of a generated log: some lines, or text that is not a record.
#[derive(Clone, Debug)]
enum Piece {
    /// The record with the version of the program.
    Version(&'static str),
    /// A record about the lock with this number. The second number is that of the request.
    Lock(&'static str, usize, u8),
    /// A record about the release of the lock with this number.
    Unlock(&'static str, usize),
    /// The two records of the local backend about a workspace.
    Workspace(u8),
    /// One record of a program that logs its requests: its place in the list of [`v1_life`] or [`tofu_life`].
    Request(bool, usize),
    /// A record of a lock with a newline in its key.
    OnSeveralLines(usize),
    /// Any text, such as that of a provisioner.
    Text(String),
    /// Any bytes, which may be invalid as UTF-8.
    Bytes(Vec<u8>),
}

const ASKING: &str = "Attempting to lock remote state (S3 Native and DynamoDB)...";
const LOCKED: &str = "Locked remote state (S3 Native and DynamoDB)";
const UNLOCKING: &str = "Attempting to unlock remote state (S3 Native and DynamoDB)...";
const UNLOCKED: &str = "Unlocked remote state (S3 Native and DynamoDB)";

impl Piece {
    /// Returns the piece as it is in the log. `second` is the time of its records.
    fn bytes(&self, second: u32) -> Vec<u8> {
        let time = format!("2026-11-23T01:46:{second:02}.593Z");
        let text = match self {
            Self::Version(program) => format!("{time} [INFO]  {program}\n"),
            Self::Lock(message, number, request) => lock_line(second, message, &id_of(*number), &format!("r{request}")),
            Self::Unlock(message, number) => unlock_line(second, message, &id_of(*number)),
            Self::Workspace(number) => format!(
                "{time} [TRACE] backend/local: requesting state lock for workspace \"w{number}\"\n\
                 {time} [TRACE] backend/local: reading remote state for workspace \"w{number}\"\n"
            ),
            Self::Request(tofu, step) => {
                let life = if *tofu { tofu_life(true) } else { v1_life() };
                life[step % life.len()].clone()
            }
            Self::OnSeveralLines(number) => lock_line(second, ASKING, &id_of(*number), "r1")
                .replace(" tf_backend.s3.path=dir/prod.tfstate", "\n  tf_backend.s3.path=\n  | dir\n  | x\n  "),
            Self::Text(text) => text.clone(),
            Self::Bytes(bytes) => return bytes.clone(),
        };
        text.into_bytes()
    }
}

fn piece() -> impl Strategy<Value = Piece> {
    let number = 1..4_usize;
    let programs = [
        "Terraform version: 1.11.4",
        "Terraform version: 1.5.7",
        "Terraform version: 1.7.0",
        "OpenTofu version: 1.11.0",
    ];
    prop_oneof![
        1 => prop::sample::select(programs.to_vec()).prop_map(Piece::Version),
        4 => (prop::sample::select(vec![ASKING, LOCKED]), number.clone(), 1..3_u8)
            .prop_map(|(message, number, request)| Piece::Lock(message, number, request)),
        3 => (prop::sample::select(vec![UNLOCKING, UNLOCKED]), number.clone())
            .prop_map(|(message, number)| Piece::Unlock(message, number)),
        1 => (1..3_u8).prop_map(Piece::Workspace),
        3 => (any::<bool>(), 0..12_usize).prop_map(|(tofu, step)| Piece::Request(tofu, step)),
        1 => number.prop_map(Piece::OnSeveralLines),
        1 => "[ -~\n]{0,40}".prop_map(Piece::Text),
        1 => prop::collection::vec(any::<u8>(), 0..20).prop_map(Piece::Bytes),
    ]
}

/// A whole log. Its records are one second apart.
fn log_text() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(piece(), 0..20)
        .prop_map(|pieces| pieces.iter().zip(7..).flat_map(|(piece, second)| piece.bytes(second)).collect())
}

fn read(bytes: &[u8]) -> Log {
    let mut log = Log::default();
    log.read(bytes);
    log
}

fn json(log: &Log) -> String {
    serde_json::to_string(log).unwrap()
}

#[test]
fn a_log_read_in_any_pieces_is_the_same_log() {
    let cuts = prop::collection::vec(any::<prop::sample::Index>(), 0..8);
    for_all(file!(), &(log_text(), cuts), |(text, cuts)| {
        let mut at: Vec<usize> = cuts.iter().map(|cut| cut.index(text.len() + 1)).collect();
        at.sort_unstable();
        let mut pieces = Log::default();
        let mut from = 0;
        for to in at.into_iter().chain([text.len()]) {
            pieces.read(&text[from..to]);
            from = to;
        }
        prop_assert_eq!(pieces, read(&text));
        Ok(())
    });
}

/// A guardian or a recovery resumes from the stored log, and reads the incomplete line or record again.
#[test]
fn a_log_that_is_resumed_anywhere_is_the_same_log() {
    for_all(file!(), &(log_text(), any::<prop::sample::Index>()), |(text, cut)| {
        let end = cut.index(text.len() + 1);
        let first = read(&text[..end]);
        let from = end - usize::try_from(first.unfinished()).unwrap();
        let mut second: Log = serde_json::from_str(&json(&first)).unwrap();
        second.read(&text[from..]);
        let whole = read(&text);
        prop_assert_eq!(json(&second), json(&whole), "cut at {}", end);
        prop_assert_eq!(second.is_torn(), whole.is_torn());
        prop_assert_eq!(second.unfinished(), whole.unfinished());
        Ok(())
    });
}

/// Only damaged logs may lose a lock. In a log with complete records, every lock that was requested and not released is
/// there, whatever other text is between the records.
#[test]
fn text_between_the_records_hides_no_lock() {
    let noise = "[a-z \\[\\]{}\"]{0,40}\n";
    let locks = prop::collection::vec((1..4_usize, noise), 1..8);
    for_all(file!(), &locks, |locks| {
        let mut text = "2026-11-23T01:46:06.000Z [INFO]  Terraform version: 1.11.4\n".to_owned();
        let mut asked = std::collections::BTreeSet::new();
        for ((number, noise), second) in locks.iter().zip(7..) {
            text.push_str(noise);
            text.push_str(&lock_line(second, ASKING, &id_of(*number), "r1"));
            asked.insert(id_of(*number));
        }
        let log = read(text.as_bytes());
        let found: std::collections::BTreeSet<String> = log.unreleased().map(|lock| lock.id.clone()).collect();
        prop_assert_eq!(found, asked);
        Ok(())
    });
}

#[test]
fn no_bytes_make_the_reader_panic() {
    for_all(file!(), &log_text().prop_flat_map(changed), |text| {
        let log = read(&text);
        let again: Log = serde_json::from_str(&json(&log)).unwrap();
        prop_assert_eq!(json(&again), json(&log));
        Ok(())
    });
}
