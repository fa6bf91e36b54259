//! Reads every lock of a table or a bucket of any size, page by page, in constant memory.
//!
//! Terraform uses the same table at the same time and needs its capacity. So a table with provisioned capacity, or with a
//! maximum for what is billed per request, is read in one segment, at a quarter of that. Any other table is read in four
//! segments, without a limit.
//! Reads are eventually consistent, which halves their cost. A lock that would be reported as stale is read again with
//! a consistent read, so that no user searches for a lock that no longer exists.
//!
//! The entries of a page of a table are read, judged and put into rows on a thread of their own, each before the next one is
//! read. So several pages are read at the same time, and little memory is needed. This ends at the first entry of a page
//! that must be read again, or about which a witness must be asked: the rest of the page is kept until that is done.
//!
//! The segments take turns: the first page of each is shown, then the second page of each, whichever is read first. So an
//! unchanged table is listed in the same order, as long as the service divides it into the same pages. A segment that is
//! faster than the others waits for them, so nothing has to be stored.

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;
use std::{io, slice};

use ::console::Term;
use futures_util::stream::{self, StreamExt};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use nix::sys::signal::Signal;
use tokio::sync::mpsc;
use tokio::task::{JoinSet, yield_now};
use tokio::time::{Instant, sleep, sleep_until};

use super::connection::{ScanTarget, Trouble};
use super::found::{ListedEntry, UnreadableLock, alone};
use super::output::{Output, Rows};
use super::staleness::Staleness;
use super::stop_requests::StopRequests;
use super::targets::{Speed, Tally};
use crate::aws::failure::Failure;
use crate::cleanup::messages;
use crate::console;
use crate::console::visible;
use crate::holder::host::HostView;
use crate::holder::witness;
use crate::lock::dynamodb::ScannedItem;
use crate::lock::leased::StoredPart;
use crate::lock::stores::{LOCK_FILE, StoreKey, StoredLock, Stores};
use crate::lock::{dynamodb, probe, s3};
use crate::sys::descriptor;

/// The share of a provisioned table's read capacity that a scan uses.
const SHARE: f64 = 0.25;

/// The rate, in read capacity units per second, for a table whose capacity is not known. AWS gives a new table at least
/// 5 units by default.
const UNKNOWN_RATE: f64 = 5.0 * SHARE;

/// The number of segments for a table that is read without a limit.
const SEGMENTS: i32 = 4;

/// The maximum number of pages that wait to be shown, for each segment.
const WAITING: usize = 1;

/// The maximum number of reads of single locks in flight, for each segment.
const AT_ONCE: usize = 8;

/// How long to wait for a page before checking for signals such as ^C.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// What to scan, and how.
pub(super) struct Scan {
    pub(super) target: ScanTarget,
    pub(super) stores: Stores,
    pub(super) speed: Speed,
    pub(super) staleness: Staleness,
    /// Whether nothing is shown on stderr while the scan runs.
    pub(super) is_silent: bool,
}

/// The result of a scan.
#[derive(Debug, Default)]
pub(super) struct Scanned {
    /// The number of items or objects that were checked.
    pub(super) items: u64,
    /// The signal that stopped the scan early; `None` if it was completed.
    pub(super) stopped: Option<Signal>,
    /// Why a request for a page failed, which ended the scan early; `None` if none failed.
    pub(super) failed: Option<Trouble>,
    /// How long the table must not be read now, because the scan has used its capacity. `None` if the capacity is not
    /// limited.
    pub(super) owed: Option<Duration>,
    /// The objects that a test of the service has put. They are neither locks nor in the place of a lock.
    pub(super) test_objects: TestObjects,
}

/// The objects in a bucket that a test of the service has put ([`probe::is_test_object`]).
#[derive(Clone, Debug, Default)]
pub(super) struct TestObjects {
    count: u64,
    /// The first of them. `None` if there is none.
    first: Option<StoreKey>,
}

impl TestObjects {
    fn add(&mut self, found: Vec<StoreKey>) {
        self.count += found.len() as u64;
        self.first = self.first.take().or_else(|| found.into_iter().next());
    }

