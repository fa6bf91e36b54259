//! `tf locks list --watch`: lists the locks again and again. On a terminal, the table is redrawn in place, and what has
//! changed since the last round is marked. In a pipe, each change is one more line.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ::console::Term;
use jiff::Timestamp;
use tokio::time::{Instant, sleep};

use super::connection::{Connection, LocationArgs, ScanTarget, Trouble};
use super::found::ListedEntry;
use super::output::{self, Rows, Widths};
use super::scan::Scan;
use super::staleness::Staleness;
use super::stop_requests::StopRequests;
use super::targets::Speed;
use super::{Finding, inventory};
use crate::console::{self, ellipsis, length_of_time, visible, visible_whole};
use crate::lock::stores::StoreKey;
use crate::settings;
use crate::sys::poll;
use crate::sys::terminal::Terminal;

/// How often to check for signals and for another size of the terminal.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// The shortest and the longest time between the beginnings of two rounds.
const INTERVALS: std::ops::RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_hours(24);

/// When a lock counts as stale. The witness is asked about the same lock at most once a minute, because clouds and CI
/// systems limit how often they are asked.
const STALENESS: Staleness = Staleness { older_than: None, age_of_answers: Duration::from_mins(1) };

/// Shows the alternate screen and hides the cursor (xterm's DECSET 1049 and 25).
const ENTER: &str = "\u{1b}[?1049h\u{1b}[?25l";

/// Undoes [`ENTER`].
const LEAVE: &str = "\u{1b}[?25h\u{1b}[?1049l";

/// Parses the value of `--watch`.
///
/// # Errors
/// Fails if it is not a time from 1 s to 24 h.
pub(super) fn interval(text: &str) -> Result<Duration, Trouble> {
    settings::duration(text).filter(|interval| INTERVALS.contains(interval)).ok_or_else(|| {
        Trouble::Said(format!("--watch={} is not a time from 1s to 24h, for example --watch=5s", visible(text)))
    })
}

/// Lists the locks of `place` every `interval`, until a signal stops this process. A failed round is reported and
/// repeated, except the first one.
///
/// # Errors
/// Fails if the first round fails, or if the output cannot be written.
pub(super) async fn watch(place: &LocationArgs, speed: Speed, interval: Duration) -> Result<Finding, Trouble> {
    console::stdout_is_open()?;
    let mut stop_requests = StopRequests::listen()?;
    let mut connection: Option<Connection> = None;
    let mut rows: Option<Vec<Row>> = None;
    // The workspaces of the rows, by the paths of their states.
    let mut workspaces = BTreeMap::new();
    let mut view: Option<View> = None;
    loop {
        let begun = Instant::now();
        let (is_first, known) = (rows.is_none(), workspaces.values().cloned().collect());
        let round = match round(place, speed, &mut connection, &known, is_first, &mut stop_requests).await {
            Ok(round) => Ok(round),
            Err(Interrupted::Signal(signal)) => return Ok(Finding::Stopped(signal)),
            Err(Interrupted::Trouble(trouble)) if rows.is_none() => return Err(trouble),
            Err(Interrupted::Trouble(trouble)) => {
                connection = None;
                Err(trouble.to_string())
            }
        };
        let took = begun.elapsed();
        let view = view.get_or_insert_with(|| View::new(&mut stop_requests));
        let (note, owed) = match round {
            Ok(Round { entries, note, looked, owed }) => {
                let now = compared(rows.take(), entries, &looked);
                let shown: HashSet<_> =
                    now.iter().filter(|row| row.mark != Mark::Gone).map(|row| key(&row.entry).0).collect();
                workspaces = looked.states.unwrap_or_default();
                workspaces.retain(|path, _| shown.contains(path));
                rows = Some(now);
                (note, owed)
            }
            Err(trouble) => {
                let reason = trouble.lines().next().unwrap_or_default();
                rows = rows.map(|rows| compared(Some(rows), Vec::new(), &Looked::nowhere()));
                (Some(format!("not up to date: {reason}")), None)
            }
        };
        let shown = rows.as_deref().unwrap_or_default();
        view.show(shown, &title(shown, interval, Timestamp::now()), note.as_deref(), &mut stop_requests)?;
        // The next round may begin at once.
        reader_is_there()?;
        let until = begun + time_to_next_round(interval, took, owed);
        while Instant::now() < until {
            if let Some(signal) = stop_requests.next() {
                return Ok(Finding::Stopped(signal));
            }
            view.redraw_if_needed(shown, note.as_deref(), &mut stop_requests)?;
            reader_is_there()?;
            sleep(POLL_INTERVAL.min(until - Instant::now())).await;
        }
    }
}

