"""Runs a command as a container engine would: package/contain.py CONFIG.json

As process 1 of namespaces of its own (user, process, mount, host name), as the image's user, without a capability, on a root
that is read-only. The network is this machine's. CONFIG.json has root, mounts ([source, target, read-only]), env, workdir,
user, command, and the name of a file into which the number of process 1, as it is outside, is written. It ends as an engine
does: with the command's exit code, or with 128 and the signal.
"""

import ctypes
import json
import os
import pathlib
import signal
import sys

LIBC = ctypes.CDLL(None, use_errno=True)
NEWNS, NEWUTS, NEWUSER, NEWPID = 0x20000, 0x4000000, 0x10000000, 0x20000000
RDONLY, NOSUID, NODEV, NOEXEC, REMOUNT, BIND, REC, PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
DETACH = 2
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}[os.uname().machine]


def call(name, *arguments):
    arguments = [os.fsencode(argument) if isinstance(argument, (str, pathlib.Path)) else argument for argument in arguments]
    if getattr(LIBC, name)(*arguments) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}{tuple(arguments)}: {os.strerror(error)}")


def mount(source, target, kind=None, flags=0, data=None):
    call("mount", source, target, kind, ctypes.c_ulong(flags), data)


def bind(source, target, read_only):
    mount(source, target, flags=BIND | REC)
    if read_only:
        mount(None, target, flags=BIND | REMOUNT | RDONLY | NOSUID)


def numbers_of_all_users():
    """A new user namespace knows nobody. Only somebody outside can tell it more than one number."""
    inside, outside = os.pipe(), os.pipe()
    own = os.getpid()
    helper = os.fork()
    if helper == 0:
        os.read(inside[0], 1)
        for kind in ("uid", "gid"):
            pathlib.Path(f"/proc/{own}/{kind}_map").write_text("0 0 100000\n")
        os.write(outside[1], b".")
        os._exit(0)
    call("unshare", NEWUSER | NEWNS | NEWPID | NEWUTS)
    os.write(inside[1], b".")
    os.read(outside[0], 1)
    os.waitpid(helper, 0)
    for end in (*inside, *outside):
        os.close(end)


def become_process_1(config):
    root = pathlib.Path(config["root"])
    mount("none", "/", flags=REC | PRIVATE)
    mount(root, root, flags=BIND | REC)
    mount("proc", root / "proc", "proc", NOSUID | NODEV | NOEXEC)
    mount("tmpfs", root / "dev", "tmpfs", NOSUID, "mode=755")
    for name in ("null", "zero", "full", "random", "urandom", "tty"):
        (root / "dev" / name).touch()
        mount(f"/dev/{name}", root / "dev" / name, flags=BIND)
    for source, target, read_only in config["mounts"]:
        target = root / target.lstrip("/")
        if source == "tmpfs":
            mount("tmpfs", target, "tmpfs", NOSUID | NODEV, "mode=1777")
        else:
            bind(source, target, read_only)
    mount(None, root, flags=BIND | REMOUNT | RDONLY)
    os.chdir(root)
    call("syscall", PIVOT_ROOT, ".", ".")
    call("umount2", ".", DETACH)
    call("sethostname", "tf-pod", 6)
    os.chdir(config["workdir"])
    os.setgroups([])
    user, group = config["user"]
    os.setresgid(group, group, group)
    os.setresuid(user, user, user)
    call("prctl", 38, 1, 0, 0, 0)  # no_new_privs
    os.setsid()
    # Python ignores these two, and what is ignored stays so.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    os.execve(config["command"][0], config["command"], config["env"])


def main():
    config = json.loads(pathlib.Path(sys.argv[1]).read_text())
    # An engine makes the places that something is mounted on.
    for target in ["/proc", "/dev", *(target for _, target, _ in config["mounts"])]:
        path = pathlib.Path(config["root"]) / target.lstrip("/")
        source = next((source for source, other, _ in config["mounts"] if other == target), "tmpfs")
        if source == "tmpfs" or os.path.isdir(source):
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    numbers_of_all_users()
    init = os.fork()
    if init == 0:
        try:
            become_process_1(config)
        except OSError as error:
            print(f"contain: {error}", file=sys.stderr, flush=True)
            os._exit(125)
    pathlib.Path(config["pid_file"]).write_text(str(init))
    status = os.waitstatus_to_exitcode(os.waitpid(init, 0)[1])
    sys.exit(status if status >= 0 else 128 - status)


main()
