//! The tables and buckets that `list` and `audit` read: one, or several that the command line and a file name.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use clap::builder::NonEmptyStringValueParser;
use clap::{ArgGroup, Args, Parser};
use serde::Serialize;

use super::Finding;
use super::connection::{LocationArgs, Trouble};
use super::found::{ListedEntry, not_whole};
use crate::console::{say, visible, visible_whole};

/// The maximum size of a file with targets: 1 MiB.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// The message below the messages about bad lines.
const LINE_EXAMPLE: &str =
    "each line names one target, for example: --table terraform-locks --region eu-west-1 --profile prod";

/// The options that say what to read. Without any of them, a command reads the backend of the current directory. No
/// value may be empty, as in [`LocationArgs`].
#[derive(Args, Clone, Debug, Default)]
#[command(group = ArgGroup::new("outside").args(["table", "bucket", "from"]).multiple(true))]
#[command(group = ArgGroup::new("rated").args(["table", "from"]).multiple(true))]
pub(super) struct TargetArgs {
    /// Use the backend of this working directory, like terraform's -chdir
    #[arg(long, value_name = "DIR", conflicts_with_all = ["table", "bucket", "from"])]
    chdir: Option<PathBuf>,
    /// Look in this DynamoDB table, whatever the current directory is; can be given several times
    #[arg(long, value_name = "TABLE", value_parser = NonEmptyStringValueParser::new())]
    table: Vec<String>,
    /// Look at the .tflock objects in this S3 bucket, whatever the current directory is; can be given several times
    #[arg(long, value_name = "BUCKET", value_parser = NonEmptyStringValueParser::new())]
    bucket: Vec<String>,
    /// Also read the tables and buckets in FILE (- for stdin): one on each line, with the options --table or --bucket,
    /// --prefix, --region, --profile, --endpoint-url and --rate
    #[arg(long, value_name = "FILE")]
    from: Option<PathBuf>,
    /// Only look at objects whose key starts with PREFIX
    #[arg(long, value_name = "PREFIX", requires = "bucket")]
    prefix: Option<String>,
    /// The region of the tables and buckets (default: the region that the AWS CLI would use)
    #[arg(long, value_name = "REGION", requires = "outside", value_parser = NonEmptyStringValueParser::new())]
    region: Option<String>,
    /// The AWS profile to use
    #[arg(long, value_name = "PROFILE", requires = "outside", value_parser = NonEmptyStringValueParser::new())]
    profile: Option<String>,
    /// The endpoint URL, for a service that is not AWS itself
    #[arg(long, value_name = "URL", requires = "outside", value_parser = NonEmptyStringValueParser::new())]
    endpoint_url: Option<String>,
}

/// How fast a table is read.
#[derive(Args, Clone, Copy, Debug, Default)]
pub(super) struct Speed {
    /// Read at most UNITS read capacity units per second (default: 1/4 of the table's; no limit if it has none)
    #[arg(long, value_name = "UNITS", requires = "rated", value_parser = units)]
    pub(super) rate: Option<f64>,
}

impl Speed {
    /// Returns this speed, or `default` if this one sets no rate.
    pub(super) fn or(self, default: Self) -> Self {
        Self { rate: self.rate.or(default.rate) }
    }
}

fn units(text: &str) -> Result<f64, String> {
    let number: f64 = text.parse().map_err(|_| "it must be a number".to_owned())?;
    if number.is_finite() && number > 0.0 { Ok(number) } else { Err("it must be more than 0".to_owned()) }
}

/// What a command is to read.
pub(super) enum Targets {
    /// The backend of a directory, one table or one bucket.
    One(LocationArgs),
    /// Several tables and buckets, or those of a file.
    Several(Fleet),
}

/// Several targets.
#[derive(Debug)]
pub(super) struct Fleet {
    /// The tables of the command line, its buckets, and the lines of the file, each in their order, without repetition.
    pub(super) targets: Vec<Target>,
    /// The lines of the file that name no target.
    pub(super) bad_lines: Vec<BadLine>,
}

/// A table or a bucket.
#[derive(Clone, Debug)]
pub(super) struct Target {
    pub(super) place: LocationArgs,
    pub(super) speed: Speed,
}

/// A line of the file that names no target.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct BadLine {
    /// The number of the line. The first line has the number 1.
    pub(super) line: usize,
    /// Why it names no target.
    pub(super) reason: String,
}