/// Fails if the reader of stdout has gone. Without a change nothing is written, so no write shows it.
fn reader_is_there() -> io::Result<()> {
    if poll::has_hung_up(io::stdout().as_fd()) { Err(io::ErrorKind::BrokenPipe.into()) } else { Ok(()) }
}

/// Why a round was not completed.
enum Interrupted {
    Signal(nix::sys::signal::Signal),
    Trouble(Trouble),
}

impl From<Trouble> for Interrupted {
    fn from(trouble: Trouble) -> Self {
        Self::Trouble(trouble)
    }
}

/// What one round has read.
struct Round {
    entries: Vec<ListedEntry>,
    /// Why the entries may not be all. `None` if they are.
    note: Option<String>,
    looked: Looked,
    /// How long the table must not be read now, because this round has used its capacity. `None` if the capacity of the
    /// target is not limited.
    owed: Option<Duration>,
}

/// Where a round has looked for locks.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Looked {
    /// The workspaces of the states, by the paths of the states. `None` for all states of a table or a bucket.
    states: Option<BTreeMap<String, String>>,
    /// Whether the lock objects could not be read.
    no_objects: bool,
}

impl Looked {
    /// At every state of a table or a bucket.
    fn everywhere() -> Self {
        Self { states: None, no_objects: false }
    }

    /// At no state, because the round has failed.
    fn nowhere() -> Self {
        Self { states: Some(BTreeMap::new()), no_objects: false }
    }

    /// Whether this round would have found an entry that it has not found, if the entry still existed.
    fn at(&self, entry: &ListedEntry) -> bool {
        let is_looked_at = self.states.as_ref().is_none_or(|states| states.contains_key(&key(entry).0));
        let has_object = match entry {
            ListedEntry::Lock(lock) => lock.parts.iter().any(|(part, _)| matches!(part, StoreKey::S3 { .. })),
            ListedEntry::UnreadableLock(unreadable) => matches!(unreadable.place, StoreKey::S3 { .. }),
        };
        is_looked_at && !(self.no_objects && has_object)
    }
}

/// Reads all locks of `place` once. Connects if `connection` is `None`. In a directory, the workspaces in `known` are
/// looked at too: a lock that is released may have been all that showed its workspace in the bucket. The first round
/// shows the progress of a scan on stderr; a later one would draw over the table.
async fn round(
    place: &LocationArgs,
    speed: Speed,
    connection: &mut Option<Connection>,
    known: &BTreeSet<String>,
    is_first: bool,
    stop_requests: &mut StopRequests,
) -> Result<Round, Interrupted> {
    let reached = match connection.take() {
        Some(connection) => connection,
        None => stop_requests.unless_stopped(Box::pin(place.reach())).await.map_err(Interrupted::Signal)??,
    };
    let Connection { target, stores } = connection.insert(reached);
    if let ScanTarget::Directory(directory) = target {
        let looked = inventory::look_and_ask_witness(directory, stores, STALENESS, known);
        let inventory = stop_requests.unless_stopped(Box::pin(looked)).await.map_err(Interrupted::Signal)??;
        let unseen = inventory.unseen.then(|| inventory::UNSEEN.to_owned());
        let note = inventory.incomplete.or(unseen).map(|note| note.replace('\n', ": "));
        let looked = Looked { states: Some(inventory.states), no_objects: inventory.unseen };
        return Ok(Round { entries: inventory.entries, note, looked, owed: None });
    }
    let (target, stores) = (target.clone(), stores.clone());
    let scan = Scan { target, stores, speed, staleness: STALENESS, is_silent: !is_first };
    let mut entries = Vec::new();
    let mut nowhere = output::Output::Lines(Widths::USUAL);
    let scanned = scan.run(stop_requests, &mut nowhere, Vec::new(), keep_it, |found| entries.extend(found)).await?;
    if let Some(signal) = scanned.stopped {
        return Err(Interrupted::Signal(signal));
    }
    if let Some(trouble) = scanned.failed {
        return Err(trouble.into());
    }
    entries.sort_by_key(key);
    Ok(Round { entries, note: None, looked: Looked::everywhere(), owed: scanned.owed })
}

