//! Reads a value whose size the kernel says only on request, and which may grow meanwhile.

use nix::errno::Errno;

/// How often a read is repeated because the value has grown since its size was asked for.
const ATTEMPTS: usize = 3;

/// How much a value may grow between the question for its size and the read.
const SPARE_BYTES: usize = 4096;

/// Asks `call` for the size of a value, by `None`, and then for the value. `call` returns a size in bytes: the one that
/// the value has, or the one that it has written. `None` if a call fails, or if the value grows at every attempt.
///
/// The buffer is larger than the size of the value, and a full one counts as too small: of the arguments of a process,
/// the kernel returns only the end if they have grown (`sysctl_procargsx`, bsd/kern/kern_sysctl.c of xnu). `max` is the
/// largest buffer in bytes that the call accepts. The value always fits into that one.
pub(crate) fn read(max: usize, mut call: impl FnMut(Option<&mut [u8]>) -> nix::Result<usize>) -> Option<Vec<u8>> {
    for _ in 0..ATTEMPTS {
        let mut value = vec![0; call(None).ok()?.saturating_add(SPARE_BYTES).min(max)];
        match call(Some(&mut value)) {
            Ok(size) if size < value.len() || size == max => {
                value.truncate(size);
                return Some(value);
            }
            Ok(_) | Err(Errno::ENOMEM) => {}
            Err(_) => return None,
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX: usize = 10_000;

    /// Reads a value from a kernel that accepts at most [`MAX`] bytes. The value has one more of `sizes` at each call,
    /// and the last one from then on. If the buffer is too small, the kernel fails with `too_small`, or fills the
    /// buffer if that is `None`.
    fn read_from(sizes: &[usize], too_small: Option<Errno>) -> Option<Vec<u8>> {
        let mut sizes = sizes.iter().copied();
        let mut size = 0;
        read(MAX, |buffer| {
            size = sizes.next().unwrap_or(size);
            match buffer {
                None => Ok(size),
                Some(buffer) if buffer.len() > MAX => Err(Errno::EINVAL),
                Some(buffer) if buffer.len() < size && too_small.is_some() => Err(too_small.unwrap()),
                Some(buffer) => {
                    let written = size.min(buffer.len());
                    buffer[..written].fill(1);
                    Ok(written)
                }
            }
        })
    }

    #[test]
    fn a_value_of_any_size_is_read_whole() {
        for size in [0, 1, MAX - SPARE_BYTES - 1, MAX - SPARE_BYTES, MAX - SPARE_BYTES + 1, MAX - 1, MAX] {
            assert_eq!(read_from(&[size], None), Some(vec![1; size]), "{size}");
        }
    }

    #[test]
    fn a_value_that_has_grown_is_read_again() {
        for too_small in [None, Some(Errno::ENOMEM)] {
            assert_eq!(read_from(&[1, SPARE_BYTES + 2], too_small), Some(vec![1; SPARE_BYTES + 2]), "{too_small:?}");
            // A full buffer may hold a part of the value.
            assert_eq!(read_from(&[1, SPARE_BYTES + 1], too_small), Some(vec![1; SPARE_BYTES + 1]), "{too_small:?}");
        }
    }

    #[test]
    fn a_value_that_cannot_be_read_is_none() {
        assert_eq!(read(MAX, |_| Err(Errno::ESRCH)), None);
        assert_eq!(read(MAX, |buffer| buffer.map_or(Ok(1), |_| Err(Errno::EINVAL))), None);
        assert_eq!(read(MAX, |buffer| buffer.map_or(Ok(1), |_| Err(Errno::ENOMEM))), None);
        assert_eq!(read(MAX, |buffer| Ok(buffer.map_or(1, |buffer| buffer.len()))), None);
    }
}