    /// Returns the line about the objects, with the command that removes the first one. `command` returns a `tf locks`
    /// command for the bucket. `None` if there is no object.
    pub(super) fn describe(&self, command: impl FnOnce(&str) -> String) -> Option<String> {
        let path = console::argument(&self.first.as_ref()?.path());
        let (what, which) = match self.count {
            1 => ("1 object in the bucket is".to_owned(), "it"),
            count => (format!("{count} objects in the bucket are"), "the first of them"),
        };
        let remove = command(messages::next_step::RELEASE_NO_LOCK);
        Some(format!(
            "{what} not a lock: tf puts such an object to test the service, and removes it within seconds\n\
             if it stays there, nobody needs it; to remove {which}, type: {remove} {path}"
        ))
    }
}

/// How a table is divided into segments, and how fast it is read.
#[derive(Clone, Copy, Debug, PartialEq)]
struct ScanPlan {
    segments: i32,
    /// The read capacity units that may be used per second; `None` for no limit.
    rate: Option<f64>,
}

impl ScanPlan {
    fn new(asked: Option<f64>, description: Option<&dynamodb::Description>) -> Self {
        let rate = asked.or(match description {
            None => Some(UNKNOWN_RATE),
            #[expect(clippy::cast_precision_loss, reason = "a table has far fewer than 2^53 units")]
            Some(description) => description.read_capacity.map(|units| units as f64 * SHARE),
        });
        Self { segments: if rate.is_some() { 1 } else { SEGMENTS }, rate }
    }
}

/// Adds the rows of an entry, and what a command keeps of it.
type Step<T> = Arc<dyn Fn(ListedEntry, &mut Rows, &mut T) -> io::Result<()> + Send + Sync>;

/// What a command makes of entries.
#[derive(Clone)]
struct Fold<T> {
    /// What the command keeps if there is no entry.
    initial: T,
    step: Step<T>,
}

/// What was made of some entries of a page.
struct Folded<T> {
    tally: Tally,
    rows: Rows,
    kept: T,
}

impl<T: Clone> Fold<T> {
    fn of_none(&self) -> Folded<T> {
        Folded { tally: Tally::default(), rows: Rows::default(), kept: self.initial.clone() }
    }

    fn of(&self, entries: Vec<ListedEntry>) -> Result<Folded<T>, Trouble> {
        let mut folded = self.of_none();
        entries.into_iter().try_for_each(|entry| self.add(entry, &mut folded))?;
        Ok(folded)
    }

    fn add(&self, entry: ListedEntry, folded: &mut Folded<T>) -> Result<(), Trouble> {
        folded.tally.add(Tally::of(slice::from_ref(&entry)));
        Ok((self.step)(entry, &mut folded.rows, &mut folded.kept)?)
    }
}

/// One page whose entries were read and judged. An empty page is not always the last one: the filter may leave out all
/// its items, which still count as scanned, or the segment may have no items at its beginning.
struct ListedPage<T> {
    parts: Vec<Folded<T>>,
    scanned: u64,
    /// As [`Scanned::test_objects`].
    test_objects: Vec<StoreKey>,
    /// Whether this is the last page of its segment.
    is_last: bool,
    /// As [`Scanned::owed`]. Only the last page of a segment has it.
    owed: Option<Duration>,
}

impl<T> ListedPage<T> {
    /// The page that marks the end of a segment.
    const END: Self = Self { parts: Vec::new(), scanned: 0, test_objects: Vec::new(), is_last: true, owed: None };
}

type Pages<T> = mpsc::Sender<Result<ListedPage<T>, Trouble>>;

