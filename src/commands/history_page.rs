//! The page of `tf locks history --html`: one HTML file without a script and without any resource from elsewhere.
//!
//! Text from locks is untrusted. It is in the page only through [`escaped`]. The page also has a policy
//! (`Content-Security-Policy`) that forbids every script and every request.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

use crate::console::{length_of_time, visible};
use crate::journal::history::{By, LockEvent, What};
use crate::time::{saturating_add, saturating_sub};

/// The maximum number of rows in the timeline. The states with the newest events have a row.
const MAX_ROWS: usize = 40;

/// The maximum number of marks on the axis of the timeline.
const MAX_MARKS: i64 = 7;

/// The distances between the marks on the axis, in seconds: the first one that needs at most [`MAX_MARKS`] marks is
/// used.
const STEPS: [i64; 15] = [
    60, 300, 900, 3600, 10_800, 21_600, 43_200, 86_400, 172_800, 259_200, 604_800, 1_209_600, 2_592_000, 7_776_000,
    31_536_000,
];

/// The kinds of events, in the order of the legend.
const KINDS: [What; 5] = [What::Released, What::TakenOver, What::Forced, What::Refused, What::Replaced];

/// The upper limits of the durations for which locks were held, in seconds, with their names.
const HELD: [(u64, &str); 8] = [
    (60, "less than 1 min"),
    (300, "1 to 5 min"),
    (900, "5 to 15 min"),
    (3600, "15 to 60 min"),
    (14_400, "1 to 4 h"),
    (86_400, "4 to 24 h"),
    (604_800, "1 to 7 d"),
    (u64::MAX, "more than 7 d"),
];

/// What the page shows.
#[derive(Clone, Copy, Debug)]
pub(super) struct Page<'a> {
    /// The events, the oldest first.
    pub(super) events: &'a [LockEvent],
    /// The number of lines of the history that could not be read.
    pub(super) unreadable: usize,
    /// `user@host` of the history.
    pub(super) who: &'a str,
    /// The time of `--since`.
    pub(super) since: Option<Timestamp>,
    /// The path of `--path`.
    pub(super) path: Option<&'a str>,
    pub(super) now: Timestamp,
}

/// Makes untrusted text safe for a page, in an element and in a quoted attribute. Control and direction characters are
/// escaped, and the text is truncated to 200 characters ([`visible`]).
fn escaped(text: &str) -> String {
    let text = visible(text);
    let mut safe = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            character => safe.push(character),
        }
    }
    safe
}

/// Returns the class of a kind in the style sheet, and its name.
fn kind(what: What) -> (&'static str, &'static str) {
    match what {
        What::Released => ("released", "released"),
        What::TakenOver => ("taken-over", "taken over"),
        What::Forced => ("forced", "forced"),
        What::Refused => ("refused", "refused"),
        What::Replaced => ("replaced", "replaced"),
    }
}

/// Returns the time at which the lock of an event was created. `None` if it is not known, or is after the event.
fn created(event: &LockEvent) -> Option<Timestamp> {
    event.created.as_ref()?.parse().ok().filter(|created| *created <= event.time)
}

/// Returns how long the lock had been held at the time of an event. `None` if that is not known.
fn held(event: &LockEvent) -> Option<Duration> {
    event.time.duration_since(created(event)?).try_into().ok()
}

/// Whether the lock was no longer held after the event.
fn is_end(event: &LockEvent) -> bool {
    matches!(event.what, What::Released | What::TakenOver | What::Forced)
}

/// The time that the timeline shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Axis {
    begin: Timestamp,
    end: Timestamp,
}

impl Axis {
    /// Returns the time from `since`, or else from the creation of the first lock, to the last event. The time before
    /// the first event takes at most half of the axis: one lock that was held for years must not hide all others.
    fn new(events: &[LockEvent], since: Option<Timestamp>, now: Timestamp) -> Self {
        let (Some(first), Some(last)) = (events.first(), events.last()) else { return Self { begin: now, end: now } };
        let shortest = SignedDuration::from_mins(10);
        let span = last.time.duration_since(first.time).max(shortest);
        let earliest = saturating_sub(first.time, span);
        let begin = since.unwrap_or_else(|| {
            let created = events.iter().filter_map(created).min().unwrap_or(first.time);
            created.min(first.time).max(earliest)
        });
        let margin = last.time.duration_since(begin).max(shortest) / 50;
        let begin = if since.is_some() { begin.min(first.time) } else { saturating_sub(begin, margin) };
        Self { begin, end: saturating_add(last.time, margin) }
    }

