//! Shows locks as a table that fits the terminal, as plain lines for a pipe, or as JSON. Entries are written one by
//! one, so that a million locks need no more memory than ten.

use std::borrow::Cow;
use std::cell::LazyCell;
use std::fs::File;
use std::io::{self, Read, Seek, Write};

use ::console::{Style, Term};
use jiff::Timestamp;
use jiff::fmt::temporal::DateTimePrinter;
use serde::Serialize;
use unicode_width::UnicodeWidthStr;

use super::connection::Trouble;
use super::found::{FoundLock, ListedEntry, UnreadableLock, age_at};
use super::stop_requests::StopRequests;
use super::targets::{BadLine, TargetName};
use crate::console::{ellipsis, is_plain, length_of_time, visible, visible_in_place};
use crate::holder::evidence::Verdict;
use crate::holder::lease_text;
use crate::lock::stores::StoreKey;
use crate::{console, json};

/// Writes locks to stdout.
pub(super) enum Output {
    /// A table, on a terminal.
    Table(Table),
    /// Plain lines, in a pipe or file.
    Lines(Widths),
    /// One JSON object, with `--json`.
    Json(Json),
}

/// The format in which locks are shown. It is a copy, because the [`Output`] itself is in use while a scan runs.
#[derive(Clone, Copy, Debug)]
pub(super) enum Format {
    Table(Layout),
    Lines(Widths),
    Json {
        /// The index of the current target; `None` if there are not several.
        target: Option<usize>,
    },
}

/// The widths of the columns, in terminal columns.
#[derive(Clone, Copy, Debug)]
pub(super) struct Widths {
    path: usize,
    workspace: usize,
    operation: usize,
    who: usize,
}

/// What is reported at the end of the output.
#[derive(Debug)]
pub(super) struct End {
    /// Whether everything was checked.
    pub(super) complete: bool,
    /// The number of items, objects or states that were checked.
    pub(super) scanned: u64,
    /// What is reported about several targets; `None` for one.
    pub(super) fleet: Option<FleetEnd>,
}

/// What is reported about several targets.
#[derive(Debug)]
pub(super) struct FleetEnd {
    pub(super) targets: Vec<TargetEnd>,
    pub(super) bad_lines: Vec<BadLine>,
}

/// What is reported about one of several targets.
#[derive(Debug, Serialize)]
pub(super) struct TargetEnd {
    pub(super) target: TargetName,
    /// Why the target could not be read completely; `None` if no request failed.
    pub(super) error: Option<String>,
    /// Whether everything in the target was checked.
    pub(super) complete: bool,
    /// The number of items or objects that were checked.
    pub(super) scanned: u64,
}

/// An entry of one of several targets.
#[derive(Serialize)]
struct InTarget<'a, T> {
    #[serde(flatten)]
    entry: &'a T,
    /// The index of the target in `targets`.
    target: usize,
}

impl Widths {
    /// The widths for locks that are not known beforehand.
    pub(super) const USUAL: Self = Self { path: 48, workspace: 10, operation: 10, who: 20 };

    /// Returns the widths that `entries` need, at most 200 for each column.
    pub(super) fn of<'a>(entries: impl IntoIterator<Item = &'a ListedEntry>) -> Self {
        let mut widths = Self { path: 4, workspace: 9, operation: 9, who: 3 };
        for entry in entries {
            let ListedEntry::Lock(lock) = entry else { continue };
            let wider = |known: usize, text: &str| known.max(visible(text).width()).min(200);
            widths.path = wider(widths.path, &lock.path());
            widths.workspace = wider(widths.workspace, lock.workspace.as_deref().unwrap_or("-"));
            widths.operation = wider(widths.operation, operation(lock));
            widths.who = wider(widths.who, &lock.info.who);
        }
        widths
    }
}

/// The text of several entries, as it will be shown.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Rows {
    text: Text,
    /// In JSON, the text of the entries that are not locks. They follow all locks. Otherwise empty.
    at_end: Text,
}

