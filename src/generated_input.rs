//! Support for tests with generated input. A test runs 256 cases. `make fuzz` sets `TFW_FUZZ_SECONDS`, so that each
//! test runs new cases for that many seconds.
//!
//! If a case fails, proptest prints the smallest input that fails, and writes its seed to a file beside the source
//! file, with the extension `proptest-regressions`. Each later run tries the seeds in that file first.

use std::time::{Duration, Instant};

use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::{Config, FileFailurePersistence, TestRunner};

/// Calls `check` with values of `strategy`. `source` is the path of the test's file, from `file!()`.
pub(crate) fn for_all<S: Strategy>(
    source: &'static str,
    strategy: &S,
    check: impl Fn(S::Value) -> Result<(), TestCaseError>,
) {
    let seconds = std::env::var("TFW_FUZZ_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(0);
    let until = Instant::now() + Duration::from_secs(seconds);
    loop {
        let config = Config {
            source_file: Some(source),
            failure_persistence: Some(Box::new(FileFailurePersistence::WithSource("proptest-regressions"))),
            ..Config::default()
        };
        if let Err(error) = TestRunner::new(config).run(strategy, &check) {
            panic!("{error}\n{source}");
        }
        if Instant::now() >= until {
            return;
        }
    }
}

/// A change of a text.
#[derive(Clone, Debug)]
enum Edit {
    Remove(Index, usize),
    Insert(Index, Vec<u8>),
    /// Replaces bytes and keeps the length, so that formats with lengths and offsets stay readable.
    Overwrite(Index, Vec<u8>),
    /// Repeats a piece of this length so many times.
    Repeat(Index, usize, usize),
    /// Cuts the rest off.
    Cut(Index),
}

/// Texts with a meaning in the formats that `tf` reads.
const TOKENS: [&str; 24] = [
    "{",
    "}",
    "[",
    "]",
    "\"",
    "\\",
    "null",
    "true",
    ":",
    ",",
    "=",
    "\n",
    "\r\n",
    "\0",
    "${",
    "%{",
    "<<EOT\n",
    "-1",
    "1e999",
    "18446744073709551616",
    "\u{feff}",
    "\u{1b}[2J",
    "../",
    "é",
];

fn edit() -> impl Strategy<Value = Edit> {
    let text = prop_oneof![
        prop::sample::select(TOKENS.to_vec()).prop_map(|token| token.as_bytes().to_vec()),
        prop::collection::vec(any::<u8>(), 1..8),
    ];
    prop_oneof![
        2 => (any::<Index>(), 1..20_usize).prop_map(|(at, length)| Edit::Remove(at, length)),
        4 => (any::<Index>(), text).prop_map(|(at, text)| Edit::Insert(at, text)),
        3 => (any::<Index>(), prop::collection::vec(any::<u8>(), 1..4))
            .prop_map(|(at, bytes)| Edit::Overwrite(at, bytes)),
        2 => (any::<Index>(), 1..12_usize, 1..300_usize)
            .prop_map(|(at, length, times)| Edit::Repeat(at, length, times)),
        1 => any::<Index>().prop_map(Edit::Cut),
    ]
}

fn apply(text: &mut Vec<u8>, edit: &Edit) {
    let place = |at: &Index| at.index(text.len() + 1);
    match edit {
        Edit::Remove(at, length) => {
            let from = place(at);
            let to = (from + length).min(text.len());
            drop(text.drain(from..to));
        }
        Edit::Insert(at, inserted) => {
            let at = place(at);
            drop(text.splice(at..at, inserted.iter().copied()));
        }
        Edit::Overwrite(at, bytes) => {
            let from = place(at);
            let to = (from + bytes.len()).min(text.len());
            text[from..to].copy_from_slice(&bytes[..to - from]);
        }
        Edit::Repeat(at, length, times) => {
            let from = place(at);
            let piece = text[from..(from + length).min(text.len())].repeat(*times);
            drop(text.splice(from..from, piece));
        }
        Edit::Cut(at) => text.truncate(place(at)),
    }
}

/// Returns `sample` with up to five changes: pieces are removed, inserted, replaced and repeated.
pub(crate) fn changed(sample: Vec<u8>) -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(edit(), 0..6).prop_map(move |edits| {
        let mut text = sample.clone();
        for edit in &edits {
            apply(&mut text, edit);
        }
        text
    })
}

/// The same for text. Bytes that are not UTF-8 are replaced.
pub(crate) fn changed_text(sample: &str) -> impl Strategy<Value = String> + use<> {
    changed(sample.as_bytes().to_vec()).prop_map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
}

/// Checks that what was read from `text` as JSON is written and read back unchanged. A text that cannot be read is
/// fine.
pub(crate) fn is_read_back<T: serde::Serialize + serde::de::DeserializeOwned>(
    text: &[u8],
) -> Result<(), TestCaseError> {
    let Ok(value) = serde_json::from_slice::<T>(text) else { return Ok(()) };
    let written = serde_json::to_string(&value).unwrap();
    let again: T =
        serde_json::from_str(&written).map_err(|error| TestCaseError::fail(format!("{written}: {error}")))?;
    prop_assert_eq!(serde_json::to_string(&again).unwrap(), written);
    Ok(())
}