impl Scan {
    /// Reads the whole target and shows its entries. `step` gets each entry, perhaps on another thread. It adds the rows to
    /// show, and adds what the caller keeps of the entry to a copy of `initial`. `keep` gets the copies, in the order in
    /// which the entries are shown.
    ///
    /// # Errors
    /// Fails if the target cannot be scanned at all or if the output cannot be written. If a request for a page fails,
    /// the entries of the pages that were read are shown, and the result says why it failed.
    pub(super) async fn run<T: Clone + Send + Sync + 'static>(
        &self,
        stop_requests: &mut StopRequests,
        output: &mut Output,
        initial: T,
        step: impl Fn(ListedEntry, &mut Rows, &mut T) -> io::Result<()> + Send + Sync + 'static,
        mut keep: impl FnMut(T),
    ) -> Result<Scanned, Trouble> {
        let fold = Fold { initial, step: Arc::new(step) };
        let (segments, total) = match stop_requests.unless_stopped(self.prepare()).await {
            Ok(prepared) => prepared?,
            Err(signal) => return Ok(Scanned { stopped: Some(signal), ..Scanned::default() }),
        };
        let progress = if self.is_silent { ProgressBar::hidden() } else { progress(total) };
        // The end of this function aborts the readers that are left.
        let mut readers = JoinSet::new();
        // The segments that have more pages. The next page to show is that of the first one.
        let mut turns: VecDeque<_> =
            segments.into_iter().map(|segment| self.start(segment, fold.clone(), &mut readers)).collect();
        let mut scanned = Scanned::default();
        let (mut locks, mut stale, mut unfinished) = (0_u64, 0_u64, turns.len());
        let mut show = |page: ListedPage<T>, scanned: &mut Scanned, stop_requests: &mut StopRequests| {
            unfinished -= usize::from(page.is_last);
            scanned.items += page.scanned;
            scanned.test_objects.add(page.test_objects);
            scanned.owed = scanned.owed.max(page.owed);
            let mut rows = Vec::with_capacity(page.parts.len());
            for part in page.parts {
                locks += part.tally.locks;
                stale += part.tally.stale;
                rows.push(part.rows);
                keep(part.kept);
            }
            progress.set_position(scanned.items);
            progress.set_message(format!("{locks} locks, {stale} stale"));
            let mut shown = rows.iter().filter(|rows| !rows.is_empty());
            progress.suspend(|| shown.try_for_each(|rows| output.put(rows, stop_requests)))
        };
        while let Some(pages) = turns.front_mut() {
            // Pages may arrive without a pause.
            scanned.stopped = stop_requests.next();
            if scanned.stopped.is_some() {
                break;
            }
            let page = tokio::select! {
                page = pages.recv() => page,
                () = sleep(POLL_INTERVAL) => continue,
            };
            // A reader that has panicked sends no last page.
            let no_end = || Err(Trouble::Said("a part of the target could not be read to its end".into()));
            match page.unwrap_or_else(no_end) {
                Ok(page) => {
                    if page.is_last {
                        turns.pop_front();
                    } else {
                        turns.rotate_left(1);
                    }
                    show(page, &mut scanned, stop_requests)?;
                }
                Err(trouble) => {
                    scanned.failed = Some(trouble);
                    turns.pop_front();
                    break;
                }
            }
        }
        // If the scan was stopped or has failed, the pages that the other segments have read by now are shown too: for
        // each segment those that wait, and the one whose reader waits to send it. The readers go on meanwhile, so there
        // may always be more.
        for _ in 0..=WAITING {
            for _ in 0..turns.len() {
                let Some(mut pages) = turns.pop_front() else { break };
                let Ok(Ok(page)) = pages.try_recv() else { continue };
                if let Some(signal) = stop_requests.next() {
                    scanned.stopped = Some(signal);
                    turns.clear();
                    break;
                }
                if !page.is_last {
                    turns.push_back(pages);
                }
                show(page, &mut scanned, stop_requests)?;
            }
            // A reader whose page has waited sends it now.
            yield_now().await;
        }
        progress.finish_and_clear();
        let how = match &scanned {
            Scanned { stopped: Some(_), .. } if unfinished > 0 => Some("stopped"),
            Scanned { failed: Some(_), .. } if scanned.items > 0 && !self.is_silent => Some("failed"),
            _ => None,
        };
        if let Some(how) = how {
            let of = total.map_or_else(String::new, |total| format!(" of about {total}"));
            console::say(&format!("{how} after {}{of} items, so the list is incomplete", scanned.items));
        }
        Ok(scanned)
    }

    /// Starts to read a segment, as one of `readers`. Returns where its pages arrive.
    fn start<T: Clone + Send + Sync + 'static>(
        &self,
        segment: Segment,
        fold: Fold<T>,
        readers: &mut JoinSet<()>,
    ) -> mpsc::Receiver<Result<ListedPage<T>, Trouble>> {
        let (pages, arrived) = mpsc::channel(WAITING);
        let reader = SegmentReader { stores: self.stores.clone(), staleness: self.staleness, fold, pages };
        match segment {
            Segment::Table(table, plan, part) => readers.spawn(reader.read_table(table, plan, part)),
            Segment::Bucket(bucket, prefix) => readers.spawn(reader.read_bucket(bucket, prefix)),
        };
        arrived
    }

    /// Returns the segments to read and the approximate number of items; `None` if the number is not known.
    ///
    /// # Errors
    /// Fails if the table does not exist or has another key than terraform's, or if it cannot be described for another
    /// reason than a missing permission.
    async fn prepare(&self) -> Result<(Vec<Segment>, Option<u64>), Trouble> {
        match &self.target {
            ScanTarget::Table(table) => {
                let what = format!("table {table}");
                let description = match dynamodb::describe(&self.stores.dynamodb, table).await {
                    Ok(description) => Some(description),
                    Err(failure) if failure.denied().is_some() => {
                        let rate = self.speed.rate.unwrap_or(UNKNOWN_RATE);
                        if !self.is_silent {
                            console::say(&format!(
                                "table {} is read slowly, at {rate} units per second, because its capacity is not \
                                 known\npermission denied: dynamodb:DescribeTable\nto read the table faster, add --rate \
                                 UNITS",
                                visible(table)
                            ));
                        }
                        None
                    }
                    Err(failure) => return Err(Trouble::failed(failure, &what, &self.stores)),
                };
                if let Some(description) = &description
                    && description.keys != ["LockID"]
                {
                    return Err(Trouble::Said(format!(
                        "{} is not a lock table: its key is {}; terraform needs LockID as the only key\ncheck the name of \
                         the table",
                        visible(table),
                        visible(&description.keys.join(" and "))
                    )));
                }
                let plan = ScanPlan::new(self.speed.rate, description.as_ref());
                let total =
                    description.and_then(|description| description.items).and_then(|items| items.try_into().ok());
                let parts = (0..plan.segments).map(|part| Segment::Table(table.clone(), plan, part));
                Ok((parts.collect(), total))
            }
            ScanTarget::Bucket(bucket, prefix) => Ok((vec![Segment::Bucket(bucket.clone(), prefix.clone())], None)),
            ScanTarget::Directory(_) => Ok((Vec::new(), None)),
        }
    }
}