/// A text in pieces. One buffer for a page would be copied whenever it grows.
#[derive(Debug, Default, PartialEq)]
struct Text(Vec<Vec<u8>>);

impl Text {
    /// The length of a piece, in bytes. A piece is longer only if its last entry and the separator before it are longer
    /// than [`Self::ENTRY`].
    const PIECE: usize = 1 << 16;
    /// The length of an entry, in bytes, that almost no entry exceeds.
    const ENTRY: usize = 1 << 12;

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns the piece to which the next entry is to be added.
    fn next_piece(&mut self) -> &mut Vec<u8> {
        if self.0.last().is_none_or(|piece| piece.len() + Self::ENTRY > Self::PIECE) {
            self.0.push(Vec::with_capacity(Self::PIECE));
        }
        let last = self.0.len() - 1;
        &mut self.0[last]
    }
}

impl Output {
    /// Selects the format: JSON if `json` is set, a table if stdout is a terminal, otherwise plain lines.
    ///
    /// # Errors
    /// Fails if stdout was closed when this process started.
    pub(super) fn new(json: bool, widths: Widths) -> io::Result<Self> {
        console::stdout_is_open()?;
        let terminal = Term::stdout();
        if json {
            Ok(Self::Json(Json { later: None, has_locks: false, target: None }))
        } else if terminal.is_term() {
            let layout = Layout::new(usize::from(terminal.size().1), widths);
            Ok(Self::Table(Table { layout, headed: false }))
        } else {
            Ok(Self::Lines(widths))
        }
    }

    /// Returns the format of the entries. With several targets, it is that of the current target.
    pub(super) fn format(&self) -> Format {
        match self {
            Self::Table(table) => Format::Table(table.layout),
            Self::Lines(widths) => Format::Lines(*widths),
            Self::Json(json) => Format::Json { target: json.target },
        }
    }

    /// Writes the entries of several rows, which [`Format::rows`] has returned.
    ///
    /// # Errors
    /// Fails if the text cannot be written, for example because the reader of stdout has exited, or if a signal asks
    /// this process to end while it waits for that reader.
    pub(super) fn put(&mut self, rows: &Rows, stop_requests: &mut StopRequests) -> Result<(), Trouble> {
        let before = match self {
            Self::Json(json) => {
                json.keep(&rows.at_end)?;
                json.before(&rows.text).to_owned()
            }
            Self::Table(table) if !rows.text.is_empty() => table.head(),
            Self::Table(_) | Self::Lines(_) => String::new(),
        };
        stop_requests.write(before.as_bytes())?;
        rows.text.0.iter().try_for_each(|piece| stop_requests.write(piece))
    }

    /// Begins the next of several targets. JSON says for each entry in which target it is.
    pub(super) fn next_target(&mut self) {
        if let Self::Json(json) = self {
            json.target = Some(json.target.map_or(0, |target| target + 1));
        }
    }

    /// Writes the end of the output. Only JSON has one.
    ///
    /// # Errors
    /// As [`Self::put`].
    pub(super) fn end(self, end: &End, stop_requests: &mut StopRequests) -> Result<(), Trouble> {
        match self {
            Self::Json(json) => json.end(end, stop_requests),
            Self::Table(_) | Self::Lines(_) => Ok(()),
        }
    }
}

impl Format {
    /// Returns the text of `entries`.
    ///
    /// # Errors
    /// Fails if an entry cannot be converted to JSON.
    pub(super) fn rows<'a>(self, entries: impl IntoIterator<Item = &'a ListedEntry>) -> io::Result<Rows> {
        let mut rows = Rows::default();
        self.add_rows(entries, &mut rows)?;
        Ok(rows)
    }

    /// Does the same as [`Self::rows`], but adds the text to `rows`, which have the same format.
    ///
    /// # Errors
    /// As [`Self::rows`].
    pub(super) fn add_rows<'a>(
        self,
        entries: impl IntoIterator<Item = &'a ListedEntry>,
        Rows { text, at_end }: &mut Rows,
    ) -> io::Result<()> {
        let now = LazyCell::new(Timestamp::now);
        for entry in entries {
            match (self, entry) {
                (Self::Table(layout), entry) => text.next_piece().extend(layout.entry(entry, *now).as_bytes()),
                (Self::Lines(widths), entry) => text.next_piece().extend(line_of(entry, widths, *now).as_bytes()),
                (Self::Json { target }, ListedEntry::Lock(lock)) => push_json(text, &**lock, target)?,
                (Self::Json { target }, ListedEntry::UnreadableLock(other)) => push_json(at_end, other, target)?,
            }
        }
        Ok(())
    }
}

