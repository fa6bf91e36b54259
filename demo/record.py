"""Records docs/rescue.svg: a person at a terminal, real terraform, and a lock that stays, and then one that does not.

Everything on it was said by the programs that are seen there. Only the waiting is shortened.
"""

import fcntl
import json
import os
import pathlib
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
from cloud import HERE, WAITS, Cloud, Work, provisioner

COLUMNS, ROWS = 100, 30
PROMPT = "\x1b[32m~/infra\x1b[0m $ "


class Terminal:
    def __init__(self, command, directory, environment):
        self.pid, self.master = pty.fork()
        if self.pid == 0:
            os.chdir(directory)
            os.execvpe(command[0], command, environment)
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        self.begun = time.monotonic()
        self.events = []
        self.seen = ""

    def read(self, seconds):
        """Takes what is written within that time."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if not select.select([self.master], [], [], left)[0]:
                return
            try:
                text = os.read(self.master, 65536).decode(errors="replace")
            except OSError:
                return
            self.events.append((time.monotonic() - self.begun, text))
            self.seen += text

    def wait_for(self, pattern):
        """Until something new on the screen looks so."""
        for _ in range(600):
            if (found := re.search(pattern, self.seen)):
                self.seen = self.seen[found.end():]
                return
            self.read(0.05)
        sys.exit(f"waited in vain for {pattern}; last seen:\n{self.seen}")

    def type(self, line):
        for character in line:
            os.write(self.master, character.encode())
            self.read(0.035)
        self.read(0.3)
        self.seen = ""
        os.write(self.master, b"\r")


def killed_apply(terminal, work):
    work.forget("began", "go")
    terminal.type("terraform apply -auto-approve")
    for _ in range(600):
        if (work.directory / "began").exists():
            break
        terminal.read(0.05)
    else:
        sys.exit(f"the provisioner did not begin; last seen:\n{terminal.seen}")
    terminal.read(1.2)
    os.kill(work.terraform(), signal.SIGKILL)
    terminal.wait_for(r"infra\S* \$ ")
    (work.directory / "go").touch()
    terminal.read(2)


def main():
    cast, picture = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
    cloud = Cloud()
    work = Work(cloud, provisioner("./roll-out"), programs=[("tf", HERE / "target/debug/tf")])
    roll_out = work.directory / "roll-out"
    roll_out.write_text(f"#!/bin/sh\n{WAITS}\n")
    roll_out.chmod(0o755)
    try:
        environment = dict(work.environment, TERM="xterm-256color", PS1=PROMPT, LANG="C.UTF-8")
        terminal = Terminal(["bash", "--norc", "--noprofile", "-i"], work.directory, environment)
        terminal.wait_for(r"\$ ")
        terminal.type("# bare terraform; the kernel is about to kill it, out of memory")
        terminal.wait_for(r"\$ ")
        killed_apply(terminal, work)
        terminal.type("terraform plan")
        terminal.wait_for(r"Error acquiring the state lock")
        terminal.wait_for(r"infra\S* \$ ")
        if not list(cloud.locks()):
            sys.exit("bare terraform left no lock: nothing to show")
        terminal.read(3)
        cloud.unlock()
        terminal.type("clear")
        terminal.wait_for(r"\$ ")
        terminal.type("# the same with tf")
        terminal.wait_for(r"\$ ")
        terminal.type('eval "$(tf locks shell-init bash)"')
        terminal.wait_for(r"infra\S* \$ ")
        killed_apply(terminal, work)
        if list(cloud.locks()):
            sys.exit("the lock was left")
        terminal.type("terraform plan | grep Plan:")
        terminal.wait_for(r"1 to add, 0 to change")
        terminal.read(3)
        os.write(terminal.master, b"\x04")
    finally:
        work.remove()
        cloud.stop()
    header = {"version": 2, "width": COLUMNS, "height": ROWS}
    lines = [json.dumps(header)] + [json.dumps([round(at, 3), "o", text]) for at, text in terminal.events]
    cast.write_text("\n".join(lines) + "\n")
    renderer = HERE / "target/tools/record/bin/termtosvg"
    subprocess.run([renderer, "render", cast, picture, "-M", "2500", "-D", "4000", "-t", "window_frame"], check=True)


main()