/// A target as it was given. An option that was not given is `None`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct TargetName {
    /// `table` or `bucket`.
    pub(super) kind: &'static str,
    /// The name of the table or bucket.
    pub(super) name: String,
    pub(super) prefix: Option<String>,
    pub(super) region: Option<String>,
    pub(super) profile: Option<String>,
    pub(super) endpoint_url: Option<String>,
}

/// What was found in a target or in all of them, for a person.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Tally {
    pub(super) locks: u64,
    /// How many of `locks` are stale.
    pub(super) stale: u64,
    /// The entries in a lock's place that are not locks.
    pub(super) no_locks: u64,
    /// The lock objects that could not be read.
    pub(super) unread: u64,
}

/// The options of one line of the file.
#[derive(Debug, Parser)]
#[command(no_binary_name = true, disable_help_flag = true, name = "line")]
struct Line {
    #[command(flatten)]
    place: LocationArgs,
    #[command(flatten)]
    speed: Speed,
}

impl TargetArgs {
    /// Returns what to read. Reads the file with targets if there is one, and prints a message for each bad line of it.
    ///
    /// # Errors
    /// Fails if the file cannot be read, is larger than 1 MiB, or has no line that names a target or should name one.
    pub(super) fn targets(&self, speed: Speed) -> Result<Targets, Trouble> {
        let tables = self.table.iter().map(|table| LocationArgs { table: Some(table.clone()), ..self.defaults() });
        let buckets = self.bucket.iter().map(|bucket| {
            let prefix = self.prefix.clone();
            LocationArgs { bucket: Some(bucket.clone()), prefix, ..self.defaults() }
        });
        let mut named: Vec<LocationArgs> = tables.chain(buckets).collect();
        let Some(file) = &self.from else {
            if named.len() <= 1 {
                let directory = LocationArgs { chdir: self.chdir.clone(), ..LocationArgs::default() };
                return Ok(Targets::One(named.pop().unwrap_or(directory)));
            }
            let targets = named.into_iter().map(|place| Target { place, speed });
            return Ok(Targets::Several(Fleet { targets: once_each(targets), bad_lines: Vec::new() }));
        };
        let shown = visible_whole(&file.display().to_string());
        let text = read(file).map_err(|error| {
            Trouble::Said(format!("could not read the targets in {shown}: {error}\n{LINE_EXAMPLE}"))
        })?;
        let (mut targets, mut bad_lines) = (Vec::new(), Vec::new());
        for line in lines(&text, &self.defaults(), speed) {
            match line {
                Ok(target) => targets.push(target),
                Err(bad) => bad_lines.push(bad),
            }
        }
        if targets.is_empty() && bad_lines.is_empty() {
            return Err(Trouble::Said(format!("{shown} names no target\n{LINE_EXAMPLE}")));
        }
        for BadLine { line, reason } in &bad_lines {
            say(&format!("{shown}, line {line}: {reason}"));
        }
        if !bad_lines.is_empty() {
            say(LINE_EXAMPLE);
        }
        let targets = named.into_iter().map(|place| Target { place, speed }).chain(targets);
        Ok(Targets::Several(Fleet { targets: once_each(targets), bad_lines }))
    }

    /// Returns the options that every target without an option of its own gets.
    fn defaults(&self) -> LocationArgs {
        LocationArgs {
            region: self.region.clone(),
            profile: self.profile.clone(),
            endpoint_url: self.endpoint_url.clone(),
            ..LocationArgs::default()
        }
    }
}

/// Reads a file, or stdin for `-`.
fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    let file: Box<dyn Read> = if path == Path::new("-") { Box::new(io::stdin()) } else { Box::new(File::open(path)?) };
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut text)?;
    if text.len() as u64 > MAX_FILE_BYTES {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, "it is larger than 1 MiB"));
    }
    Ok(text)
}

/// Returns the target or the mistake of each line that is neither empty nor a comment.
fn lines(text: &[u8], defaults: &LocationArgs, speed: Speed) -> Vec<Result<Target, BadLine>> {
    let text = text.strip_prefix("\u{feff}".as_bytes()).unwrap_or(text);
    let parsed = text.split(|&byte| byte == b'\n').enumerate().filter_map(|(index, line)| {
        let target = match std::str::from_utf8(line) {
            Ok(line) => target(line.trim()).transpose()?,
            Err(_) => Err("it is not UTF-8".to_owned()),
        };
        Some(target.map_err(|reason| BadLine { line: index + 1, reason }))
    });
    parsed.map(|target| target.map(|target| target.with_defaults(defaults, speed))).collect()
}

