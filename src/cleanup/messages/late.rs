//! Messages about a lock request that may still arrive.

use jiff::Timestamp;

use super::names::lock;
use crate::journal::pending_requests::PENDING_WINDOW;
use crate::terraform::log::RecordedLock;

/// Returns how long a request may still land.
fn pending_time() -> String {
    format!("{} min", PENDING_WINDOW.as_secs() / 60)
}

/// Reports that a lock was requested and not found, and that the request may still land. `kept` is true if the next
/// `tf` looks for the lock.
pub(crate) fn may_still_come(ending: &str, recorded: &RecordedLock, kept: bool, unlock: &str) -> String {
    let then = if kept {
        format!("if the lock appears within {}, the next tf in this directory releases it", pending_time())
    } else {
        format!("if the lock appears later, type: {unlock} {}", recorded.id)
    };
    format!(
        "{ending} while it requested a state lock: {}\ntf did not find that lock; the lock may still appear\n{then}",
        lock(recorded)
    )
}

/// Reports that one part of a lock was released, and that the other part was never found. `kept` is true if the next
/// `tf` looks for the other part.
pub(crate) fn other_part_may_land(recorded: &RecordedLock, kept: bool, unlock: &str) -> String {
    let then = if kept {
        format!("if that part appears within {}, the next tf in this directory releases it", pending_time())
    } else {
        format!("if that part appears, type: {unlock} {}", recorded.id)
    };
    format!("the other part of this lock (its DynamoDB item or its S3 object) may still appear\n{then}")
}

/// Reports that a lock with an unknown ID was requested and not found. `kept` is true if the next `tf` looks for the
/// lock. `list` is the command that lists the locks.
pub(crate) fn unnamed_may_still_come(ending: &str, asked: Timestamp, kept: bool, list: &str) -> String {
    let then = if kept {
        let time = pending_time();
        &format!(
            "if the lock appears within {time}, the next tf in this directory finds it\nto look for it now, type: tf locks recover"
        )
    } else {
        &format!("to look for it later, type: {list}")
    };
    format!("{ending} while it requested a state lock (at {asked:.0}); the lock may still appear\n{then}")
}

/// Reports that the table or bucket of a lock that the run held does not exist. `kept` is true if the next `tf` looks
/// for the lock.
pub(crate) fn place_is_away(ending: &str, recorded: &RecordedLock, kept: bool) -> String {
    let then = if kept { "\nif the table or bucket exists again within 24 h, type: tf locks recover" } else { "" };
    format!(
        "{ending}; its state lock is gone, because the lock's table or bucket does not exist: {}{then}",
        lock(recorded)
    )
}

/// Reports that a lock that appeared after the cleanup, or that could not be found then, was released.
pub(crate) fn came_late(recorded: &RecordedLock) -> String {
    let how = if recorded.progress.held.is_some() {
        "a dead terraform left"
    } else {
        "appeared after its terraform had died"
    };
    format!("released a lock that {how}: {}", lock(recorded))
}

/// Reports that the lock because of which this run failed was released.
pub(crate) const TRY_AGAIN: &str = "terraform failed because of that lock; run the command again";