    fn seconds(self) -> f64 {
        self.end.duration_since(self.begin).as_secs_f64().max(1.0)
    }

    /// Returns the position of a time, in percent from the left. A time before the axis is at its left end.
    fn position(self, time: Timestamp) -> f64 {
        (time.duration_since(self.begin).as_secs_f64() / self.seconds() * 100.0).clamp(0.0, 100.0)
    }

    /// Returns the positions of the marks, in percent, with their names.
    fn marks(self) -> Vec<(f64, String)> {
        let length = self.end.duration_since(self.begin).as_secs();
        let step = STEPS.into_iter().find(|step| length / step <= MAX_MARKS).unwrap_or(length / MAX_MARKS);
        let format = if step < 86_400 { "%m-%d %H:%M" } else { "%Y-%m-%d" };
        let first = self.begin.as_second().div_euclid(step) + 1;
        let times = (first..).map(|number| Timestamp::from_second(number * step));
        let times = times.map_while(|time| time.ok().filter(|time| *time <= self.end));
        times.map(|time| (self.position(time), time.strftime(format).to_string())).collect()
    }
}

impl Page<'_> {
    /// Returns the page.
    pub(super) fn html(self) -> String {
        let mut html = format!(
            "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
             <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
             <meta name=\"color-scheme\" content=\"light dark\">\n\
             <title>History of state locks: {}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n",
            escaped(self.who)
        );
        html.push_str(&self.heading());
        if !self.events.is_empty() {
            html.push_str(&self.numbers());
            html.push_str(&self.timeline());
            html.push_str(&self.durations());
            html.push_str(&self.table());
        }
        html.push_str("</main>\n</body>\n</html>\n");
        html
    }

    fn heading(self) -> String {
        let mut about = match (self.events.first(), self.events.last()) {
            (Some(first), Some(last)) => format!("From {:.0} to {:.0}.", first.time, last.time),
            _ => "There are no events.".to_owned(),
        };
        if let Some(since) = self.since {
            let _ = write!(about, " Only events since {since:.0}.");
        }
        if let Some(path) = self.path {
            let _ = write!(about, " Only the path <code>{}</code>.", escaped(path));
        }
        if self.unreadable > 0 {
            let _ = write!(about, " {} lines of the history could not be read.", self.unreadable);
        }
        format!(
            "<h1>History of state locks</h1>\n<p>What tf has done to locks for <code>{}</code>. {about} Written at \
             {:.0}. All times are in UTC.</p>\n",
            escaped(self.who),
            self.now
        )
    }

    fn numbers(self) -> String {
        let mut html = String::from("<ul class=\"numbers\">\n");
        for what in KINDS {
            let (class, name) = kind(what);
            let number = self.events.iter().filter(|event| event.what == what).count();
            let _ = writeln!(html, "<li class=\"{class}\"><b>{number}</b> {name}</li>");
        }
        let mut times: Vec<Duration> = self.events.iter().filter(|event| is_end(event)).filter_map(held).collect();
        times.sort();
        if let (Some(longest), Some(median)) = (times.last(), times.get(times.len() / 2)) {
            for (name, time) in [("median time held", median), ("longest time held", longest)] {
                let _ = writeln!(html, "<li><b>{}</b> {name}</li>", length_of_time(*time));
            }
        }
        html + "</ul>\n"
    }

    fn timeline(self) -> String {
        let axis = Axis::new(self.events, self.since, self.now);
        // The states, the one with the newest event first.
        let mut newest: BTreeMap<&str, usize> = BTreeMap::new();
        for (index, event) in self.events.iter().enumerate() {
            newest.insert(&event.path, index);
        }
        let mut paths: Vec<(&str, usize)> = newest.into_iter().collect();
        paths.sort_by_key(|(_, index)| std::cmp::Reverse(*index));
        let more = paths.len().saturating_sub(MAX_ROWS);
        paths.truncate(MAX_ROWS);
        let mut html = String::from(
            "<section>\n<h2>Timeline</h2>\n<p>Each bar is a lock, from its creation to the event at its right end. The \
             colours are those of the numbers above. A refused release leaves the lock held.</p>\n<div class=\"timeline\">\n",
        );
        let marks = axis.marks();
        for (path, _) in paths {
            let shown = escaped(path);
            let _ = write!(html, "<div class=\"path\" title=\"{shown}\"><bdi>{shown}</bdi></div><div class=\"row\">");
            for (position, _) in &marks {
                let _ = write!(html, "<i style=\"left:{position:.2}%\"></i>");
            }
            for event in self.events.iter().filter(|event| event.path == path) {
                html.push_str(&bar(event, axis));
            }
            html.push_str("</div>\n");
        }
        html.push_str("<div></div><div class=\"axis\">");
        for (position, name) in &marks {
            let _ = write!(html, "<span style=\"left:{position:.2}%\">{name}</span>");
        }
        html.push_str("</div>\n</div>\n");
        if more > 0 {
            let _ = writeln!(html, "<p>{more} more states have only older events. The table below has all events.</p>");
        }
        html + "</section>\n"
    }

    fn durations(self) -> String {
        let mut counts = [0_usize; HELD.len()];
        for held in self.events.iter().filter(|event| is_end(event)).filter_map(held) {
            let index = HELD.iter().position(|(limit, _)| held.as_secs() < *limit).unwrap_or(HELD.len() - 1);
            counts[index] += 1;
        }
        let most = counts.iter().copied().max().unwrap_or(0);
        if most == 0 {
            return String::new();
        }
        let mut html = String::from(
            "<section>\n<h2>How long locks were held</h2>\n<p>Until they were released, taken over or deleted by \
             force.</p>\n<div class=\"durations\">\n",
        );
        for ((_, name), count) in HELD.iter().zip(counts) {
            #[expect(clippy::cast_precision_loss, reason = "a history has far fewer than 2^53 events")]
            let width = count as f64 / most as f64 * 100.0;
            let _ = writeln!(html, "<div>{name}</div><div><b style=\"width:{width:.1}%\"></b></div><div>{count}</div>");
        }
        html + "</div>\n</section>\n"
    }

    fn table(self) -> String {
        let mut html = String::from(
            "<section>\n<h2>Events</h2>\n<p>The newest first.</p>\n<div class=\"scroll\">\n<table>\n<thead><tr><th>Time</th>\
             <th>Event</th><th>State</th><th>Held by</th><th>Held for</th><th>By</th><th>Why</th><th>Lock ID</th></tr>\
             </thead>\n<tbody>\n",
        );
        for event in self.events.iter().rev() {
            let (class, name) = kind(event.what);
            let held = held(event).map_or_else(|| "-".to_owned(), length_of_time);
            let holder = match event.operation.strip_prefix("OperationType").unwrap_or(&event.operation) {
                "" => escaped(&event.holder),
                operation => format!("{} ({})", escaped(&event.holder), escaped(&operation.to_lowercase())),
            };
            let reason =
                event.reason.as_deref().map_or_else(String::new, |reason| format!(" <q>{}</q>", escaped(reason)));
            let _ = writeln!(
                html,
                "<tr><td><time>{:.0}</time></td><td><span class=\"badge {class}\">{name}</span></td><td>{}</td>\
                 <td>{holder}</td><td>{held}</td><td>{} ({})</td><td>{}{reason}</td><td><code>{}</code></td></tr>",
                event.time,
                escaped(&event.path),
                escaped(&event.who),
                by(event),
                escaped(&event.why),
                escaped(&event.id),
            );
        }
        html + "</tbody>\n</table>\n</div>\n</section>\n"
    }
}

