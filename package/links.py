"""Checks that each link of each Markdown file in a directory leads to something in it: package/links.py DIR"""

import os
import pathlib
import re
import sys

top = pathlib.Path(sys.argv[1]).resolve()
documents = sorted(top.rglob("*.md"))
broken, links = [], 0
for document in documents:
    # A target with a scheme is on the network, and one that begins with # is in this file.
    for target in re.findall(r"\]\(([^)#][^)]*)\)", document.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        links += 1
        # Not resolved, because a symbolic link may lead to another directory of a package.
        place = pathlib.Path(os.path.normpath(document.parent / target.split("#")[0]))
        if not place.exists() or not place.is_relative_to(top):
            broken.append(f"{document.relative_to(top)}: {target}")
if broken or not links:
    sys.exit("\n".join(["these links lead to nothing that is here:", *broken]))
print(f"{links} links in {len(documents)} documents lead to what is here")