/// Shows nothing, and keeps the entry.
#[expect(clippy::unnecessary_wraps, reason = "a scan needs a function that may fail")]
fn keep_it(entry: ListedEntry, _: &mut Rows, kept: &mut Vec<ListedEntry>) -> io::Result<()> {
    kept.push(entry);
    Ok(())
}

/// Returns the time from the beginning of a round to the beginning of the next one. `took` is how long the round took.
/// If `owed` is not `None`, the capacity of the table is limited, and the table must not be read for that long after
/// the round. Otherwise the pause is at least as long as the round, so that reading takes at most half of the time.
fn time_to_next_round(interval: Duration, took: Duration, owed: Option<Duration>) -> Duration {
    interval.max(took + owed.unwrap_or(took))
}

/// What has happened to an entry since the last round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mark {
    /// Nothing, or this is the first round.
    Same,
    New,
    Changed,
    Gone,
}

impl Mark {
    /// Returns the mark as it precedes a row of the table.
    fn sign(self) -> char {
        match self {
            Self::Same => ' ',
            Self::New => '+',
            Self::Changed => '~',
            Self::Gone => '-',
        }
    }

    /// Returns the mark as a word in a line.
    fn word(self) -> &'static str {
        match self {
            Self::Same => "held",
            Self::New => "locked",
            Self::Changed => "changed",
            Self::Gone => "released",
        }
    }
}

/// An entry and its mark.
#[derive(Clone, Debug)]
struct Row {
    mark: Mark,
    entry: ListedEntry,
    /// The lock that was there before `entry`, which could not be read.
    hidden: Option<Box<ListedEntry>>,
}

impl Row {
    fn new(mark: Mark, entry: ListedEntry) -> Self {
        Self { mark, entry, hidden: None }
    }

    /// Returns the lock that this row stands for, as far as it is known.
    fn known(&self) -> &ListedEntry {
        self.hidden.as_deref().unwrap_or(&self.entry)
    }
}

/// Returns what identifies an entry: its path and its ID.
fn key(entry: &ListedEntry) -> (String, String) {
    match entry {
        ListedEntry::Lock(lock) => (lock.path(), lock.info.id.clone()),
        ListedEntry::UnreadableLock(unreadable) => (unreadable.place.path(), unreadable.place.describe()),
    }
}

/// Returns where the parts of an entry are.
fn places(entry: &ListedEntry) -> impl Iterator<Item = &StoreKey> {
    let (parts, place) = match entry {
        ListedEntry::Lock(lock) => (&lock.parts[..], None),
        ListedEntry::UnreadableLock(unreadable) => (&[][..], Some(&unreadable.place)),
    };
    parts.iter().map(|(part, _)| part).chain(place)
}

/// Returns what counts as a change of an entry. The age of a lock or of its lease does not.
fn state(entry: &ListedEntry) -> (String, Option<String>) {
    match entry {
        ListedEntry::Lock(lock) => (format!("{} {}", lock.verdict().word(), output::parts(lock)), lock.rival.clone()),
        ListedEntry::UnreadableLock(unreadable) => (unreadable.reason.clone(), None),
    }
}