/// Parses one line. `None` if it is empty or a comment.
fn target(line: &str) -> Result<Option<Target>, String> {
    let words = shell_words::split(line).map_err(|error| error.to_string())?;
    if words.is_empty() {
        return Ok(None);
    }
    let Line { place, speed } = Line::try_parse_from(words).map_err(|error| reason(&error.to_string()))?;
    if !place.is_outside() {
        return Err("it names neither a table nor a bucket".to_owned());
    }
    Ok(Some(Target { place, speed }))
}

/// Returns clap's reason and its tip on one line, without the usage.
fn reason(error: &str) -> String {
    let (error, _) = error.split_once("\nUsage:").unwrap_or((error, ""));
    let lines = error.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with("For more"));
    visible(lines.collect::<Vec<_>>().join("; ").trim_start_matches("error: "))
}

/// Returns the targets without those that repeat an earlier one.
fn once_each(targets: impl Iterator<Item = Target>) -> Vec<Target> {
    let mut seen = Vec::new();
    targets
        .filter(|target| {
            // Two users of one service may see different things.
            let what = (target.name(), target.place.endpoint_url.clone());
            let is_new = !seen.contains(&what);
            seen.push(what);
            is_new
        })
        .collect()
}

/// Returns `url` without the user name and the password in it. They must not be printed: metrics and logs are kept, and
/// others read them.
fn without_user(url: &str) -> String {
    let start = url.find("://").map_or(0, |index| index + 3);
    let (scheme, rest) = url.split_at(start);
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let host = rest[..end].rfind('@').map_or(0, |index| index + 1);
    format!("{scheme}{}", &rest[host..])
}

impl Target {
    fn with_defaults(self, defaults: &LocationArgs, speed: Speed) -> Self {
        let LocationArgs { region, profile, endpoint_url, .. } = defaults.clone();
        let place = LocationArgs {
            region: self.place.region.or(region),
            profile: self.place.profile.or(profile),
            endpoint_url: self.place.endpoint_url.or(endpoint_url),
            ..self.place
        };
        Self { place, speed: self.speed.or(speed) }
    }

    /// Returns the target as it was given, without the user name and the password in its URL.
    pub(super) fn name(&self) -> TargetName {
        let LocationArgs { table, bucket, prefix, region, profile, endpoint_url, .. } = self.place.clone();
        let kind = if table.is_some() { "table" } else { "bucket" };
        // An empty prefix selects all keys, as no prefix does. In Prometheus, an empty label is a missing one.
        let prefix = prefix.filter(|prefix| !prefix.is_empty());
        let endpoint_url = endpoint_url.as_deref().map(without_user);
        TargetName { kind, name: table.or(bucket).unwrap_or_default(), prefix, region, profile, endpoint_url }
    }
}

impl TargetName {
    /// Returns the options that were given, each with its name.
    fn options(&self) -> impl Iterator<Item = (&'static str, &str)> {
        let options = [
            ("prefix", &self.prefix),
            ("region", &self.region),
            ("profile", &self.profile),
            ("endpoint_url", &self.endpoint_url),
        ];
        options.into_iter().filter_map(|(name, value)| Some((name, value.as_deref()?)))
    }

    /// Returns the target in words.
    pub(super) fn describe(&self) -> String {
        let options = self.options().map(|(name, value)| format!(", {} {}", name.replace('_', " "), visible(value)));
        format!("{} {}{}", self.kind, visible(&self.name), options.collect::<String>())
    }

    /// Prints what was found in the target, or why it could not be read. If `failure_only` is set, prints nothing about
    /// a target that was read completely.
    pub(super) fn report(&self, tally: Tally, error: Option<&str>, failure_only: bool) {
        match error {
            Some(error) => say(&format!("{}: not read completely\n{error}", self.describe())),
            None if failure_only && tally.unread == 0 => {}
            None => say(&format!("{}: {}", self.describe(), tally.describe())),
        }
        if tally.unread > 0 {
            say(&not_whole(tally.unread));
        }
    }

    /// Returns the labels of the target in the Prometheus text format, without braces.
    pub(super) fn labels(&self) -> String {
        let all = [("kind", self.kind), ("name", self.name.as_str())].into_iter().chain(self.options());
        let escaped = |value: &str| value.replace('\\', r"\\").replace('"', "\\\"").replace('\n', r"\n");
        all.map(|(name, value)| format!("{name}=\"{}\"", escaped(value))).collect::<Vec<_>>().join(",")
    }
}

