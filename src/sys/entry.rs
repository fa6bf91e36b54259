//! The state that this process inherited at its start, before Rust's runtime or `tf` changed it.
//!
//! Terraform must inherit the same state: the signal mask, the ignored signals and the open descriptors. Two parts of
//! this state have changed before `main` runs: Rust's runtime ignores SIGPIPE, and it opens `/dev/null` where
//! descriptor 0, 1 or 2 is closed. So a function in `.init_array` (System V ABI; on macOS `__mod_init_func`, type
//! `S_MOD_INIT_FUNC_POINTERS`, mach-o/loader.h) records both parts. The loader calls that function before the runtime
//! starts.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

static SIGPIPE_IGNORED: AtomicBool = AtomicBool::new(false);
static CLOSED_STANDARD_DESCRIPTORS: AtomicU8 = AtomicU8::new(0);

extern "C" fn look() {
    let mut action = std::mem::MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: `sigaction` with a null new action only writes the current action into `action`, which is large enough.
    let ignored = unsafe {
        libc::sigaction(libc::SIGPIPE, std::ptr::null(), action.as_mut_ptr()) == 0
            && action.assume_init().sa_sigaction == libc::SIG_IGN
    };
    SIGPIPE_IGNORED.store(ignored, Ordering::Relaxed);
    let mut closed = 0;
    for descriptor in 0..3 {
        // SAFETY: F_GETFD only reads a flag of the descriptor. If the descriptor is not open, the call fails.
        if unsafe { libc::fcntl(descriptor, libc::F_GETFD) } == -1 {
            closed |= 1 << descriptor;
        }
    }
    CLOSED_STANDARD_DESCRIPTORS.store(closed, Ordering::Relaxed);
}

#[used]
#[cfg_attr(target_os = "macos", unsafe(link_section = "__DATA,__mod_init_func"))]
#[cfg_attr(not(target_os = "macos"), unsafe(link_section = ".init_array"))]
static LOOK: extern "C" fn() = look;

/// Returns whether SIGPIPE was ignored at the start of this process (for example by `trap '' PIPE` in a shell, or by
/// Python's `subprocess`).
#[must_use]
pub(crate) fn sigpipe_ignored() -> bool {
    SIGPIPE_IGNORED.load(Ordering::Relaxed)
}

/// Returns which of the descriptors 0, 1 and 2 were closed when this process started.
pub(crate) fn closed_standard_descriptors() -> impl Iterator<Item = i32> {
    let closed = CLOSED_STANDARD_DESCRIPTORS.load(Ordering::Relaxed);
    (0..3).filter(move |descriptor| closed & (1 << descriptor) != 0)
}