/// Returns `entries` with what has happened to them since the round with the rows `before`, and after them the entries
/// that are gone. An entry that was not found stays as it was if this round has not `looked` for it. An entry that could
/// not be read takes the place of the lock that was there before, and that lock takes its place when it can be read
/// again. `before` is `None` in the first round.
fn compared(before: Option<Vec<Row>>, entries: Vec<ListedEntry>, looked: &Looked) -> Vec<Row> {
    let Some(before) = before else {
        return entries.into_iter().map(|entry| Row::new(Mark::Same, entry)).collect();
    };
    let before: Vec<Row> = before.into_iter().filter(|row| row.mark != Mark::Gone).collect();
    let known: HashMap<_, _> = before.iter().map(|row| (key(row.known()), row)).collect();
    let at: HashMap<&StoreKey, &Row> =
        before.iter().flat_map(|row| places(&row.entry).map(move |it| (it, row))).collect();
    let now: HashSet<_> = entries.iter().map(key).collect();
    let mut found = HashSet::new();
    let mut rows = Vec::new();
    for entry in entries {
        let there = || places(&entry).find_map(|place| at.get(place).copied());
        // An entry that cannot be read is the lock that was in its place, as far as anybody knows.
        let row = if entry.is_unread() {
            there()
        } else {
            known.get(&key(&entry)).copied().or_else(|| there().filter(|row| row.known().is_unread()))
        };
        let mark = match row {
            None => Mark::New,
            Some(row) if key(&row.entry) != key(&entry) || state(&row.entry) != state(&entry) => Mark::Changed,
            Some(_) => Mark::Same,
        };
        found.extend(row.map(|row| key(row.known())));
        let hidden =
            row.map(Row::known).filter(|lock| entry.is_unread() && !lock.is_unread() && !now.contains(&key(lock)));
        let hidden = hidden.cloned().map(Box::new);
        rows.push(Row { mark, entry, hidden });
    }
    let read: HashSet<&StoreKey> =
        rows.iter().map(|row| &row.entry).filter(|entry| !entry.is_unread()).flat_map(places).collect();
    let rest = before.iter().filter(|row| !found.contains(&key(row.known()))).filter_map(|row| {
        if !looked.at(&row.entry) {
            return Some(Row { mark: Mark::Same, ..row.clone() });
        }
        // What could never be read can be read now.
        let is_found = row.known().is_unread() && places(&row.entry).any(|place| read.contains(place));
        (!is_found).then(|| Row::new(Mark::Gone, row.known().clone()))
    });
    let rest: Vec<Row> = rest.collect();
    rows.extend(rest);
    rows
}

/// Returns the first line on a terminal.
fn title(rows: &[Row], interval: Duration, now: Timestamp) -> String {
    let held = || rows.iter().filter(|row| row.mark != Mark::Gone);
    let (all, stale) = (held().count(), held().filter(|row| row.entry.is_stale()).count());
    let locks = if all == 1 { "lock" } else { "locks" };
    format!("{all} {locks}, {stale} stale, at {now:.0}, every {}; to stop, press ^C", length_of_time(interval))
}

/// Where the rounds are shown.
enum View {
    Terminal(Screen),
    /// A pipe, a file, or a terminal that cannot move its cursor.
    Lines {
        /// Whether a round was shown.
        has_shown: bool,
        /// The note of the last round. The same note is printed only once.
        noted: Option<String>,
    },
}

impl View {
    /// Begins to show the rounds. If that changes the screen, a suspension restores it.
    fn new(stop_requests: &mut StopRequests) -> Self {
        let is_dumb = std::env::var_os("TERM").is_none_or(|name| name.is_empty() || name == "dumb");
        if Term::stdout().is_term() && !is_dumb {
            stop_requests.before_suspension(leave);
            Self::Terminal(Screen { title: String::new(), size: (0, 0), is_drawn: false })
        } else {
            Self::Lines { has_shown: false, noted: None }
        }
    }

    /// Shows a round.
    ///
    /// # Errors
    /// Fails if stdout cannot be written, for example because its reader has exited, or if a signal asks this process to
    /// end while it waits for that reader.
    fn show(
        &mut self,
        rows: &[Row],
        title: &str,
        note: Option<&str>,
        stop_requests: &mut StopRequests,
    ) -> Result<(), Trouble> {
        match self {
            Self::Terminal(screen) => {
                title.clone_into(&mut screen.title);
                screen.draw(rows, note, stop_requests)
            }
            Self::Lines { has_shown, noted } => {
                let is_first = !std::mem::replace(has_shown, true);
                let now = Timestamp::now();
                let mut text = String::new();
                for Row { mark, entry, .. } in rows {
                    if is_first || *mark != Mark::Same {
                        let line = output::line_of(entry, Widths::USUAL, now);
                        let _ = write!(text, "{now:.0}  {:<8}  {line}", mark.word());
                    }
                }
                if let Some(note) = note.filter(|note| noted.as_deref() != Some(note)) {
                    console::say(note);
                }
                *noted = note.map(str::to_owned);
                stop_requests.write(text.as_bytes())
            }
        }
    }

