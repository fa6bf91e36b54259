//! Finds the values of command-line arguments in a core log, so that they can be redacted. Flags about locks and exit
//! codes are not redacted, because `tf` needs them.
//!
//! When it starts, terraform logs its whole command line twice, including `-var` and `-backend-config`. Before that, it
//! logs the environment variables that add words to the command line (main.go):
//!
//! ```text
//! 2026-11-23T01:46:07.529Z [INFO]  TF_CLI_ARGS_apply value: "-var token=swordfish"
//! 2026-11-23T01:46:07.529Z [INFO]  CLI args: []string{"/usr/bin/terraform", "apply", "-var", "password=hunter2"}
//! 2026-11-23T01:46:07.529Z [INFO]  CLI command args: []string{"apply", "-var", "password=hunter2"}
//! ```

use std::ops::Range;

/// The beginnings of the messages that contain arguments.
const MESSAGES: [&[u8]; 3] = [b"CLI args: []string{", b"CLI command args: []string{", b"TF_CLI_ARGS"];

/// Whether a word must not be redacted: it is a flag about locks or exit codes, without a value or with a value that
/// Go's `strconv.ParseBool` accepts.
fn is_kept(word: &[u8]) -> bool {
    const VALUES: [&[u8]; 12] =
        [b"1", b"t", b"T", b"true", b"TRUE", b"True", b"0", b"f", b"F", b"false", b"FALSE", b"False"];
    let Some(flag) = word.strip_prefix(b"-") else { return false };
    let flag = flag.strip_prefix(b"-").unwrap_or(flag);
    [&b"lock"[..], b"detailed-exitcode"].iter().any(|name| match flag.strip_prefix(*name) {
        Some([]) => true,
        Some([b'=', value @ ..]) => VALUES.contains(&value),
        _ => false,
    })
}

/// The maximum length of the text before the message, in bytes: a time with an offset, and a log level.
const MAX_HEAD_BYTES: usize = 48;

/// Whether a line that begins with `line` may be a record with arguments. `line` may be truncated at any byte.
pub(crate) fn may_have_arguments(line: &[u8]) -> bool {
    match message(line) {
        Some(message) => MESSAGES.iter().any(|known| message.starts_with(known) || known.starts_with(message)),
        None => line.len() < MAX_HEAD_BYTES,
    }
}

/// Returns the text after the log level of a record. `None` if `line` contains no log level.
fn message(line: &[u8]) -> Option<&[u8]> {
    let head = &line[..line.len().min(MAX_HEAD_BYTES)];
    let end = head.iter().position(|&byte| byte == b']')?;
    let spaces = line[end + 1..].iter().take_while(|&&byte| byte == b' ').count();
    Some(&line[end + 1 + spaces..])
}

/// Returns the byte ranges to redact in `line`, which must be a complete line. They are the contents of all quoted
/// words (Go's `%#v`), except the flags that are known to be harmless.
pub(crate) fn values(line: &[u8]) -> Vec<Range<usize>> {
    let Some(message) = message(line) else { return Vec::new() };
    let Some(known) = MESSAGES.iter().find(|known| message.starts_with(known)) else { return Vec::new() };
    let mut values = Vec::new();
    let mut at = line.len() - message.len() + known.len();
    while let Some(begin) = line[at..].iter().position(|&byte| byte == b'"').map(|place| at + place + 1) {
        let mut end = begin;
        while end < line.len() && line[end] != b'"' {
            // A quote after a backslash does not end the word.
            end += if line[end] == b'\\' { 2 } else { 1 };
        }
        let end = end.min(line.len());
        if begin < end && !is_kept(&line[begin..end]) {
            values.push(begin..end);
        }
        at = (end + 1).min(line.len());
    }
    values
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::terraform::log::Log;

    fn redacted(line: &str) -> String {
        let mut bytes = line.as_bytes().to_vec();
        for range in values(line.as_bytes()) {
            bytes[range].fill(b'*');
        }
        String::from_utf8(bytes).unwrap()
    }

    const HEAD: &str = "2026-11-23T01:46:07.529Z [INFO]  ";

    #[test]
    fn values_go_and_what_says_something_of_locks_stays() {
        for (arguments, expected) in [
            (r#""plan", "-var", "x=hunter2""#, r#""****", "****", "*********""#),
            (r#""plan", "-lock=false", "-var=x=\"hunter2\"""#, r#""****", "-lock=false", "******************""#),
            (r#""plan", "-detailed-exitcode""#, r#""****", "-detailed-exitcode""#),
            (r#""--lock=F", "-lock=x", "-lock-timeout=0s""#, r#""--lock=F", "*******", "****************""#),
            (r#""a\\", "hunter2""#, r#""***", "*******""#),
            ("", ""),
        ] {
            for message in ["CLI args: []string{", "CLI command args: []string{"] {
                let line = format!("{HEAD}{message}{arguments}}}\n");
                assert_eq!(redacted(&line), format!("{HEAD}{message}{expected}}}\n"));
            }
        }
        for name in ["", "_apply", "_state_mv"] {
            let line = format!("{HEAD}TF_CLI_ARGS{name} value: \"-var=x=\\\"hunter2\\\"\"\n");
            assert_eq!(redacted(&line), format!("{HEAD}TF_CLI_ARGS{name} value: \"******************\"\n"));
        }
        for other in [
            format!("{HEAD}backend-s3: Locked remote state (DynamoDB only): x=\"a b\"\n"),
            "  | \"hunter2\"\n".to_owned(),
            String::new(),
            "]".to_owned(),
        ] {
            assert_eq!(redacted(&other), other);
        }
    }

    #[test]
    fn a_log_tells_the_same_afterwards() {
        let text = format!(
            "{HEAD}Terraform version: 1.11.4\n{HEAD}CLI args: []string{{\"terraform\", \"plan\", \"-lock=false\", \"-var\", \"a=b\"}}\n\
             {HEAD}CLI command args: []string{{\"plan\", \"-lock=false\", \"-detailed-exitcode\", \"-var\", \"a=b\"}}\n"
        );
        let read = |text: &str| {
            let mut log = Log::default();
            log.read(text.as_bytes());
            log
        };
        let after: String = text.split_inclusive('\n').map(redacted).collect();
        assert!(!after.contains("a=b") && read(&after) == read(&text));
        assert!(read(&text).locking_disabled && read(&text).announces_changes);
    }

    #[test]
    fn a_line_that_is_cut_may_still_be_one_and_no_byte_panics() {
        let line = format!("{HEAD}CLI args: []string{{\"terraform\", \"x\\\"y\\");
        for length in 0..=line.len() {
            assert!(may_have_arguments(&line.as_bytes()[..length]), "{length}");
            let _ = values(&line.as_bytes()[..length]);
        }
        assert!(!may_have_arguments(format!("{HEAD}backend-s3: ").as_bytes()));
        assert!(!may_have_arguments("x".repeat(100).as_bytes()));
    }

    #[test]
    fn the_values_in_any_line_are_within_the_line_and_in_order() {
        use proptest::prelude::*;
        let line =
            r#"2026-11-23T01:46:07.565Z [INFO]  CLI args: []string{"terraform", "apply", "-var", "a=\"b", "-var=x=y"}"#;
        crate::generated_input::for_all(file!(), &crate::generated_input::changed(line.as_bytes().to_vec()), |line| {
            let _ = may_have_arguments(&line);
            let mut last = 0;
            for value in values(&line) {
                prop_assert!(last <= value.start && value.start <= value.end && value.end <= line.len(), "{value:?}");
                last = value.end;
            }
            Ok(())
        });
    }
}
