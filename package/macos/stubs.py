"""Writes what the linker needs to know of macOS's libraries: package/macos/stubs.py SDK ZIG_LIB

A text-based stub (.tbd) lists the symbols of a library. Zig has the one of libSystem. Apple's frameworks that tf links
are declared by Rust crates, so their stubs list the symbols that those crates declare.
"""

import json
import pathlib
import re
import shutil
import subprocess
import sys

# The framework, the crate that declares it, and a version that Apple's linker stubs had for macOS 11.
FRAMEWORKS = (("Security", "security-framework-sys", "59754.40.29"), ("CoreFoundation", "core-foundation-sys", "1770.255"))

STUB = """--- !tapi-tbd
tbd-version:     4
targets:         [ x86_64-macos, arm64-macos ]
install-name:    '{install_name}'
current-version: {version}
exports:
  - targets:         [ x86_64-macos, arm64-macos ]
    symbols:         [ {symbols} ]
...
"""


def stub(path, install_name, version, names):
    path.parent.mkdir(parents=True, exist_ok=True)
    symbols = ", ".join("_" + name for name in sorted(names))
    path.write_text(STUB.format(install_name=install_name, version=version, symbols=symbols))


def sources():
    command = ["cargo", "metadata", "--locked", "--format-version", "1", "--filter-platform", "aarch64-apple-darwin"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {package["name"]: pathlib.Path(package["manifest_path"]).parent for package in json.loads(output)["packages"]}


def declared(crate):
    """The names of all functions and statics in the crate's `extern` blocks."""
    names = set()
    for path in crate.rglob("src/**/*.rs"):
        text = path.read_text()
        for start in re.finditer(r'extern\s+"C(?:-unwind)?"\s*\{', text):
            depth, end = 1, start.end()
            while depth:
                depth += {"{": 1, "}": -1}.get(text[end], 0)
                end += 1
            names.update(re.findall(r"\bpub\s+(?:(?:safe|unsafe)\s+)?(?:fn|static(?:\s+mut)?)\s+(\w+)", text[start.end():end]))
    return names


def main():
    sdk, zig = map(pathlib.Path, sys.argv[1:3])
    crates = sources()
    for name, crate, version in FRAMEWORKS:
        install_name = f"/System/Library/Frameworks/{name}.framework/Versions/A/{name}"
        names = declared(crates[crate])
        if not names:
            sys.exit(f"no symbol of {name} is known: {crate} has no extern block")
        stub(sdk / f"System/Library/Frameworks/{name}.framework/{name}.tbd", install_name, version, names)
    # The crate libc names this library for every program, so the linker looks for it.
    stub(sdk / "usr/lib/libiconv.tbd", "/usr/lib/libiconv.2.dylib", "7", {"iconv", "iconv_open", "iconv_close"})
    # libc and libm are parts of libSystem.
    for name in ("System", "c", "m"):
        shutil.copy(zig / "libc/darwin/libSystem.tbd", sdk / f"usr/lib/lib{name}.tbd")


main()