/// Appends an entry in JSON, after a comma if it is not the first one.
fn push_json<T: Serialize>(text: &mut Text, entry: &T, target: Option<usize>) -> io::Result<()> {
    let is_first = text.is_empty();
    let piece = text.next_piece();
    if !is_first {
        piece.extend(BETWEEN.as_bytes());
    }
    match target {
        None => json::append(piece, entry)?,
        Some(target) => json::append(piece, &InTarget { entry, target })?,
    }
    Ok(())
}

/// The separator of two entries in JSON.
const BETWEEN: &str = ",\n";

impl Rows {
    pub(super) fn is_empty(&self) -> bool {
        self.text.is_empty() && self.at_end.is_empty()
    }
}

/// Returns the lock's operation without the prefix that terraform gives it: `Apply` for `OperationTypeApply`.
fn operation(lock: &FoundLock) -> &str {
    lock.info.operation.strip_prefix("OperationType").unwrap_or(&lock.info.operation)
}

/// Returns how long the lock has been held and since when, or why its age is not known.
fn since(lock: &FoundLock, now: Timestamp) -> String {
    match (lock.info.created(), lock.age(now)) {
        (Some(created), Some(age)) => format!("{} ago, {created:.0}", length_of_time(age)),
        (Some(created), None) => format!("{created:.0}, which is ahead of this host's clock"),
        (None, _) => format!("\"{}\", which is not a time", visible(&lock.info.created)),
    }
}

/// Returns which parts of the lock exist: `dynamodb`, `s3` or `dynamodb+s3`.
pub(super) fn parts(lock: &FoundLock) -> Cow<'static, str> {
    let mut names = lock.parts.iter().map(|(store_key, _)| match store_key {
        StoreKey::DynamoDb { .. } => "dynamodb",
        StoreKey::S3 { .. } => "s3",
    });
    let first = names.next().unwrap_or_default();
    names.fold(Cow::Borrowed(first), |before, name| format!("{before}+{name}").into())
}

/// Writes a time without fractions of a second.
const IN_SECONDS: DateTimePrinter = DateTimePrinter::new().precision(Some(0));

/// Appends the lock as one line for `grep` and `awk -F '  +'`. No column is truncated to its width; only text of more
/// than 200 characters is truncated ([`visible`]).
fn push_lock_line(line: &mut String, lock: &FoundLock, widths: Widths, now: Timestamp) {
    let created = lock.info.created();
    let age = created.and_then(|created| age_at(created, now)).map_or_else(|| "-".to_owned(), length_of_time);
    let since =
        created.map_or_else(|| column(&lock.info.created), |created| IN_SECONDS.timestamp_to_string(&created).into());
    let path = lock.place().path_in_place();
    for (text, width) in [
        (Cow::Borrowed(lock.verdict().word()), 11),
        (column(&path), widths.path),
        (column(lock.workspace.as_deref().unwrap_or_default()), widths.workspace),
        (column(operation(lock)).to_lowercase().into(), widths.operation),
        (column(&lock.info.who), widths.who),
        (since, 20),
        (age.into(), 12),
        (column(&lock.info.id), 36),
        (parts(lock), 11),
    ] {
        push_padded(line, &text, width);
        line.push_str("  ");
    }
    line.push_str(&without_double_blanks(Cow::Borrowed(&lock.judgement().reason)));
    if let Some(lease) = lock.lease.as_deref().and_then(lease_text::of_holder) {
        line.extend(["; ", &without_double_blanks(lease.into())]);
    }
    for note in &lock.notes {
        line.extend(["; ", &without_double_blanks(Cow::Borrowed(note))]);
    }
    line.push('\n');
}