/// What one task reads: a segment of a table, by number, or the keys of a bucket with a prefix.
enum Segment {
    Table(String, ScanPlan, i32),
    Bucket(String, String),
}

/// Returns where the progress is drawn, so many times a second. A terminal that nobody reads must not let a drawing wait, as
/// [`StopRequests::write`] says for the output: a drawing that it does not accept is lost.
fn progress_target(stderr: BorrowedFd<'_>, hz: u8) -> ProgressDrawTarget {
    let reopened = descriptor::reopened_terminal(stderr).and_then(|terminal| {
        // Nothing is read.
        Some(Term::read_write_pair(File::from(terminal.try_clone().ok()?), File::from(terminal)))
    });
    reopened.map_or_else(|| ProgressDrawTarget::stderr_with_hz(hz), |terminal| ProgressDrawTarget::term(terminal, hz))
}

/// Returns a progress bar on stderr. It is not drawn if stderr is not a terminal.
fn progress(total: Option<u64>) -> ProgressBar {
    let target = progress_target(io::stderr().as_fd(), 5);
    let (bar, template) = match total {
        Some(total) => (
            ProgressBar::with_draw_target(Some(total), target),
            "{wide_bar} {pos} of about {len} items, {msg} ({elapsed})",
        ),
        None => (ProgressBar::with_draw_target(None, target), "{spinner} {pos} objects, {msg} ({elapsed})"),
    };
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar
}

/// Reads one segment and sends its pages.
struct SegmentReader<T> {
    stores: Stores,
    staleness: Staleness,
    fold: Fold<T>,
    pages: Pages<T>,
}

/// The judged entries of a page.
struct Judged<T> {
    /// What was made of the first entries, up to the first one whose verdict is not final.
    settled: Folded<T>,
    /// The other entries. Some of them must be read again, or the witness must be asked about them.
    open: Vec<ListedEntry>,
}