impl Tally {
    pub(super) fn of(entries: &[ListedEntry]) -> Self {
        let mut tally = Self::default();
        for entry in entries {
            match entry {
                ListedEntry::Lock(lock) => {
                    tally.locks += 1;
                    tally.stale += u64::from(lock.stale);
                }
                ListedEntry::UnreadableLock(entry) if entry.is_unread() => tally.unread += 1,
                ListedEntry::UnreadableLock(_) => tally.no_locks += 1,
            }
        }
        tally
    }

    /// Adds what was found elsewhere.
    pub(super) fn add(&mut self, other: Self) {
        self.locks += other.locks;
        self.stale += other.stale;
        self.no_locks += other.no_locks;
        self.unread += other.unread;
    }

    /// Returns whether something needs attention. An entry that is not a lock blocks every run, however old it is, so
    /// it counts like a stale lock.
    pub(super) fn needs_attention(self) -> bool {
        self.stale + self.no_locks > 0
    }

    /// Returns the numbers in words.
    pub(super) fn describe(self) -> String {
        let mut text = format!("{}, {} stale", counted(self.locks, "lock"), self.stale);
        if self.no_locks > 0 {
            text = format!("{text}, {} not a lock", self.no_locks);
        }
        if self.unread > 0 {
            text = format!("{text}, {} not read", self.unread);
        }
        text
    }
}

fn counted(number: u64, noun: &str) -> String {
    if number == 1 { format!("1 {noun}") } else { format!("{number} {noun}s") }
}

impl Fleet {
    /// Returns the line about all targets. `failed` is the number of targets that could not be read.
    pub(super) fn total(&self, tally: Tally, failed: usize) -> String {
        let mut text = format!("total: {} in {}", tally.describe(), counted(self.targets.len() as u64, "target"));
        if failed > 0 {
            text = format!("{text}, {failed} of them not read completely");
        }
        if !self.bad_lines.is_empty() {
            text = format!("{text}; {} not understood", counted(self.bad_lines.len() as u64, "line"));
        }
        text
    }

