"""The time and the memory of `tf locks list` and `tf locks audit`, beside other programs that read the same table.

Tables of 10,000 and of 100,000 items on the loopback DynamoDB, and one of 1,000,000 items on `scan_server`, which costs
the machine little. A tenth of the items are locks and the rest are digests. The service and the scanner share this
machine, so the times compare programs, and say nothing about AWS. At 1,000,000 items the programs run in turn, and each
value is the median of its runs. The exit code is 1 if `tf` then needs more than 32 MiB, or if a list or an audit needs
more than 1.2 times the time of the fastest other program. A list with `--json` is known to need more: it prints four
times as much text as each other program.

`tf` reads several segments of a table at once. So the other programs, except the AWS CLI, also run with 2 and with 4
processes, each of which reads one segment. Their memory is that of the largest process. To try this script with small
tables: bench/scan.py --tf target/debug/tf --loopback 1000 --prepared 20000. The aims are those of a release build on an
idle machine.
"""

import argparse
import os
import pathlib
import statistics
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE / "demo"))
from cloud import Cloud
from scan_server import item

# The aims at 1,000,000 items.
MEMORY, RATIO = 32, 1.2


def fill(cloud, table, items):
    cloud.dynamodb("CreateTable", {
        "TableName": table, "BillingMode": "PAY_PER_REQUEST",
        "AttributeDefinitions": [{"AttributeName": "LockID", "AttributeType": "S"}],
        "KeySchema": [{"AttributeName": "LockID", "KeyType": "HASH"}],
    })
    for start in range(0, items, 25):
        puts = [{"PutRequest": {"Item": item(number)}} for number in range(start, start + 25)]
        left = cloud.dynamodb("BatchWriteItem", {"RequestItems": {table: puts}}).get("UnprocessedItems")
        assert not left, left


# The kernel counts the memory of the process that starts a program as memory of the program (exec_mmap in fs/exec.c). So a
# small process starts it, and that process measures it.
LAUNCHER = """
import os, sys, time
begun = time.perf_counter()
_, status, used = os.wait4(os.posix_spawn(sys.argv[2], sys.argv[2:], os.environ), 0)
seconds = time.perf_counter() - begun
os.write(int(sys.argv[1]), f"{seconds} {used.ru_utime + used.ru_stime} {used.ru_maxrss / 1024} {status}".encode())
"""


def measured(command, environment):
    """Returns the seconds, the seconds of processor time, and the most memory in MiB. Ends if the command fails."""
    reader, writer = os.pipe()
    launcher = [sys.executable, "-I", "-S", "-c", LAUNCHER, str(writer)]
    with subprocess.Popen([*launcher, *command], env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          pass_fds=[writer]) as process:
        os.close(writer)
        while process.stdout.read(1 << 16):
            pass
    with open(reader) as file:
        seconds, processor, memory, status = file.read().split()
    # With a stale lock, `tf` may end with 2.
    if os.waitstatus_to_exitcode(int(status)) not in (0, 2):
        sys.exit(f"{command} ended with {os.waitstatus_to_exitcode(int(status))}")
    return float(seconds), float(processor), float(memory)


def environment_of(port):
    environment = dict(
        os.environ, AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}", AWS_ACCESS_KEY_ID="test",
        AWS_SECRET_ACCESS_KEY="test", AWS_REGION="us-east-1", AWS_DEFAULT_REGION="us-east-1",
        AWS_EC2_METADATA_DISABLED="true",
    )
    environment.pop("AWS_CA_BUNDLE", None)
    return environment


def programs(table, tf):
    listing, audit = ([tf, "locks", *words, "--table", table] for words in (["list"], ["audit", "--older-than", "36500d"]))
    tools = HERE / "target/tools/scan/bin"
    python = [str(tools / "python3"), str(HERE / "bench/scan_rivals.py")]
    aws = [str(tools / "aws"), "dynamodb", "scan", "--table-name", table, "--output", "json"]
    commands = {"tf locks list": listing, "tf locks list --json": [*listing, "--json"], "tf locks audit": audit}
    for name, rival in (("http and orjson", "http"), ("boto3", "boto3")):
        commands[name] = [*python, rival, table]
        for processes in ("2", "4"):
            commands[f"{name}, {processes} processes"] = [*python, rival, table, processes]
    return {**commands, "aws dynamodb scan": aws}


def show(items, name, seconds, processor, memory):
    print(f"{items:8}  {name:28}  {seconds:8.2f}  {processor:9.2f}  {memory:6.1f}", flush=True)


def missed(medians):
    """Prints the ratios, and yields the aims that were missed. `medians` has the seconds, the processor seconds and the MiB
    of each program."""
    fastest, other = min((seconds, name) for name, (seconds, *_) in medians.items() if not name.startswith("tf "))
    for name, (seconds, _, memory) in medians.items():
        if not name.startswith("tf "):
            continue
        print(f"{name}: {seconds / fastest:.2f} times the time of {other}", flush=True)
        if seconds > RATIO * fastest and not name.endswith("--json"):
            yield f"{name}: {seconds / fastest:.2f} times the time of {other}; the aim is {RATIO}"
        if memory > MEMORY:
            yield f"{name}: {memory:.1f} MiB; the aim is {MEMORY}"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--tf", default=str(HERE / "target/release/tf"))
    parser.add_argument("--loopback", type=int, nargs="*", default=[10_000, 100_000], help="the sizes of the tables on the loopback DynamoDB")
    parser.add_argument("--prepared", type=int, default=1_000_000, help="the size of the table on scan_server")
    options = parser.parse_args()
    print(f"{'items':>8}  {'':28}  {'seconds':>8}  {'processor':>9}  {'MiB':>6}")
    cloud = Cloud()
    try:
        for items in options.loopback:
            table = f"locks-{items}"
            fill(cloud, table, items)
            for name, command in programs(table, options.tf).items():
                show(items, name, *measured(command, environment_of(cloud.port)))
    finally:
        cloud.stop()
    items, runs = options.prepared, {}
    # A process of its own: its threads would take the time of the thread that reads the output of a program.
    server = subprocess.Popen([sys.executable, str(HERE / "bench/scan_server.py"), str(items)],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    environment = environment_of(int(server.stdout.readline()))
    commands = programs("locks", options.tf)
    # It keeps the whole table in memory.
    del commands["aws dynamodb scan"]
    for turn in range(6):
        for name, command in commands.items():
            values = measured(command, environment)
            # During the first turn, the server makes its responses.
            if turn > 0:
                runs.setdefault(name, []).append(values)
    medians = {name: tuple(map(statistics.median, zip(*values))) for name, values in runs.items()}
    for name, values in medians.items():
        show(items, name, *values)
    server.stdin.close()
    server.wait()
    sys.exit("\n".join(missed(medians)) or 0)


if __name__ == "__main__":
    main()
