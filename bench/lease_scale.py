"""Whether the renewals of many runs fit one lock table with little write capacity.

Each run has a real keeper (`tf locks keep-lease`), which is a process of its own, as in a real run. This script takes
the place of each run's `tf` and fuse: it confirms the deadlines, and notes whether one of them passes. All runs share
one process in the place of terraform. Requests go through a proxy that counts the write units as DynamoDB does, and
refuses a write for which there is no unit left (ProvisionedThroughputExceededException). Real DynamoDB also lets a
table use the units that it did not use in the last five minutes. This proxy keeps those of one second only.
"""

import argparse
import asyncio
import json
import math
import os
import pathlib
import selectors
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time

HERE = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE / "demo"))
from cloud import Cloud

# The messages of src/supervise/fuse.rs.
DEADLINES, ARMED = (1, 6), 4


def boot_clock():
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def start_of(pid):
    """When a process was started, in clock ticks since the boot (proc_pid_stat(5), field 22)."""
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rsplit(")", 1)[1].split()[19])


def size(value):
    """The bytes of an attribute's value, as DynamoDB counts them."""
    (kind, value), = value.items()
    if kind == "M":
        return 3 + sum(len(name.encode()) + size(member) + 1 for name, member in value.items())
    if kind == "N":
        return (len(value.lstrip("-")) + 1) // 2 + 1
    return len(value.encode()) if kind == "S" else 1


