"""Writes THIRD-PARTY-LICENSES: package/third-party.py TARGET

Every crate whose code is in the binary, with the texts of its licences as its author published them. Equal texts are printed
once. What runs in the compiler alone (macros, build scripts) is in no binary, and not here.
"""

import json
import pathlib
import re
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
TEXT = re.compile(r"(licen[cs]e|copying|copyright|notice|unlicense)", re.IGNORECASE)
RULE = "=" * 100

# For an author who names the licence and does not bring its text. Of those there are few, and all are MIT.
KNOWN = {
    "MIT": """The MIT License (MIT)

Copyright (c) {authors}

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated documentation
files (the "Software"), to deal in the Software without restriction, including without limitation the rights to use, copy,
modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit persons to whom the
Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE,
ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
""",
}

STANDARD_LIBRARY = """The binary holds the standard library of Rust: Copyright (c) The Rust Project Contributors, MIT OR Apache-2.0, and the
crates in it, each of which may be had under MIT or Apache-2.0 (compiler_builtins: Apache-2.0 WITH LLVM-exception besides).
Both texts are below.
"""

C_LIBRARY = """The binary is linked statically with the GNU C Library ({libc}), which is free software under the
GNU Lesser General Public License, version 2.1 or later. The text is below, and so are the notices of the parts of it that
have other authors. You may change that library and link tf with it again: all of the source of tf is published under MIT
or Apache-2.0, and package/build in it is the script that links. The source of the library in exactly this version is the
source package of that name of the Debian project. Start files and the unwinder are GCC's, whose Runtime Library Exception
lets them be passed on in a binary like this one without a condition.
"""


def crates(target):
    """(name, version) of each, without tf itself. Cargo's own answer, because features decide what is linked."""
    command = ["cargo", "tree", "--locked", "--edges", "normal,no-proc-macro", "--target", target, "--prefix", "none",
               "--no-dedupe", "--format", "{p}"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    found = {(name, version.removeprefix("v")) for name, version, *_ in (line.split() for line in lines if line)}
    return sorted(entry for entry in found if entry[0] != "tf")


def metadata(target):
    command = ["cargo", "metadata", "--locked", "--format-version", "1", "--filter-platform", target]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {(package["name"], package["version"]): package for package in json.loads(output)["packages"]}


def texts_of(package):
    """The texts that lie in a crate, by their paths in it; below vendored sources as well, where C code has its own."""
    top = pathlib.Path(package["manifest_path"]).parent
    paths = [path for path in top.rglob("*") if TEXT.match(path.name) and path.suffix not in (".rs", ".c", ".h", ".go")]
    if package["license_file"]:
        paths.append(top / package["license_file"])
    return [path.read_text("utf-8", "replace") for path in sorted(set(paths)) if path.is_file()]


class Texts:
    """Numbered in the order in which they are first needed, whoever needs them."""

    def __init__(self):
        self.numbers = {}
        self.printed = []

    def number(self, text):
        key = " ".join(text.split())
        if key not in self.numbers:
            self.printed.append("\n".join(line.rstrip() for line in text.strip().splitlines()))
            self.numbers[key] = len(self.printed)
        return self.numbers[key]


def built_with(target):
    path = HERE.parent / "target/package" / target / "built-with"
    return dict(line.split("=", 1) for line in path.read_text().splitlines())


def main():
    target = sys.argv[1]
    libc = built_with(target)["libc"]
    packages, texts, lines, without = metadata(target), Texts(), [], []
    for name, version in crates(target):
        package = packages[name, version]
        licence, found = package["license"] or package["license_file"], texts_of(package)
        if not found and licence in KNOWN:
            authors = ", ".join(re.sub(r"\s*<[^>]*>", "", author) for author in package["authors"]) or f"the authors of {name}"
            found = [KNOWN[licence].format(authors=authors)]
        if not found:
            without.append(f"{name} {version} ({licence})")
        numbers = ", ".join(str(number) for number in sorted({texts.number(text) for text in found}))
        lines.append(f"{name} {version}\n    {licence}; text {numbers}")
    if without:
        sys.exit("no text of a licence is known of: " + ", ".join(without))
    rust = [texts.number(KNOWN["MIT"].format(authors="The Rust Project Contributors")),
            texts.number((HERE.parent / "LICENSE-APACHE").read_text())]
    has_libc = libc != "none"
    glibc = [texts.number((HERE / "texts" / name).read_text()) for name in ("LGPL-2.1", "glibc") if has_libc]
    print(f"What tf for {target} is made of besides its own code, and under which licences. Each names its texts, which are\n"
          "numbered and follow.\n")
    print("\n".join(lines))
    print(f"\nThe standard library of Rust\n    MIT OR Apache-2.0; text {rust[0]}, {rust[1]}")
    if has_libc:
        print(f"The GNU C Library ({libc})\n    LGPL-2.1-or-later; text {glibc[0]}, {glibc[1]}\n")
    print(STANDARD_LIBRARY)
    if has_libc:
        print(C_LIBRARY.format(libc=libc))
    for number, text in enumerate(texts.printed, 1):
        print(f"{RULE}\nText {number}\n{RULE}\n\n{text}\n")


main()
