//! Random numbers that need not be secret: names that nobody else has, and delays that differ between the runs of a
//! fleet.

use std::hash::{BuildHasher, Hasher, RandomState};

/// Returns a random number. The standard library asks the kernel for random keys once in each thread, and changes them
/// for each `RandomState`. So a process and its fork get the same numbers: numbers that must differ between the two
/// need the pid too, or an exec in between.
pub(crate) fn number() -> u64 {
    RandomState::new().build_hasher().finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_differ() {
        let mut numbers: Vec<u64> = (0..1000).map(|_| number()).collect();
        numbers.sort_unstable();
        numbers.dedup();
        assert_eq!(numbers.len(), 1000);
    }
}
