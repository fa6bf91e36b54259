"""Builds our Dockerfile with Docker and with buildah, and from each a second image with terraform and a shell. Docker also
builds an image for the jobs of GitHub's recipe."""

import json
import os
import re
import shutil
import subprocess

from machine import ENGINES, ROOT

# The compiler of the build stage needs an image and crates from the network. The binary is compiled before, by
# package/build, and this takes that script's place in the build stage. The rest of the Dockerfile is as it is.
STAND_IN = """#!/bin/sh
target=$(rustc -vV | sed -n 's/^host: //p')
mkdir -p "target/package/$target" && cp package/ready "target/package/$target/tf"
"""

# Our action fetches a release with curl, which is not in base.tar. The URL is that of a file.
CURL = """#!/bin/sh
for word; do
  case $word in file://*) source=${word#file://} ;; esac
  target=$word
done
exec cp "$source" "$target"
"""


def lay_out(machine, tf, terraform):
    """Writes the directories that are built: of the stand-in for the image with the compiler, of our Dockerfile, of the
    image with terraform, and of the image for GitHub's recipe. Returns the name of the image with the compiler."""
    context = machine.share / "context"
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
    for name in names.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (context / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, context / name)
    (context / "package/build").write_text(STAND_IN)
    shutil.copy2(tf, context / "package/ready")

    compiler = machine.share / "compiler"
    compiler.mkdir()
    (compiler / "rustc").write_text(f"#!/bin/sh\necho host: {os.uname().machine}-unknown-linux-gnu\n")
    (compiler / "rustc").chmod(0o755)
    (compiler / "Dockerfile").write_text("FROM debian:base\nCOPY rustc /usr/local/bin/rustc\n")

    with_terraform = machine.share / "with-terraform"
    with_terraform.mkdir()
    shutil.copy2(terraform, with_terraform / "terraform")
    # Terraform needs a shell for its provisioner.
    shutil.copy2(ENGINES / "root/usr/bin/busybox", with_terraform / "sh")
    (with_terraform / "Dockerfile").write_text("FROM tf\nCOPY terraform /usr/bin/terraform\nCOPY sh /bin/sh\n")

    runner = machine.share / "runner"
    runner.mkdir()
    shutil.copy2(terraform, runner / "terraform")
    (runner / "curl").write_text(CURL)
    (runner / "curl").chmod(0o755)
    (runner / "Dockerfile").write_text("FROM debian:base\nCOPY terraform curl /usr/local/bin/\n")
    return re.search(r"^FROM (\S+) AS build$", (ROOT / "Dockerfile").read_text(), re.M)[1]


def stages(compiler):
    """What is built, in this order: (tag, directory)."""
    return [(compiler, "/share/compiler"), ("tf", "/share/context"), ("tf-with-terraform", "/share/with-terraform")]


def with_docker(machine, compiler):
    with open(ENGINES / "base.tar", "rb") as base:
        machine.run("docker", "import", "-", "debian:base", stdin=base)
    for tag, directory in [*stages(compiler), ("runner", "/share/runner")]:
        machine.run("docker", "build", "--network", "none", "--ulimit", f"nofile={machine.files}:{machine.files}",
                    "--tag", tag, directory, timeout=600)


def with_buildah(machine, compiler):
    with open(ENGINES / "base.tar", "rb") as base:
        machine.run("podman", "import", "-", "localhost/debian:base", stdin=base)
    for tag, directory in stages(compiler):
        machine.run("buildah", "build", "--pull=never", "--network", "none", "--cgroup-parent", f"/{machine.group}/buildah",
                    "--ulimit", f"nofile={machine.files}:{machine.files}",
                    "--ulimit", f"nproc={machine.processes}:{machine.processes}",
                    "--tag", f"localhost/{tag}", directory, timeout=600)


def settings(machine, program, image):
    """What an image says: (user, entrypoint, environment, working directory)."""
    config = json.loads(machine.output(program, "image", "inspect", image))[0]["Config"]
    return config["User"], config["Entrypoint"], sorted(config["Env"]), config["WorkingDir"]


def files(machine, program, image):
    """Every file of an image below its own directories, with its owner and mode: the engines add a few to a container."""
    name = machine.output(program, "create", image)
    # The shell of the machine, because the archive is not text.
    script = f'{program} export {name} | tar --list --verbose --numeric-owner --file -; {program} rm {name} >/dev/null'
    found = set()
    for line in machine.output("sh", "-c", script).splitlines():
        mode, owner, _, _, _, path = line.split(None, 5)
        path = path.strip("/")
        if path.split("/")[0] in ("usr", "home", "work", "tmp") or path.startswith(("etc/ssl", "etc/passwd", "etc/group")):
            found.add((mode, owner, path.split(" -> ")[0]))
    return found
