//! What the numbers mean by which the kernel describes a process and a descriptor (sys/proc.h, sys/proc_info.h).

/// Returns the letter for the state of a process, as ps(1) prints it: `p_stat` (SIDL to SZOMB, sys/proc.h). `?` for any
/// other number.
pub(crate) fn state(status: u32) -> char {
    match status {
        1 => 'I',
        2 => 'R',
        3 => 'S',
        4 => 'T',
        5 => 'Z',
        _ => '?',
    }
}

/// Returns the start of a process in microseconds since 1970, from a `timeval`. 0 if it is out of range.
pub(crate) fn start(seconds: u64, microseconds: u64) -> u64 {
    seconds.checked_mul(1_000_000).and_then(|start| start.checked_add(microseconds)).unwrap_or(0)
}

/// Returns the time in a `timeval`: seconds in 64 bits, and microseconds in 32. 0 if there are too few bytes. A
/// `kinfo_proc` begins with the `timeval` `p_starttime` (struct extern_proc, sys/proc.h), and `kern.boottime` is one.
pub(crate) fn time_in_timeval(bytes: &[u8]) -> u64 {
    let Some((seconds, rest)) = bytes.split_first_chunk() else { return 0 };
    let Some((microseconds, _)) = rest.split_first_chunk() else { return 0 };
    start(u64::from_ne_bytes(*seconds), u64::from(u32::from_ne_bytes(*microseconds)))
}

/// The size of a `vnode_fdinfo` (sys/proc_info.h): a `proc_fileinfo` of 24 bytes, and a `vnode_info` of 152.
pub(crate) const VNODE_FDINFO_BYTES: usize = 24 + 152;

/// Returns the device and the inode number in a `vnode_fdinfo`: `vst_dev` and `vst_ino` of the `vinfo_stat` with which
/// its `vnode_info` begins. The device has the form that stat(2) returns, whose type is signed.
pub(crate) fn file_in_vnode_fdinfo(bytes: &[u8; VNODE_FDINFO_BYTES]) -> (u64, u64) {
    let status = &bytes[24..];
    let device = status.first_chunk().map_or(0, |device| i32::from_ne_bytes(*device));
    let inode = status[8..].first_chunk().map_or(0, |inode| u64::from_ne_bytes(*inode));
    (i64::from(device).cast_unsigned(), inode)
}

#[cfg(test)]
mod tests {
    use std::mem::{offset_of, size_of};

    use super::*;

    /// The structures as the headers declare them, in Rust.
    mod headers {
        #[repr(C)]
        pub(super) struct ProcFileinfo {
            openflags: u32,
            status: u32,
            offset: i64,
            kind: i32,
            guardflags: u32,
        }

        #[repr(C)]
        pub(crate) struct VinfoStat {
            pub(crate) dev: u32,
            mode: u16,
            nlink: u16,
            pub(crate) ino: u64,
            uid: u32,
            gid: u32,
            times: [i64; 8],
            size: i64,
            blocks: i64,
            blksize: i32,
            flags: u32,
            gen_: u32,
            rdev: u32,
            qspare: [i64; 2],
        }

        #[repr(C)]
        pub(crate) struct VnodeInfo {
            pub(crate) stat: VinfoStat,
            kind: i32,
            pad: i32,
            fsid: [i32; 2],
        }

        #[repr(C)]
        pub(crate) struct VnodeFdinfo {
            pub(crate) pfi: ProcFileinfo,
            pub(crate) pvi: VnodeInfo,
        }
    }

    #[test]
    fn the_file_of_a_descriptor_is_where_the_headers_say() {
        use headers::{VinfoStat, VnodeFdinfo, VnodeInfo};
        assert_eq!(size_of::<VnodeFdinfo>(), VNODE_FDINFO_BYTES);
        let status = offset_of!(VnodeFdinfo, pvi) + offset_of!(VnodeInfo, stat);
        let (device, inode) = (status + offset_of!(VinfoStat, dev), status + offset_of!(VinfoStat, ino));
        for (number, expected) in [(0x0100_0004u32, 0x0100_0004), (0x8000_0001, 0xffff_ffff_8000_0001)] {
            let mut bytes = [0xee; VNODE_FDINFO_BYTES];
            bytes[device..][..4].copy_from_slice(&number.to_ne_bytes());
            bytes[inode..][..8].copy_from_slice(&u64::MAX.to_ne_bytes());
            assert_eq!(file_in_vnode_fdinfo(&bytes), (expected, u64::MAX));
        }
    }

    #[test]
    fn a_start_is_one_number_in_microseconds() {
        assert_eq!(start(1_700_000_000, 999_999), 1_700_000_000_999_999);
        assert_eq!(start(u64::MAX, 0), 0);
        let mut bytes = 1_700_000_000i64.to_ne_bytes().to_vec();
        bytes.extend(7i32.to_ne_bytes());
        bytes.extend([0xee; 632]);
        assert_eq!(time_in_timeval(&bytes), 1_700_000_000_000_007);
        assert_eq!(time_in_timeval(&bytes[..11]), 0);
    }

    #[test]
    fn a_stopped_and_a_dead_process_have_the_letters_of_ps() {
        assert_eq!([0, 1, 2, 3, 4, 5, 6].map(state), ['?', 'I', 'R', 'S', 'T', 'Z', '?']);
    }
}