fn unreadable_line(unreadable: &UnreadableLock, widths: Widths) -> String {
    let path = padded(&column(&unreadable.place.path()), widths.path);
    let text = format!("{}; {}", unreadable.reason, visible(&unreadable.place.describe()));
    format!("unreadable   {path}  {}\n", without_double_blanks(text.into()))
}

/// Returns an entry as a plain line, which ends with a newline.
pub(super) fn line_of(entry: &ListedEntry, widths: Widths, now: Timestamp) -> String {
    // More than most lines need.
    let mut line = String::with_capacity(512);
    match entry {
        ListedEntry::Lock(lock) => push_lock_line(&mut line, lock, widths, now),
        ListedEntry::UnreadableLock(unreadable) => line.push_str(&unreadable_line(unreadable, widths)),
    }
    line
}

/// Returns the header and the lines of each entry, as a table of `width` columns.
pub(super) fn table_of(width: usize, entries: &[&ListedEntry], now: Timestamp) -> (String, Vec<String>) {
    let layout = Layout::new(width, Widths::of(entries.iter().copied()));
    (layout.head(), entries.iter().map(|entry| layout.entry(entry, now)).collect())
}

/// Returns the text of a column of a plain line. Tools find a column by its position, so a blank text becomes `-`, and
/// the text contains no two consecutive blanks ([`without_double_blanks`]).
fn column(text: &str) -> Cow<'_, str> {
    let shown = visible_in_place(text);
    if shown.trim().is_empty() { "-".into() } else { without_double_blanks(shown) }
}

/// Replaces each run of blanks with one blank, because two blanks separate the columns of a plain line. Makes no copy
/// of a text that needs no change. Almost every text needs none.
fn without_double_blanks(text: Cow<'_, str>) -> Cow<'_, str> {
    let is_double = |(one, next)| one == b' ' && next == b' ';
    if !text.bytes().zip(text.bytes().skip(1)).fold(false, |found, pair| found | is_double(pair)) {
        return text;
    }
    let mut single = String::with_capacity(text.len());
    for character in text.chars() {
        if character != ' ' || !single.ends_with(' ') {
            single.push(character);
        }
    }
    single.into()
}

/// Pads `text` with spaces to `width`. Longer text is not truncated.
fn padded(text: &str, width: usize) -> String {
    let mut padded = String::new();
    push_padded(&mut padded, text, width);
    padded
}

/// Appends `text`, padded as by [`padded`].
fn push_padded(line: &mut String, text: &str, width: usize) {
    const BLANKS: &str = "                                                ";
    let own = if is_plain(text) { text.len() } else { text.width() };
    line.push_str(text);
    let mut missing = width.saturating_sub(own);
    while missing > 0 {
        let blanks = &BLANKS[..missing.min(BLANKS.len())];
        line.push_str(blanks);
        missing -= blanks.len();
    }
}

/// Returns `text` with a width of exactly `width` terminal columns: padded with spaces, or truncated at its end, where
/// `mark` replaces the rest.
fn cut(text: &str, width: usize, mark: &str) -> String {
    padded(&::console::truncate_str(text, width, mark), width)
}

/// Returns `text` with a width of exactly `width` terminal columns: padded with spaces, or truncated at its beginning,
/// which `mark` replaces. The end of a path says more than its beginning.
fn cut_front(text: &str, width: usize, mark: &str) -> String {
    let mut kept: &str = text;
    // Almost every path is plain, and a long one is not measured again for each of its characters.
    if text.len() > width && is_plain(text) {
        kept = &text[text.len() - width.saturating_sub(mark.width())..];
    }
    while kept.width() + if kept.len() < text.len() { mark.width() } else { 0 } > width {
        let Some(first) = kept.chars().next() else { break };
        kept = &kept[first.len_utf8()..];
    }
    let mark = if kept.len() < text.len() && width > 0 { mark } else { "" };
    padded(&format!("{mark}{kept}"), width)
}

/// A table that is written.
pub(super) struct Table {
    layout: Layout,
    /// Whether the header was written.
    headed: bool,
}

impl Table {
    /// Returns the header for the first rows. For the next ones there is none.
    fn head(&mut self) -> String {
        if std::mem::replace(&mut self.headed, true) { String::new() } else { self.layout.head() }
    }
}

/// The layout of a table that fits the terminal.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    width: usize,
    widths: Widths,
    /// Whether a row has room for the SINCE column: the terminal has 130 columns or more.
    wide: bool,
}