impl<T: Clone + Send + Sync + 'static> SegmentReader<T> {
    /// Reads one segment of a table and sends its pages, until the segment ends, a request fails or the receiver is
    /// dropped.
    async fn read_table(self, table: String, plan: ScanPlan, part: i32) {
        let Self { stores, staleness, fold, pages } = self;
        let mut from = None;
        let mut limit = plan.rate.map(first_limit);
        loop {
            let begun = Instant::now();
            let segment = dynamodb::Segment { number: part, of: plan.segments };
            let judge_items = {
                let (stores, table, fold) = (stores.clone(), table.clone(), fold.clone());
                move |items: &mut dyn Iterator<Item = ScannedItem>, date| {
                    let parts = items.map(|ScannedItem { key, info, record }| {
                        StoredPart::new(stores.item(&table, key), StoredLock::Item(info), record, date)
                    });
                    judge_each(parts.map(alone), staleness, &fold)
                }
            };
            let page = dynamodb::Page { segment, limit, from };
            let page = match dynamodb::scan(&stores.dynamodb, &table, page, judge_items).await {
                Ok(page) => page,
                Err(failure) => {
                    let _ = pages.send(Err(Trouble::failed(failure, &format!("table {table}"), &stores))).await;
                    return;
                }
            };
            from = page.next;
            let (listed, read_again) = match page.content {
                Ok(Judged { settled, open }) => {
                    let (open, read_again) = judged_again(open, &stores, staleness).await;
                    let parts = open.and_then(|open| Ok(vec![settled, fold.of(open)?]));
                    let listed = parts.map(|parts| ListedPage {
                        parts,
                        scanned: page.scanned,
                        is_last: false,
                        ..ListedPage::END
                    });
                    (listed, read_again)
                }
                Err(trouble) => (Err(trouble), 0),
            };
            if pages.send(listed).await.is_err() {
                return;
            }
            let mut until = begun;
            if let Some(rate) = plan.rate {
                // One unit reads 8 KB, and no item that terraform writes is larger. So if the service does not report
                // the consumed capacity, one unit per item is enough.
                #[expect(clippy::cast_precision_loss, reason = "a page has few items")]
                let scanned = page.scanned as f64;
                let consumed = page.consumed.unwrap_or(scanned);
                limit = Some(next_limit(rate, Cost { scanned, consumed }));
                #[expect(clippy::cast_precision_loss, reason = "a page has few items")]
                let used = consumed + read_again as f64;
                // A service may send any number, or none.
                until = begun + Duration::try_from_secs_f64((used / rate).clamp(0.0, 3600.0)).unwrap_or_default();
            }
            if from.is_none() {
                let owed = plan.rate.map(|_| until.saturating_duration_since(Instant::now()));
                let _ = pages.send(Ok(ListedPage { owed, ..ListedPage::END })).await;
                return;
            }
            sleep_until(until).await;
        }
    }

    /// Reads the lock objects of a bucket and sends them in pages, until the listing ends, a request fails or the
    /// receiver is dropped.
    async fn read_bucket(self, bucket: String, prefix: String) {
        let Self { stores, staleness, fold, pages } = self;
        let failed = |failure: Failure, stores: &Stores| Trouble::failed(failure, &format!("bucket {bucket}"), stores);
        let mut keys = s3::keys(&stores.s3, &bucket, &prefix);
        while let Some(page) = keys.next().await {
            let page = match page {
                Ok(page) => page,
                Err(failure) => {
                    let _ = pages.send(Err(failed(failure, &stores))).await;
                    return;
                }
            };
            let scanned = page.len() as u64;
            let store_keys: Vec<StoreKey> =
                page.iter().filter(|key| key.ends_with(LOCK_FILE)).map(|key| stores.object(&bucket, key)).collect();
            let (stores_here, failed) = (&stores, &failed);
            let found: Vec<Result<ReadObject, Trouble>> = stream::iter(store_keys)
                .map(|store_key| async move {
                    match stores_here.read_part(&store_key).await {
                        Ok(None) => Ok(ReadObject::Entries(Vec::new())),
                        Ok(Some(found)) if probe::is_test_object(&found.store_key, &found.stored) => {
                            Ok(ReadObject::Test(found.store_key))
                        }
                        Ok(Some(found)) => Ok(ReadObject::Entries(vec![alone(found)])),
                        Err(failure) if failure.is_final() => {
                            let reason = visible(&failure.to_string());
                            let unread = UnreadableLock { place: store_key, reason, stored: None };
                            Ok(ReadObject::Entries(vec![ListedEntry::UnreadableLock(unread)]))
                        }
                        Err(failure) => Err(failed(failure, stores_here)),
                    }
                })
                .buffered(AT_ONCE)
                .collect()
                .await;
            let found: Result<Vec<ReadObject>, Trouble> = found.into_iter().collect();
            let page = match found {
                Ok(found) => {
                    let (mut entries, mut test_objects) = (Vec::new(), Vec::new());
                    for object in found {
                        match object {
                            ReadObject::Entries(read) => entries.extend(read),
                            ReadObject::Test(place) => test_objects.push(place),
                        }
                    }
                    judge(&mut entries, staleness);
                    let (entries, _) = judged_again(entries, &stores, staleness).await;
                    let part = entries.and_then(|entries| fold.of(entries));
                    part.map(|part| ListedPage {
                        parts: vec![part],
                        scanned,
                        test_objects,
                        is_last: false,
                        ..ListedPage::END
                    })
                }
                Err(trouble) => Err(trouble),
            };
            if pages.send(page).await.is_err() {
                return;
            }
        }
        let _ = pages.send(Ok(ListedPage::END)).await;
    }
}