    /// Draws the last round again if the terminal has another size now, if this process was suspended, or if it was in
    /// the background.
    fn redraw_if_needed(
        &mut self,
        rows: &[Row],
        note: Option<&str>,
        stop_requests: &mut StopRequests,
    ) -> Result<(), Trouble> {
        let was_suspended = stop_requests.was_suspended();
        match self {
            Self::Terminal(screen) if was_suspended || !screen.is_drawn || screen.size != Term::stdout().size() => {
                screen.draw(rows, note, stop_requests)
            }
            _ => Ok(()),
        }
    }
}

/// The alternate screen of the terminal. Its drop restores what was on the terminal before.
struct Screen {
    title: String,
    /// The rows and columns of the terminal when it was drawn.
    size: (u16, u16),
    /// Whether the terminal shows the last round.
    is_drawn: bool,
}

impl Screen {
    /// Draws a round. Does nothing in the background, where the terminal belongs to another process.
    fn draw(&mut self, rows: &[Row], note: Option<&str>, stop_requests: &mut StopRequests) -> Result<(), Trouble> {
        self.is_drawn = !Terminal::is_anothers_turn();
        if !self.is_drawn {
            return Ok(());
        }
        self.size = Term::stdout().size();
        let (height, width) = (usize::from(self.size.0), usize::from(self.size.1));
        let text = |text: &str| ::console::truncate_str(text, width, ellipsis()).into_owned();
        let mut lines = vec![text(&self.title)];
        lines.extend(note.map(|note| text(&visible_whole(note))));
        if !rows.is_empty() {
            let entries: Vec<&ListedEntry> = rows.iter().map(|row| &row.entry).collect();
            let (head, blocks) = output::table_of(width.saturating_sub(2), &entries, Timestamp::now());
            lines.extend(head.lines().map(|line| format!("  {line}")));
            let mut blocks: Vec<(&String, &Row)> = blocks.iter().zip(rows).collect();
            let needed: usize = blocks.iter().map(|(block, _)| block.lines().count()).sum();
            if lines.len() + needed > height {
                // What has changed must not be below the end of the screen.
                blocks.sort_by_key(|(_, row)| row.mark == Mark::Same);
            }
            for (block, row) in blocks {
                let marks = std::iter::once(row.mark.sign()).chain(std::iter::repeat(' '));
                lines.extend(block.lines().zip(marks).map(|(line, mark)| format!("{mark} {line}")));
            }
        }
        let enter = if IS_ENTERED.swap(true, Ordering::Relaxed) { "" } else { ENTER };
        stop_requests.write(format!("{enter}{}", frame(&lines, height)).as_bytes())
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        leave();
    }
}

/// Whether the terminal shows the alternate screen. A suspension changes it.
static IS_ENTERED: AtomicBool = AtomicBool::new(false);

/// Restores what was on the terminal before [`ENTER`].
fn leave() {
    if IS_ENTERED.swap(false, Ordering::Relaxed) {
        let _ = io::stdout().write_all(LEAVE.as_bytes()).and_then(|()| io::stdout().flush());
    }
}