impl Layout {
    const VERDICT: usize = 11;
    /// The width of the SINCE column, whose text is like `30 d 23 h ago, 2026-11-24T10:00:00Z`.
    const SINCE: usize = 38;

    fn new(width: usize, wanted: Widths) -> Self {
        let width = width.max(20);
        let wide = width >= 130;
        let mut widths = Widths {
            workspace: wanted.workspace.clamp(9, 16),
            operation: wanted.operation.clamp(9, 12),
            who: wanted.who.clamp(3, 24),
            ..wanted
        };
        let rest = |widths: &Widths| {
            let others = Self::VERDICT + widths.workspace + widths.operation + widths.who + 4 * 2;
            width.saturating_sub(others + if wide { Self::SINCE + 2 } else { 0 })
        };
        // On a narrow terminal, the other columns shrink first, because the path matters most.
        while rest(&widths) < widths.path.min(30) && (widths.workspace > 4 || widths.who > 4 || widths.operation > 5) {
            widths.workspace = (widths.workspace - 1).max(4);
            widths.who = (widths.who - 1).max(4);
            widths.operation = (widths.operation - 1).max(5);
        }
        widths.path = widths.path.min(rest(&widths)).max(4);
        Self { width, widths, wide }
    }

    fn row(&self, verdict: &str, style: &Style, cells: [&str; 5]) -> String {
        let [path, workspace, operation, who, since] = cells;
        let mut rest = format!(
            "  {}  {}  {}  {}",
            cut_front(path, self.widths.path, ellipsis()),
            cut(workspace, self.widths.workspace, ellipsis()),
            cut(operation, self.widths.operation, ellipsis()),
            cut(who, self.widths.who, ellipsis())
        );
        if self.wide {
            rest = format!("{rest}  {since}");
        }
        let room = self.width.saturating_sub(Self::VERDICT);
        let rest = ::console::truncate_str(&rest, room, ellipsis()).trim_end().to_owned();
        format!("{}{rest}\n", style.apply_to(padded(verdict, Self::VERDICT)))
    }

    fn head(&self) -> String {
        self.row("VERDICT", &Style::new().bold(), ["PATH", "WORKSPACE", "OPERATION", "WHO", "SINCE"])
    }

    fn entry(&self, entry: &ListedEntry, now: Timestamp) -> String {
        match entry {
            ListedEntry::Lock(lock) => self.lock(lock, now),
            ListedEntry::UnreadableLock(unreadable) => self.unreadable(unreadable),
        }
    }

    fn lock(&self, lock: &FoundLock, now: Timestamp) -> String {
        let path = visible(&lock.path());
        let since = since(lock, now);
        let cells = [
            path.as_str(),
            &visible(lock.workspace.as_deref().unwrap_or("-")),
            &visible(operation(lock)).to_lowercase(),
            &visible(&lock.info.who),
            &since,
        ];
        let verdict = lock.verdict();
        let mut text = self.row(verdict.words(), &style(verdict), cells);
        let mut more = String::new();
        if path.width() > self.widths.path {
            more = format!("{path}; ");
        }
        if !self.wide {
            more = format!("{more}{since}; ");
        }
        more = format!("{more}{}; ID {}, {}", lock.judgement().reason, visible(&lock.info.id), parts(lock));
        if let Some(lease) = lock.lease.as_deref().and_then(lease_text::of_holder) {
            more = format!("{more}; {lease}");
        }
        for note in &lock.notes {
            more = format!("{more}; {note}");
        }
        text.push_str(&self.below(&more));
        text
    }