/// What was read at the key of a lock object.
enum ReadObject {
    /// A lock, or what is not a lock or could not be read. Empty if there is no object by now.
    Entries(Vec<ListedEntry>),
    /// The object of a test at this place.
    Test(StoreKey),
}

/// Returns how many items to read first, while the size of the items is not known. An item uses at most one unit, so
/// this is the number of units for one second.
fn first_limit(rate: f64) -> i32 {
    clamped(rate)
}

/// The read capacity that one page used.
#[derive(Clone, Copy)]
struct Cost {
    /// How many items were examined.
    scanned: f64,
    /// How many read capacity units these items used.
    consumed: f64,
}

/// Returns how many items use the capacity of one second, according to the cost of the previous page.
fn next_limit(rate: f64, Cost { scanned, consumed }: Cost) -> i32 {
    clamped(if consumed > 0.0 { scanned * rate / consumed } else { rate })
}

#[expect(clippy::cast_possible_truncation, reason = "the value is between 1 and 10,000")]
fn clamped(items: f64) -> i32 {
    items.clamp(1.0, 10_000.0) as i32
}

/// The index of an entry that was read again, and what takes its place.
type Change = (usize, Vec<ListedEntry>);

/// Judges `entries` one by one, all of which are in a response that was read before this call. Adds each to
/// [`Judged::settled`] until the first one whose verdict is not final. Collects that one and all later ones in
/// [`Judged::open`].
///
/// # Errors
/// Fails if an entry cannot be used.
fn judge_each<T: Clone>(
    entries: impl Iterator<Item = ListedEntry>,
    staleness: Staleness,
    fold: &Fold<T>,
) -> Result<Judged<T>, Trouble> {
    let (mut host, has_witness) = (None, witness::is_set());
    let mut judged = Judged { settled: fold.of_none(), open: Vec::new() };
    for mut entry in entries {
        staleness.judge(slice::from_mut(&mut entry), host.get_or_insert_with(HostView::look));
        let is_final = match &entry {
            ListedEntry::Lock(lock) => !lock.stale && !has_witness,
            ListedEntry::UnreadableLock(_) => true,
        };
        if is_final && judged.open.is_empty() {
            fold.add(entry, &mut judged.settled)?;
        } else {
            // With the entries that follow it: several are then read again at the same time, and the order is kept.
            judged.open.push(entry);
        }
    }
    Ok(judged)
}

/// Judges the holders of the locks in `entries`, which were read before this call.
fn judge(entries: &mut [ListedEntry], staleness: Staleness) {
    if entries.iter().any(|entry| matches!(entry, ListedEntry::Lock(_))) {
        staleness.judge(entries, &HostView::look());
    }
}

/// Asks the witness about the judged locks in `entries`. A lock that would be reported as stale is read again with a
/// consistent read. If another lock or a newer lease is stored there by now, that is judged instead. If no lock is stored
/// there any more, the entry is left out. Also returns how many locks were read again.
async fn judged_again(
    mut entries: Vec<ListedEntry>,
    stores: &Stores,
    staleness: Staleness,
) -> (Result<Vec<ListedEntry>, Trouble>, usize) {
    staleness.ask_witness(&mut entries).await;
    let stale: Vec<(usize, StoredPart)> = entries
        .iter()
        .enumerate()
        .filter_map(|(index, entry)| match entry {
            ListedEntry::Lock(lock) if lock.stale => {
                let (store_key, content) = lock.parts[0].clone();
                Some((index, StoredPart { store_key, stored: content, lease: lock.lease.clone() }))
            }
            ListedEntry::Lock(_) | ListedEntry::UnreadableLock(_) => None,
        })
        .collect();
    let again = stale.len();
    let changed: Vec<Result<Option<Change>, Failure>> = stream::iter(stale)
        .map(|(index, before)| async move {
            let Some(found) = stores.read_part(&before.store_key).await? else { return Ok(Some((index, Vec::new()))) };
            if before.is_same_as(&found) {
                return Ok(None);
            }
            let mut changed = vec![alone(found)];
            staleness.judge(&mut changed, &HostView::look());
            staleness.ask_witness(&mut changed).await;
            Ok(Some((index, changed)))
        })
        .buffered(AT_ONCE)
        .collect()
        .await;
    let changed: Result<Vec<_>, Failure> = changed.into_iter().filter_map(Result::transpose).collect();
    match changed {
        Ok(changed) => (Ok(replaced(entries, changed)), again),
        Err(failure) => (Err(Trouble::failed(failure, "the table or bucket", stores)), again),
    }
}