/// Returns what draws `lines` on a screen of `height` rows over what it shows now. Lines for which there is no room are
/// counted in the last row.
fn frame(lines: &[String], height: usize) -> String {
    let height = height.max(2);
    let shown = if lines.len() > height { height - 1 } else { lines.len() };
    let mut all: Vec<String> = lines[..shown].to_vec();
    if shown < lines.len() {
        all.push(format!("{} {} more lines", ellipsis(), lines.len() - shown));
    }
    // Home; clear each row before it is written, because a row that fills the width may lose its last character to a
    // clear after it; then clear what is below.
    let below = if all.len() < height { "\r\n\u{1b}[J" } else { "" };
    format!("\u{1b}[H\u{1b}[K{}{below}", all.join("\r\n\u{1b}[K"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lock::stores::StoreKey;

    fn entry(path: &str, reason: &str) -> ListedEntry {
        let place = StoreKey::DynamoDb { table: "t".into(), key: path.into(), region: "r".into() };
        ListedEntry::UnreadableLock(super::super::found::UnreadableLock { place, reason: reason.into(), stored: None })
    }

    #[test]
    fn only_a_time_from_a_second_to_a_day_is_an_interval() {
        for (text, seconds) in [("1s", 1), ("5s", 5), ("2m", 120), ("24h", 86_400)] {
            assert_eq!(interval(text).unwrap(), Duration::from_secs(seconds), "{text}");
        }
        for text in ["", "0", "0s", "x", "-1s", "25h", "5 s\u{1b}[2J", "999999999999999999999h"] {
            let message = interval(text).unwrap_err().to_string();
            assert!(message.lines().count() == 1 && message.contains("--watch=5s"), "{message}");
            assert!(!message.contains('\u{1b}'), "{message:?}");
        }
    }

    #[test]
    fn a_round_begins_when_the_interval_is_over_and_the_table_can_bear_it() {
        let seconds = Duration::from_secs;
        for (interval, took, owed, expected) in [
            (5, 0, None, 5),
            (5, 2, None, 5),
            // An unlimited target is read at most half of the time.
            (5, 4, None, 8),
            (5, 1, Some(2), 5),
            (5, 1, Some(60), 61),
            // A read at the permitted rate may begin at once.
            (5, 600, Some(0), 600),
        ] {
            let next = time_to_next_round(seconds(interval), seconds(took), owed.map(seconds));
            assert_eq!(next, seconds(expected), "{interval} {took} {owed:?}");
        }
    }

    #[test]
    fn what_is_new_changed_or_gone_since_the_last_round_is_marked_once() {
        let compared = |before, entries| compared(before, entries, &Looked::everywhere());
        let marks = |rows: &[Row]| rows.iter().map(|row| (key(&row.entry).0, row.mark)).collect::<Vec<_>>();
        let row = |path: &str, mark| (path.to_owned(), mark);
        let first = compared(None, vec![entry("a", "x"), entry("b", "x")]);
        assert_eq!(marks(&first), [row("a", Mark::Same), row("b", Mark::Same)]);
        let second = compared(Some(first), vec![entry("a", "y"), entry("c", "x")]);
        assert_eq!(marks(&second), [row("a", Mark::Changed), row("c", Mark::New), row("b", Mark::Gone)]);
        let third = compared(Some(second), vec![entry("a", "y"), entry("b", "x"), entry("c", "x")]);
        assert_eq!(marks(&third), [row("a", Mark::Same), row("b", Mark::New), row("c", Mark::Same)]);
        assert_eq!(marks(&compared(Some(Vec::new()), vec![entry("a", "x")])), [row("a", Mark::New)]);
    }

    #[test]
    fn what_a_round_has_not_looked_for_is_not_reported_as_released() {
        let object = |path: &str| {
            let place = StoreKey::S3 { bucket: "b".into(), key: format!("{path}.tflock"), region: "r".into() };
            ListedEntry::UnreadableLock(super::super::found::UnreadableLock { place, reason: "x".into(), stored: None })
        };
        let marks = |looked: &Looked| {
            let before = compared(None, vec![entry("b/k", "x"), object("k"), entry("b/l", "x")], &Looked::everywhere());
            let rows = compared(Some(before), Vec::new(), looked);
            rows.iter().map(|row| row.mark).collect::<Vec<_>>()
        };
        let (same, gone) = (Mark::Same, Mark::Gone);
        let only_k = Some(BTreeMap::from([("b/k".to_owned(), "default".to_owned())]));
        for (looked, expected) in [
            (Looked::everywhere(), [gone, gone, gone]),
            (Looked::nowhere(), [same, same, same]),
            (Looked { states: only_k.clone(), no_objects: false }, [gone, gone, same]),
            (Looked { states: only_k, no_objects: true }, [gone, same, same]),
        ] {
            assert_eq!(marks(&looked), expected, "{looked:?}");
        }
    }

    #[test]
    fn a_frame_has_at_most_as_many_rows_as_the_screen() {
        let lines: Vec<String> = (0..5).map(|number| format!("line {number}")).collect();
        for height in 0..8 {
            let frame = frame(&lines, height);
            let rows = frame.split("\r\n").count();
            assert!(rows <= height.max(2), "{height}: {frame:?}");
            assert_eq!(frame.contains("line 4"), height >= 5, "{height}");
            assert_eq!(frame.contains("more lines"), height < 5, "{height}");
        }
    }
}