/// Returns the process that caused an event, in words.
pub(super) fn by(event: &LockEvent) -> &'static str {
    match event.by {
        By::Tf => "tf",
        By::Guardian => "its guardian",
        By::Recovery if event.what == What::TakenOver => "tf",
        By::Recovery => "recovery",
        By::Command => "tf locks release",
    }
}

/// Returns the bar of an event in its row: from the creation of the lock to the event.
fn bar(event: &LockEvent, axis: Axis) -> String {
    let (class, name) = kind(event.what);
    let end = axis.position(event.time);
    let begin = created(event).map_or(end, |created| axis.position(created));
    let is_cut = created(event).is_some_and(|created| created < axis.begin);
    let held = held(event).map_or_else(String::new, |held| format!(", held for {}", length_of_time(held)));
    format!(
        "<b class=\"{class}{}\" style=\"left:{begin:.2}%;width:{:.2}%\" title=\"{:.0}: {name}{held}, by {}\"></b>",
        if is_cut { " cut" } else { "" },
        end - begin,
        event.time,
        escaped(&event.holder)
    )
}

/// The style sheet. The colours have a contrast of at least 4.5 to 1 with their background, light and dark.
const STYLE: &str = include_str!("history_page.css");

#[cfg(test)]
mod tests {
    use super::*;

