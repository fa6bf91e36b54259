"""Makes one CycloneDX document out of cargo-cyclonedx's, one for each target: package/sbom.py TARGET FILE [TARGET FILE]"""

import json
import pathlib
import re
import sys
import urllib.parse

HERE = pathlib.Path(__file__).resolve().parent


def built_with(target):
    path = HERE.parent / "target/package" / target / "built-with"
    return dict(line.split("=", 1) for line in path.read_text().splitlines())


def beside_cargo(target):
    """What is linked statically and comes from no crate."""
    with_what = built_with(target)
    rust = re.match(r"rustc (\S+)", with_what["rustc"])[1]
    linked = [("rust-std", rust, "MIT OR Apache-2.0", f"pkg:generic/rust-std@{rust}")]
    # A program for macOS uses the system's C library.
    if with_what["libc"] != "none":
        libc, libc_version = with_what["libc"].split()
        # A revision at its end tells a Debian package, with Debian's own corrections.
        is_debians = "-" in libc_version
        purl = f"pkg:deb/debian/{libc}@{urllib.parse.quote(libc_version)}?arch=source" if is_debians else None
        linked.insert(0, ("glibc", libc_version, "LGPL-2.1-or-later", purl))
    for name, version, licence, identity in linked:
        component = {
            "type": "library", "bom-ref": f"{name}@{version}", "name": name, "version": version, "scope": "required",
            "licenses": [{"expression": licence}],
        }
        if identity:
            component["purl"] = identity
        yield component, target


def main():
    documents = {target: json.loads(pathlib.Path(path).read_text()) for target, path in zip(sys.argv[1::2], sys.argv[2::2])}
    whole = next(iter(documents.values()))
    # Its reference is a path of this machine, and is not told to anybody.
    own = whole["metadata"]["component"]["bom-ref"]
    version = whole["metadata"]["component"]["version"]
    name = f"pkg:cargo/tf@{version}"

    components, edges, targets = {}, {}, {}
    for target, document in documents.items():
        for component in document["components"]:
            components[component["bom-ref"]] = component
        for edge in document["dependencies"]:
            reference = name if edge["ref"] == own else edge["ref"]
            edges.setdefault(reference, set()).update(edge.get("dependsOn", []))
        for component, of in beside_cargo(target):
            reference = component["bom-ref"]
            components[reference] = component
            edges.setdefault(reference, set())
            edges[name].add(reference)
            targets.setdefault(reference, []).append(of)
    for reference, which in targets.items():
        components[reference]["properties"] = [{"name": "cdx:rustc:sbom:target:triple", "value": target} for target in which]

    metadata = whole["metadata"]
    component = metadata["component"]
    component.update({"bom-ref": name, "purl": name})
    component.pop("components", None)
    metadata["properties"] = [{"name": "cdx:rustc:sbom:target:triple", "value": target} for target in documents]
    whole["components"] = [components[reference] for reference in sorted(components)]
    whole["dependencies"] = [{"ref": reference, "dependsOn": sorted(edges[reference])} for reference in sorted(edges)]
    # A number by chance would make each build another one; without it the document is as valid.
    whole.pop("serialNumber", None)
    json.dump(whole, sys.stdout, indent=2, ensure_ascii=False)
    print()


main()