    fn unreadable(&self, unreadable: &UnreadableLock) -> String {
        let path = visible(&unreadable.place.path());
        let row = self.row("unreadable", &Style::new().dim(), [&path, "-", "-", "-", ""]);
        let more = format!("{}; {}", unreadable.reason, visible(&unreadable.place.describe()));
        row + &self.below(&more)
    }

    /// Returns `text` as indented lines below a row, wrapped to the terminal's width.
    fn below(&self, text: &str) -> String {
        let indent = " ".repeat(if self.width > 60 { Self::VERDICT + 2 } else { 2 });
        let room = self.width.saturating_sub(indent.len()).max(10);
        // Do not break an ID at its hyphens if there is room for it, so that a user can copy it.
        let options = textwrap::Options::new(room).word_splitter(textwrap::WordSplitter::NoHyphenation);
        textwrap::wrap(text, options).iter().fold(String::new(), |all, line| format!("{all}{indent}{line}\n"))
    }
}

/// Returns the colour of a verdict. If NO_COLOR is set and not empty, returns no colour.
fn style(verdict: Verdict) -> Style {
    let plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    match verdict {
        _ if plain => Style::new(),
        Verdict::Alive => Style::new().green(),
        Verdict::Dead => Style::new().red().bold(),
        Verdict::LikelyDead => Style::new().red(),
        Verdict::Unknown => Style::new().yellow(),
    }
}

/// One JSON object. Entries that are not locks follow the locks, so they are kept in a temporary file without a name
/// until all locks are written.
pub(super) struct Json {
    /// `None` while no entry waits.
    later: Option<File>,
    /// Whether a lock is written.
    has_locks: bool,
    /// The index of the current target; `None` if there are not several.
    target: Option<usize>,
}

impl Json {
    /// Returns what to write before the next locks, whose text is `text`.
    fn before(&mut self, text: &Text) -> &'static str {
        if text.is_empty() {
            ""
        } else if std::mem::replace(&mut self.has_locks, true) {
            BETWEEN
        } else {
            "{\"locks\":[\n"
        }
    }

    /// Keeps entries that are not locks, until all locks are written.
    ///
    /// # Errors
    /// Fails if the temporary file cannot be created or written.
    fn keep(&mut self, text: &Text) -> io::Result<()> {
        if text.is_empty() {
            return Ok(());
        }
        let before = if self.later.is_some() { BETWEEN } else { "\n" };
        let mut later = self.later.take().map_or_else(temporary_file, Ok)?;
        later.write_all(before.as_bytes())?;
        text.0.iter().try_for_each(|piece| later.write_all(piece))?;
        self.later = Some(later);
        Ok(())
    }

    fn end(self, end: &End, stop_requests: &mut StopRequests) -> Result<(), Trouble> {
        let locks = if self.has_locks { "" } else { "{\"locks\":[" };
        stop_requests.write(format!("{locks}],\n\"unreadable\":[").as_bytes())?;
        if let Some(mut later) = self.later {
            later.rewind()?;
            let mut piece = vec![0; 1 << 16];
            while let length @ 1.. = later.read(&mut piece)? {
                stop_requests.write(&piece[..length])?;
            }
        }
        let mut text = format!("],\n\"complete\":{},\"scanned\":{}", end.complete, end.scanned);
        if let Some(FleetEnd { targets, bad_lines }) = &end.fleet {
            let text_of = |json: serde_json::Result<String>| json.map_err(io::Error::from);
            let (targets, bad_lines) = (text_of(json::to_string(targets))?, text_of(json::to_string(bad_lines))?);
            text = format!("{text},\n\"targets\":{targets},\n\"bad_lines\":{bad_lines}");
        }
        stop_requests.write((text + "}\n").as_bytes())
    }
}