    fn event(time: &str, what: What, path: &str, created: Option<&str>) -> LockEvent {
        let text = format!(
            r#"{{"time":"{time}","event":"released","by":"tf","who":"anna@ci-7","pid":1,"id":"5e75","path":"{path}",
            "operation":"OperationTypeApply","holder":"anna@ci-7","created":null,"why":"it was killed","reason":null}}"#
        );
        LockEvent { what, created: created.map(ToOwned::to_owned), ..serde_json::from_str(&text).unwrap() }
    }

    fn page(events: &[LockEvent]) -> String {
        let now = "2026-11-27T12:00:00Z".parse().unwrap();
        Page { events, unreadable: 0, who: "anna@ci-7", since: None, path: None, now }.html()
    }

    /// Untrusted text is in every field, and in the options.
    #[test]
    fn untrusted_text_is_text_in_the_page_and_nothing_else() {
        for hostile in [
            "<script>alert(1)</script>",
            "\"><img src=x onerror=alert(1)>",
            "' onmouseover='alert(1)",
            "</style></title><svg/onload=alert(1)>",
            "&lt;b&gt;&#x3c;",
            "\u{202e}evil\u{2066}\u{1b}[31m\u{7}\0",
        ] {
            for what in KINDS {
                let mut event = event("2026-11-27T10:00:00Z", what, "x", Some(hostile));
                for field in [
                    &mut event.who,
                    &mut event.id,
                    &mut event.path,
                    &mut event.operation,
                    &mut event.holder,
                    &mut event.why,
                ] {
                    hostile.clone_into(field);
                }
                event.reason = Some(hostile.to_owned());
                let events = [event];
                let page = Page {
                    events: &events,
                    unreadable: 1,
                    who: hostile,
                    since: None,
                    path: Some(hostile),
                    now: Timestamp::UNIX_EPOCH,
                };
                let html = page.html();
                let harmless = Page { who: "w", path: Some("p"), ..page };
                let plain = super::tests::event("2026-11-27T10:00:00Z", what, "x", Some("y"));
                let plain = [LockEvent { reason: Some("r".into()), ..plain }];
                // The same tags, in the same order, as with harmless text.
                assert_eq!(tags(&html), tags(&Page { events: &plain, ..harmless }.html()), "{hostile} {html}");
                assert!(!html.chars().any(|one| (one.is_control() && one != '\n') || one == '\u{202e}'), "{html:?}");
            }
        }
    }

    /// Returns the tags of a page, without the values of their attributes.
    fn tags(html: &str) -> Vec<String> {
        let mut tags = Vec::new();
        let mut rest = html;
        while let Some((_, tag)) = rest.split_once('<') {
            let mut tag_text = String::new();
            let mut is_quoted = false;
            let mut end = tag.len();
            for (index, character) in tag.char_indices() {
                match character {
                    '"' => is_quoted = !is_quoted,
                    '>' if !is_quoted => {
                        end = index;
                        break;
                    }
                    character if !is_quoted => tag_text.push(character),
                    _ => {}
                }
            }
            tags.push(tag_text);
            rest = &tag[end..];
        }
        tags
    }

    #[test]
    fn a_page_needs_nothing_from_elsewhere_and_runs_no_script() {
        let html = page(&[event("2026-11-27T10:00:00Z", What::Released, "b/k", Some("2026-11-27T09:00:00Z"))]);
        for forbidden in ["<script", "http:", "https:", "//", "@import", "url(", "src=", "href=", "<link", "javascript"]
        {
            assert!(!html.contains(forbidden), "{forbidden}");
        }
        assert!(html.contains("default-src 'none'"));
        assert!(html.contains("prefers-color-scheme: dark"));
    }

    #[test]
    fn an_empty_history_is_a_page_too() {
        let html = page(&[]);
        assert!(html.contains("There are no events.") && html.ends_with("</html>\n"), "{html}");
        assert!(!html.contains("<table"));
    }

    #[test]
    fn a_bar_reaches_from_the_creation_of_the_lock_to_the_event() {
        let events = [
            event("2026-11-27T10:00:00Z", What::Released, "b/a", Some("2026-11-27T09:00:00Z")),
            event("2026-11-27T11:00:00Z", What::Refused, "b/b", None),
        ];
        let html = page(&events);
        // The axis is 2 h long, with a margin of 2 % on each side.
        assert!(
            html.contains(
                r#"style="left:1.92%;width:48.08%" title="2026-11-27T10:00:00Z: released, held for 1 h 0 min"#
            ),
            "{html}"
        );
        assert!(html.contains(r#"class="refused" style="left:98.08%;width:0.00%""#), "{html}");
        // The refused lock is still held, so it has no duration.
        assert!(html.contains("<b>1 h 0 min</b> median time held"), "{html}");
    }

    #[test]
    fn the_axis_shows_the_events_whatever_their_locks_say() {
        let now: Timestamp = "2026-11-27T12:00:00Z".parse().unwrap();
        let at = |text: &str| text.parse::<Timestamp>().unwrap();
        let mut events = vec![
            event("2026-11-27T10:00:00Z", What::Released, "b/a", Some("2020-01-01T00:00:00Z")),
            event("2026-11-27T11:00:00Z", What::Released, "b/a", Some("not a time")),
            event("2026-11-27T11:00:00Z", What::Released, "b/a", Some("2030-01-01T00:00:00Z")),
        ];
        let axis = Axis::new(&events, None, now);
        // A lock of years takes half of the axis.
        assert!(axis.begin >= at("2026-11-27T08:55:00Z") && axis.begin <= at("2026-11-27T09:00:00Z"), "{axis:?}");
        assert!(bar(&events[0], axis).contains("released cut\" style=\"left:0.00%"), "{}", bar(&events[0], axis));
        assert_eq!((held(&events[1]), held(&events[2])), (None, None));
        let since = at("2026-11-20T00:00:00Z");
        assert_eq!(Axis::new(&events, Some(since), now).begin, since);
        for moment in ["-009999-01-02T01:59:59Z", "9999-12-30T21:59:59.999999999Z"] {
            events.push(LockEvent { time: at(moment), ..events[0].clone() });
            events.sort_by_key(|event| event.time);
            let axis = Axis::new(&events, None, now);
            assert!(axis.marks().len() <= 10, "{:?}", axis.marks());
            let _ = page(&events);
        }
    }

    #[test]
    fn the_marks_of_an_axis_are_round_times_and_not_too_many() {
        let begin: Timestamp = "2026-11-27T09:07:11Z".parse().unwrap();
        for (seconds, first) in [
            (300, "11-27 09:08"),
            (3600, "11-27 09:15"),
            (86_400, "11-27 12:00"),
            (7 * 86_400, "2026-11-28"),
            (5 * 365 * 86_400, "2026-12-18"),
            (2000 * 365 * 86_400, "2255"),
        ] {
            let marks = Axis { begin, end: saturating_add(begin, SignedDuration::from_secs(seconds)) }.marks();
            assert!((2..=8).contains(&marks.len()), "{seconds} {marks:?}");
            assert!(marks.iter().all(|(position, _)| (0.0..=100.0).contains(position)), "{marks:?}");
            assert!(marks[0].1.starts_with(first), "{seconds} {marks:?}");
        }
    }

    #[test]
    fn a_large_history_has_all_its_events_and_not_too_many_rows() {
        let events: Vec<_> = (0..2000)
            .map(|number| {
                let time = format!("2026-11-27T{:02}:{:02}:00Z", number / 100, number % 60);
                event(&time, KINDS[number % 5], &format!("b/state-{}", number % 100), Some("2026-11-26T09:00:00Z"))
            })
            .collect();
        let html = page(&events);
        assert_eq!(html.matches("<tr><td>").count(), 2000);
        assert_eq!(html.matches("class=\"row\"").count(), MAX_ROWS);
        assert!(html.contains("60 more states"), "rows");
    }
}
