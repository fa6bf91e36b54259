"""Checks a universal program for macOS with macholib: package/macos/check.py PROGRAM

It has one slice for Apple silicon and one for Intel. Each needs macOS 11.0 and only libraries of the system, and has an
ad hoc signature whose hashes are those of its pages. Apple silicon kills a program without a signature.
"""

import hashlib
import struct
import sys

import macholib.mach_o as mach_o
from macholib.MachO import MachO

LIBRARIES = {
    "/usr/lib/libSystem.B.dylib",
    "/usr/lib/libiconv.2.dylib",
    "/System/Library/Frameworks/CoreFoundation.framework/Versions/A/CoreFoundation",
    "/System/Library/Frameworks/Security.framework/Versions/A/Security",
}
LOADS = {mach_o.LC_LOAD_DYLIB, mach_o.LC_LOAD_WEAK_DYLIB, mach_o.LC_REEXPORT_DYLIB, mach_o.LC_LAZY_LOAD_DYLIB,
         mach_o.LC_LOAD_UPWARD_DYLIB}
ARM64, X86_64 = 0x0100000C, 0x01000007
# The magic numbers and types of a signature (sys/codesign.h, kern/cs_blobs.h). All its numbers are big-endian.
SUPER_BLOB, CODE_DIRECTORY, DIRECTORY_SLOT, SHA256, AD_HOC = 0xFADE0CC0, 0xFADE0C02, 0, 2, 0x2


def check(condition, text):
    if not condition:
        sys.exit(f"{sys.argv[1]}: {text}")


def signature_of(slice_bytes, start, size):
    """Returns the number of pages whose hash was compared."""
    blob = slice_bytes[start:start + size]
    magic, _, count = struct.unpack_from(">III", blob)
    check(magic == SUPER_BLOB, "the signature has another magic number")
    index = dict(struct.unpack_from(">II", blob, 12 + 8 * place) for place in range(count))
    check(DIRECTORY_SLOT in index, "the signature has no code directory")
    directory = blob[index[DIRECTORY_SLOT]:]
    (magic, _, _, flags, hashes, _, _, slots, limit, hash_size, hash_type, _, page_bits) = struct.unpack_from(">9I4B", directory)
    check(magic == CODE_DIRECTORY and hash_type == SHA256 and hash_size == 32, "the code directory is of another kind")
    check(flags & AD_HOC, "the signature is not ad hoc")
    check(limit == start, "the signature does not cover the whole program")
    page = 1 << page_bits
    check(slots == -(-limit // page), "a page has no hash")
    for place in range(slots):
        wanted = directory[hashes + 32 * place:][:32]
        found = hashlib.sha256(slice_bytes[place * page:min((place + 1) * page, limit)]).digest()
        check(found == wanted, f"the hash of page {place} is wrong")
    return slots


def main():
    path = sys.argv[1]
    with open(path, "rb") as file:
        whole = file.read()
    program = MachO(path)
    seen = {}
    for header in program.headers:
        cpu = header.header.cputype
        seen[cpu] = header
        libraries, minimum, pages = set(), None, 0
        slice_bytes = whole[header.offset:header.offset + header.size]
        for command, data, extra in header.commands:
            if command.cmd in LOADS:
                libraries.add(extra.rstrip(b"\0").decode())
            elif command.cmd == mach_o.LC_BUILD_VERSION:
                check(data.platform == 1, "it is not for macOS")
                minimum = data.minos
            elif command.cmd == mach_o.LC_VERSION_MIN_MACOSX:
                minimum = data.version
            elif command.cmd == mach_o.LC_CODE_SIGNATURE:
                pages = signature_of(slice_bytes, data.dataoff, data.datasize)
            check(command.cmd != mach_o.LC_RPATH, "it looks for libraries in a path of its own")
        name = mach_o.CPU_TYPE_NAMES.get(cpu, cpu)
        check(header.header.filetype == mach_o.MH_EXECUTE, f"{name} is not a program")
        check(header.header.flags & 0x200000, f"{name} is not position-independent (MH_PIE)")
        check(libraries <= LIBRARIES, f"{name} needs {sorted(libraries - LIBRARIES)}")
        check("/usr/lib/libSystem.B.dylib" in libraries, f"{name} does not use libSystem")
        check(minimum is not None and int(minimum) == 11 << 16, f"{name} is for another version than 11.0: {minimum}")
        check(pages > 0, f"{name} is not signed")
        print(f"{name}: macOS 11.0, {len(libraries)} libraries of the system, {pages} signed pages")
    check(sorted(seen) == [X86_64, ARM64], f"it is for {sorted(seen)}")


main()