class Table:
    """A proxy in front of the cloud that allows `units` write units in each second."""

    def __init__(self, cloud, units):
        self.cloud, self.units, self.left, self.at = cloud, units, units, time.monotonic()
        self.written, self.refused, self.largest = [], 0, 0
        self.begun = time.monotonic()
        ready = threading.Event()
        threading.Thread(target=lambda: asyncio.run(self.serve(ready)), daemon=True).start()
        ready.wait()

    async def serve(self, ready):
        server = await asyncio.start_server(self.connection, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        ready.set()
        await server.serve_forever()

    def take(self, operation, body):
        """Whether there are enough units for a request. Takes them."""
        if operation not in ("PutItem", "UpdateItem", "DeleteItem"):
            return True
        item = json.loads(body).get("Item", {})
        length = sum(len(name.encode()) + size(value) for name, value in item.items())
        self.largest = max(self.largest, length)
        needed = max(1, math.ceil(length / 1024))
        now = time.monotonic()
        self.left, self.at = min(self.units, self.left + (now - self.at) * self.units), now
        if self.left < needed:
            self.refused += 1
            return False
        self.left -= needed
        self.written += [now - self.begun] * needed
        return True

    async def connection(self, reader, writer):
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                first, *lines = head.decode().split("\r\n")[:-2]
                headers = {name.lower(): value.strip() for name, value in (line.split(":", 1) for line in lines)}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                operation = headers.get("x-amz-target", "").rpartition(".")[2]
                if self.take(operation, body):
                    method, path, _ = first.split(" ")
                    answer = await self.ask(f"{method} {path} HTTP/1.1", headers, body)
                else:
                    answer = self.refusal()
                writer.write(answer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        writer.close()

    async def ask(self, first, headers, body):
        # MiniStack never closes a connection that the client has closed.
        headers = {**headers, "connection": "close"}
        reader, writer = await asyncio.open_connection("127.0.0.1", self.cloud.port)
        writer.write("\r\n".join([first, *(f"{name}: {value}" for name, value in headers.items()), "", ""]).encode() + body)
        answer = await reader.read()
        writer.close()
        head, _, body = answer.partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        assert not any("chunked" in line.lower() for line in lines), lines
        kept = [line for line in lines if line.split(":")[0].lower() not in ("connection", "content-length")]
        return "\r\n".join([*kept, f"content-length: {len(body)}", "", ""]).encode() + body

    def refusal(self):
        kind = "com.amazonaws.dynamodb.v20120810#ProvisionedThroughputExceededException"
        body = json.dumps({"__type": kind, "message": "The level of configured provisioned throughput was exceeded"})
        date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime())
        return (
            f"HTTP/1.1 400 Bad Request\r\ndate: {date}\r\ncontent-type: application/x-amz-json-1.0\r\n"
            f"x-amzn-requestid: REFUSED\r\ncontent-length: {len(body)}\r\n\r\n{body}"
        ).encode()


class Run:
    """A lock, its keeper, and this script's ends of what the keeper holds."""

    def __init__(self, number, options, table, terraform):
        self.renewed, self.deadline, self.narrowest, self.stopped, self.other = [], None, math.inf, False, []
        # As long as names in practice, and longer: with all facts, the item would be larger than one write unit.
        key = f"environments/production/region-{number:03}/" + "k" * 60 + "/terraform.tfstate"
        lock = f"{number:08x}-1111-2222-3333-444455556666"
        info = {"ID": lock, "Operation": "OperationTypeApply", "Info": "", "Who": f"runner@{'h' * 63}", "Version": "1.11.4",
                "Created": "2026-11-24T10:00:00.123456789Z", "Path": f"bucket/{key}"}
        item = {"LockID": {"S": f"bucket/{key}"}, "Info": {"S": json.dumps(info)}}
        table.cloud.dynamodb("PutItem", {"TableName": "locks", "Item": item})
        config = {"bucket": "bucket", "key": key, "region": "us-east-1", "dynamodb_table": "locks"}
        orders = {
            "lock": lock,
            "places": [{
                "backend": {"kind": "s3", "config": config, "origin": {"opentofu": False, "before_1_6": False}},
                "bucket": "bucket", "key": key, "table": "locks", "lock_file": False,
            }],
            "length": {"secs": options.lease, "nanos": 0}, "fence": "stop",
            "holder": {"user": "u" * 32, "host": "h" * 63, "machine": "m" * 32, "boot": "b" * 36, "container": "c" * 64,
                       "ci": "GitHub Actions", "job": "https://example.com/" + "j" * 200, "attempt": "1", "cloud": "i" * 60},
            "terraform": terraform.pid, "start": start_of(terraform.pid),
            "may_have_a_record": False, "withdraws": False, "directory": "/",
        }
        self.reports, socket_end = socket.socketpair()
        self.fuse, fuse_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        stop, self.stop = os.pipe()
        kill, self.kill = os.pipe()
        pidfd = os.pidfd_open(terraform.pid)
        numbers = [socket_end.fileno(), pidfd, fuse_end.fileno(), stop, kill]
        environment = {
            "PATH": os.environ["PATH"], "HOME": "/nonexistent", "AWS_ENDPOINT_URL": table.url, "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test", "AWS_EC2_METADATA_DISABLED": "true",
        }
        self.process = subprocess.Popen(
            [options.tf, "locks", "keep-lease", *map(str, numbers)], env=environment, pass_fds=numbers,
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )
        self.process.stdin.write(json.dumps(orders).encode())
        self.process.stdin.close()
        for end in (socket_end, fuse_end):
            end.close()
        for number in (pidfd, stop, kill):
            os.close(number)

    def confirm(self):
        """Answers the keeper as a fuse does."""
        packet = self.fuse.recv(64)
        if len(packet) == 9 and packet[0] in DEADLINES:
            asked, = struct.unpack("<Q", packet[1:])
            self.look()
            self.deadline = max(self.deadline or 0, asked)
            self.fuse.send(struct.pack("<BIQ", ARMED, 1, self.deadline))
        return bool(packet)

    def look(self):
        """Notes how close the deadline is: a fuse would stop terraform when it has passed."""
        if self.deadline:
            left = self.deadline / 1e9 - boot_clock()
            self.narrowest = min(self.narrowest, left)
            self.stopped |= left <= 0

    def hear(self):
        lines = self.reports.recv(1 << 16)
        for line in lines.splitlines():
            report = json.loads(line)
            if "Renewed" in report and report["Renewed"]["fence"] == "stop":
                self.renewed.append(time.monotonic())
            else:
                self.other.append(report)
        return bool(lines)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--tf", default=str(HERE / "target/release/tf"))
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--lease", type=int, default=300, help="seconds")
    parser.add_argument("--units", type=int, default=5, help="write units in a second")
    parser.add_argument("--within", type=float, default=0, help="the seconds within which all runs begin")
    parser.add_argument("--seconds", type=float, default=600)
    options = parser.parse_args()
    cloud = Cloud()
    terraform = subprocess.Popen(["sleep", "infinity"])
    runs = []
    try:
        table = Table(cloud, options.units)
        selector = selectors.DefaultSelector()
        begun = time.monotonic()
        while time.monotonic() < begun + options.seconds:
            elapsed = time.monotonic() - begun
            if len(runs) < options.runs and elapsed >= options.within * len(runs) / options.runs:
                run = Run(len(runs), options, table, terraform)
                runs.append(run)
                selector.register(run.fuse, selectors.EVENT_READ, run.confirm)
                selector.register(run.reports, selectors.EVENT_READ, run.hear)
                if len(runs) == options.runs:
                    print(f"{options.runs} keepers started after {time.monotonic() - begun:.0f} s", flush=True)
            wait = 0 if len(runs) < options.runs else 0.5
            for key, _ in selector.select(wait):
                if not key.data():
                    selector.unregister(key.fileobj)
        for run in runs:
            run.look()
        report(options, table, runs, begun)
    finally:
        terraform.kill()
        terraform.wait()
        for run in runs:
            run.process.wait()
        cloud.stop()


def report(options, table, runs, begun):
    counts = [len(run.renewed) for run in runs]
    first = [run.renewed[0] - begun for run in runs if run.renewed]
    gaps = [later - earlier for run in runs for earlier, later in zip(run.renewed, run.renewed[1:])]
    print(f"{options.runs} runs with leases of {options.lease} s, {options.units} write units a second, {options.seconds:.0f} s")
    print(f"renewals: {sum(counts)}, of one run {min(counts)} to {max(counts)}; runs without one: {counts.count(0)}")
    if first:
        print(f"first renewal confirmed: median {statistics.median(first):.1f} s after the start, last {max(first):.1f} s")
    if gaps:
        print(f"between two renewals of one run: median {statistics.median(gaps):.1f} s, longest {max(gaps):.1f} s")
    steady = [at for at in table.written if at > 120]
    if steady:
        print(f"write units used: {len(table.written)}; after the first 2 min {len(steady) / (options.seconds - 120):.2f} a second")
    print(f"writes refused by the table: {table.refused}; largest item: {table.largest} bytes")
    left = min(run.narrowest for run in runs)
    print(f"least time that a run had left until its deadline: {left:.1f} s of {options.lease * 0.8:.0f} s")
    print(f"runs that were stopped: {sum(run.stopped for run in runs)}")
    print(f"keepers that ended: {sum(run.process.poll() is not None for run in runs)}; "
          f"other reports: {sum(len(run.other) for run in runs)} {[run.other for run in runs if run.other][:1] or ''}")
    if 0 in counts:
        sys.exit(f"{counts.count(0)} runs were never renewed, so the figures say nothing")
    if any(run.stopped for run in runs) or table.largest > 1024:
        sys.exit("a run was stopped, or an item is larger than 1 KiB")


main()