/// Returns a new file without a name.
///
/// # Errors
/// Fails if it cannot be created. The error names the directory.
fn temporary_file() -> io::Result<File> {
    tempfile::tempfile().map_err(|error| {
        let directory = visible(&std::env::temp_dir().display().to_string());
        io::Error::new(error.kind(), format!("a temporary file could not be created in {directory}: {error}"))
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::commands::found::{Wanted, pair};
    use crate::holder::evidence::{Judgement, NOT_YET};
    use crate::lock::leased::StoredPart;
    use crate::lock::stores::StoredLock;

    fn entry(who: &str, path: &str) -> ListedEntry {
        let info = serde_json::json!({"ID": "5e75cb05-d70c-4132-39e0-d2abba1b3077", "Operation": "OperationTypeApply",
            "Who": who, "Version": "1", "Created": "2026-11-24T10:00:00Z", "Path": path});
        let store_key = StoreKey::DynamoDb { table: "t".into(), key: path.into(), region: "r".into() };
        let mut entries = pair(
            Wanted::default(),
            vec![StoredPart {
                store_key,
                stored: StoredLock::Item(crate::lock::dynamodb::InfoAttribute::Text(info.to_string())),
                lease: None,
            }],
            None,
        );
        if let ListedEntry::Lock(lock) = &mut entries[0] {
            judged(lock, &"why ".repeat(30));
        }
        entries.remove(0)
    }

    fn judged(lock: &mut FoundLock, reason: &str) {
        lock.judgement = Some(Arc::new(Judgement { reason: reason.to_owned(), ..NOT_YET.clone() }));
    }

    fn lock(entry: &ListedEntry) -> &FoundLock {
        match entry {
            ListedEntry::Lock(lock) => lock,
            ListedEntry::UnreadableLock(_) => panic!("no lock"),
        }
    }

    const STRANGE: [&str; 6] =
        ["root@vm", "\u{1b}]0;x\u{7}\u{1b}[2J", "a\nb\r\tc", "\u{202e}evil\u{2066}", "寿司@東京", "🔒"];

    fn with_a_lease(entry: &mut ListedEntry, fact: &str) {
        use crate::lease::observed::tests::lease;
        let mut lease = lease("5e75cb05-d70c-4132-39e0-d2abba1b3077", 40, None, crate::lease::record::Promise::Stop);
        if let (ListedEntry::Lock(lock), Ok(record)) = (entry, &mut lease.record) {
            record.holder.user = fact.chars().take(2000).collect();
            record.holder.job.clone_from(&record.holder.user);
            lock.lease = Some(Box::new(lease));
        }
    }

    /// Every line fits, whatever text the lock contains and whatever the terminal's width is.
    #[test]
    fn every_line_of_the_table_fits_the_terminal() {
        for width in [20, 40, 60, 80, 100, 132, 200] {
            for who in STRANGE.map(ToOwned::to_owned).into_iter().chain(["w".repeat(300_000)]) {
                for path in ["b/k".to_owned(), format!("b/{}/prod.tfstate", "deep/".repeat(40)), who.clone()] {
                    let mut entry = entry(&who, &path);
                    with_a_lease(&mut entry, &who);
                    let layout = Layout::new(width, Widths::of(std::slice::from_ref(&entry)));
                    let shown = layout.lock(lock(&entry), "2026-11-24T13:12:00Z".parse().unwrap());
                    let plain = ::console::strip_ansi_codes(&shown).into_owned();
                    for line in plain.lines() {
                        assert!(line.width() <= width, "{} > {width}: {line}", line.width());
                        assert!(!line.chars().any(char::is_control) && !line.contains('\u{202e}'), "{line:?}");
                    }
                    assert!(plain.split_whitespace().collect::<Vec<_>>().join(" ").contains("3 h 12 min"), "{plain}");
                }
            }
        }
    }

    #[test]
    fn a_text_in_pieces_is_whole_and_its_pieces_are_short() {
        const LONG: usize = 100_000;
        let entries: Vec<_> = [10, LONG].map(|length| entry(&"w".repeat(length), "b/k")).into();
        let entries = || (0..500).map(|number| &entries[usize::from(number == 300)]);
        for format in [Format::Json { target: None }, Format::Json { target: Some(7) }, Format::Lines(Widths::USUAL)] {
            let between = if matches!(format, Format::Json { .. }) { BETWEEN } else { "" };
            let alone = entries().map(|entry| format.rows([entry]).unwrap().text.0.concat());
            let expected = alone.collect::<Vec<_>>().join(between.as_bytes());
            let Text(pieces) = format.rows(entries()).unwrap().text;
            assert!(pieces.len() > 1 && pieces.concat() == expected, "{format:?}: {}", pieces.len());
            assert!(pieces.iter().filter(|piece| piece.len() > Text::PIECE).count() <= 1, "{format:?}");
            assert!(pieces.iter().all(|piece| (1..Text::PIECE + 2 * LONG).contains(&piece.len())), "{format:?}");
        }
    }

    #[test]
    fn a_lock_in_a_pipe_is_one_plain_line() {
        for who in STRANGE {
            let mut entry = entry(who, "b/k");
            with_a_lease(&mut entry, who);
            let line = line_of(&entry, Widths::USUAL, Timestamp::now());
            assert_eq!(line.matches('\n').count(), 1, "{line:?}");
            assert!(!line.trim_end().chars().any(char::is_control), "{line:?}");
        }
    }

    /// Splits at two or more blanks, as `awk -F '  +'` does.
    fn columns(line: &str) -> Vec<&str> {
        line.trim_end().split("  ").map(str::trim).filter(|column| !column.is_empty()).collect()
    }

    #[test]
    fn text_with_several_blanks_does_not_shift_the_columns_of_a_plain_line() {
        for blanks in ["a  b", "a     b", "   a  b   "] {
            let mut entry = entry(blanks, &format!("b/{blanks}"));
            let ListedEntry::Lock(found) = &mut entry else { panic!("no lock") };
            found.info.id = blanks.to_owned();
            found.info.operation = blanks.to_owned();
            found.info.created = blanks.to_owned();
            found.workspace = Some(blanks.to_owned());
            judged(found, blanks);
            found.notes = vec![format!("note{blanks}")];
            let line = line_of(&entry, Widths::of(std::slice::from_ref(&entry)), Timestamp::now());
            let shown = columns(&line);
            assert_eq!(shown.len(), 10, "{line:?}");
            assert_eq!([shown[0], shown[4], shown[8]], ["unknown", "a b", "dynamodb"], "{line:?}");
            assert!(shown[9].contains("a b") && shown[9].contains("; note"), "{line:?}");

            let place = StoreKey::DynamoDb { table: "t".into(), key: format!("b/{blanks}"), region: "r".into() };
            let unreadable = UnreadableLock { place, reason: blanks.to_owned(), stored: None };
            let line = unreadable_line(&unreadable, Widths::USUAL);
            let shown = columns(&line);
            assert_eq!((shown.len(), shown[0]), (3, "unreadable"), "{line:?}");
        }
    }

    #[test]
    fn a_path_is_cut_at_its_beginning() {
        for (mark, path, word) in [("…", "…ir/prod", "oper…"), ("...", ".../prod", "op...")] {
            assert_eq!(cut_front("bucket/dir/prod", 8, mark), path);
            assert_eq!(cut_front("b/k", 5, mark), "b/k  ");
            assert_eq!(cut_front("b/k", 0, mark), "");
            assert_eq!(cut_front("b/k", 3, mark), "b/k");
            for width in 0..9 {
                // The same, measured for each character because of the last one.
                let (plain, other) = (cut_front("bucket/k", width, mark), cut_front("bucket/é", width, mark));
                assert_eq!(plain, other.replace('é', "k"), "{width}");
            }
            assert_eq!(cut("operation", 5, mark), word);
        }
    }
}