    /// Returns the result for all targets. `failed` is the number of targets that could not be read.
    pub(super) fn finding(&self, tally: Tally, failed: usize) -> Finding {
        let is_failed = failed > 0 || !self.bad_lines.is_empty() || tally.unread > 0;
        match (tally.needs_attention(), is_failed) {
            (true, true) => Finding::StaleAndFailed,
            (true, false) => Finding::Stale,
            (false, true) => Finding::Failed,
            (false, false) => Finding::Nothing,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &[u8], region: Option<&str>) -> Vec<Result<String, (usize, String)>> {
        let defaults = LocationArgs { region: region.map(ToOwned::to_owned), ..LocationArgs::default() };
        let lines = lines(text, &defaults, Speed::default()).into_iter();
        lines.map(|line| line.map(|target| target.name().describe()).map_err(|bad| (bad.line, bad.reason))).collect()
    }

    #[test]
    fn a_user_name_and_a_password_in_a_url_are_not_shown() {
        for (url, expected) in [
            ("http://x:8000/path", "http://x:8000/path"),
            ("http://anna:hunter2@x:8000/path", "http://x:8000/path"),
            ("http://anna:hun@ter2@x", "http://x"),
            ("http://anna@x?a=b@c", "http://x?a=b@c"),
            ("http://x/a@b", "http://x/a@b"),
            ("anna:hunter2@x", "x"),
            ("", ""),
        ] {
            assert_eq!(without_user(url), expected);
            let place = LocationArgs { endpoint_url: Some(url.to_owned()), ..LocationArgs::default() };
            let name = Target { place, speed: Speed::default() }.name();
            let shown = format!("{} {} {}", name.describe(), name.labels(), serde_json::to_string(&name).unwrap());
            assert!(shown.matches(expected).count() >= 3 && !shown.contains("hunter2"), "{shown}");
        }
    }

    #[test]
    fn the_same_table_for_two_users_is_two_targets() {
        let target = |url: &str| {
            let place = LocationArgs { endpoint_url: Some(url.to_owned()), ..LocationArgs::default() };
            Target { place, speed: Speed::default() }
        };
        let urls = ["http://anna:a@x", "http://bert:b@x", "http://anna:a@x"];
        assert_eq!(once_each(urls.into_iter().map(target)).len(), 2);
    }

    #[test]
    fn a_line_is_a_target_with_its_own_options_or_those_of_the_command() {
        for (line, expected) in [
            ("--table t", "table t, region r"),
            ("--bucket b --prefix p/ --region eu-west-1", "bucket b, prefix p/, region eu-west-1"),
            (
                "  --table=t --profile 'a b' --endpoint-url http://x\r",
                "table t, region r, profile a b, endpoint url http://x",
            ),
            ("--table t --rate 2.5 # quarterly", "table t, region r"),
            ("--bucket b --prefix ''", "bucket b, region r"),
            ("\u{feff}--table t", "table t, region r"),
        ] {
            assert_eq!(parsed(line.as_bytes(), Some("r")), [Ok(expected.to_owned())], "{line}");
        }
        assert!(parsed(b"\n# a comment\n   \n\t# another\r\n", None).is_empty());
    }

    #[test]
    fn a_bad_line_is_named_by_its_number_and_the_others_are_targets() {
        for (bad, expected) in [
            (&b"--regoin x --table t"[..], "--region"),
            (b"--table a --bucket b", "cannot be used with"),
            (b"--table a --prefix p", "cannot be used with"),
            (b"--region eu-west-1", "required"),
            (b"terraform-locks", "unexpected argument 'terraform-locks'"),
            (b"--chdir prod", "neither a table nor a bucket"),
            (b"--table", "a value is required"),
            (b"--table ''", "a value is required"),
            (b"--table 'open", "missing closing quote"),
            (b"--table t --rate 0", "more than 0"),
            (b"--help", "unexpected argument"),
            (b"--table \xff", "not UTF-8"),
            (b"--table t \x1b]0;x\x07\x1b[2J", "unexpected argument"),
        ] {
            let text = [b"--table a\n\n", bad, b"\n--bucket z"].concat();
            let [Ok(_), Err((3, reason)), Ok(_)] = &parsed(&text, None)[..] else {
                panic!("{:?}", parsed(&text, None))
            };
            assert!(reason.contains(expected) && !reason.contains("Usage"), "{reason}");
            assert!(reason.chars().all(|character| !character.is_control()), "{reason:?}");
        }
    }

    fn several(words: &[&str]) -> Vec<String> {
        #[derive(Parser)]
        #[command(no_binary_name = true)]
        struct Command {
            #[command(flatten)]
            targets: TargetArgs,
        }
        match Command::parse_from(words).targets.targets(Speed::default()).unwrap() {
            Targets::One(place) => vec![place.command("list")],
            Targets::Several(fleet) => fleet.targets.iter().map(|target| target.name().describe()).collect(),
        }
    }

    #[test]
    fn one_table_or_bucket_is_as_before_and_each_of_several_is_read_once() {
        assert_eq!(several(&["--table", "t"]), ["tf locks list --table t"]);
        assert_eq!(several(&["--bucket", "b", "--region", "r"]), ["tf locks list --bucket b --region r"]);
        assert_eq!(several(&["--chdir", "d"]), ["tf locks list --chdir d"]);
        let all = ["--bucket", "b", "--table", "t", "--table", "u", "--table", "t", "--prefix", "p", "--profile", "x"];
        assert_eq!(several(&all), ["table t, profile x", "table u, profile x", "bucket b, prefix p, profile x"]);
    }

    #[test]
    fn the_exit_code_of_several_targets_says_that_something_is_stale_and_that_something_failed() {
        let fleet = |bad: usize| Fleet {
            targets: Vec::new(),
            bad_lines: vec![BadLine { line: 1, reason: String::new() }; bad],
        };
        for (stale, no_locks, unread, failed, bad) in (0..32_u64)
            .map(|bits| (bits & 1, bits >> 1 & 1, bits >> 2 & 1, (bits >> 3 & 1) as usize, (bits >> 4) as usize))
        {
            let found = fleet(bad).finding(Tally { locks: 1, stale, no_locks, unread }, failed);
            let (needs_attention, is_failed) = (stale + no_locks > 0, unread > 0 || failed > 0 || bad > 0);
            assert_eq!(found.code(), 2 * u8::from(needs_attention) + u8::from(is_failed));
        }
    }

    #[test]
    fn a_label_is_escaped() {
        let place = LocationArgs { table: Some("a\"b\\c\nd".into()), ..LocationArgs::default() };
        let labels = Target { place, speed: Speed::default() }.name().labels();
        assert_eq!(labels, r#"kind="table",name="a\"b\\c\nd""#);
    }

    #[test]
    fn a_rate_is_a_number_above_nothing() {
        assert_eq!(units("2.5"), Ok(2.5));
        for text in ["0", "-1", "NaN", "inf", "many", ""] {
            assert!(units(text).is_err(), "{text}");
        }
    }
}