/// Returns `entries` with others in the place of some of them. `changed` has the indexes of these in ascending order,
/// each with what takes its place.
fn replaced<T>(mut entries: Vec<T>, changed: Vec<(usize, Vec<T>)>) -> Vec<T> {
    // From the end, so that the other indexes stay valid.
    for (index, now) in changed.into_iter().rev() {
        entries.splice(index..=index, now);
    }
    entries
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(read_capacity: Option<i64>) -> dynamodb::Description {
        dynamodb::Description {
            keys: vec!["LockID".into()],
            read_capacity,
            items: None,
            replicas: Vec::new(),
            strong: false,
        }
    }

    #[test]
    fn a_provisioned_table_gives_a_quarter_and_one_segment() {
        for (asked, description, segments, rate) in [
            (None, Some(table(None)), 4, None),
            (None, Some(table(Some(100))), 1, Some(25.0)),
            (None, Some(table(Some(1))), 1, Some(0.25)),
            (None, None, 1, Some(UNKNOWN_RATE)),
            (Some(7.5), Some(table(Some(100))), 1, Some(7.5)),
            (Some(7.5), Some(table(None)), 1, Some(7.5)),
            (Some(7.5), None, 1, Some(7.5)),
        ] {
            assert_eq!(ScanPlan::new(asked, description.as_ref()), ScanPlan { segments, rate });
        }
    }

    /// Each of three entries is unchanged, gone, replaced by one, or replaced by two.
    #[test]
    fn an_entry_that_was_read_again_is_replaced_in_its_place() {
        for kinds in 0..64_usize {
            let kind = |index: usize| kinds >> (2 * index) & 3;
            let now = |index: usize| (0..kind(index) - 1).map(|part| 10 * index + part + 100).collect::<Vec<_>>();
            let changed = (0..3).filter(|index| kind(*index) > 0).map(|index| (index, now(index))).collect();
            let expected = (0..3).flat_map(|index| if kind(index) == 0 { vec![index] } else { now(index) });
            assert_eq!(replaced(vec![0, 1, 2], changed), expected.collect::<Vec<_>>());
        }
    }

    #[test]
    fn test_objects_are_one_note_with_the_command_that_removes_the_first() {
        let at = |key: &str| StoreKey::S3 { bucket: "b".into(), key: key.into(), region: "r".into() };
        let mut objects = TestObjects::default();
        let note = |objects: &TestObjects| objects.describe(|words| format!("tf locks {words} --bucket b"));
        assert_eq!(note(&objects), None);
        objects.add(vec![at("k.1.tflock")]);
        let one = note(&objects).unwrap();
        assert!(one.starts_with("1 object in the bucket is not a lock"), "{one}");
        assert!(one.ends_with("to remove it, type: tf locks release --no-lock --bucket b b/k.1"), "{one}");
        objects.add(vec![at("k.2.tflock"), at("k.3.tflock")]);
        let three = note(&objects).unwrap();
        assert!(three.starts_with("3 objects in the bucket are not a lock"), "{three}");
        assert!(
            three.ends_with("to remove the first of them, type: tf locks release --no-lock --bucket b b/k.1"),
            "{three}"
        );
    }

    #[test]
    fn a_page_takes_what_a_second_may() {
        assert_eq!(first_limit(25.0), 25);
        assert_eq!(first_limit(0.25), 1);
        // Items of 256 bytes: one unit (8 KB) reads 32 of them.
        assert_eq!(next_limit(25.0, Cost { scanned: 25.0, consumed: 1.0 }), 625);
        assert_eq!(next_limit(25.0, Cost { scanned: 10.0, consumed: 500.0 }), 1);
        assert_eq!(next_limit(25.0, Cost { scanned: 0.0, consumed: 0.0 }), 25);
    }
}
