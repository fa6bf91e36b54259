"""What `tf locks list --table` costs: beside a plain `aws dynamodb scan` of the same table, and in memory.

Tables of 10,000 and of 100,000 items, a tenth of them locks and the rest digests, on the loopback DynamoDB. The service
and the scanner share this machine, so the times compare the two, and say nothing of AWS.
"""

import json
import os
import pathlib
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE / "demo"))
from cloud import Cloud


def fill(cloud, table, items):
    cloud.dynamodb("CreateTable", {
        "TableName": table, "BillingMode": "PAY_PER_REQUEST",
        "AttributeDefinitions": [{"AttributeName": "LockID", "AttributeType": "S"}],
        "KeySchema": [{"AttributeName": "LockID", "KeyType": "HASH"}],
    })
    for start in range(0, items, 25):
        puts = []
        for number in range(start, start + 25):
            path = f"bucket/env/{number:07}/prod.tfstate"
            if number % 10:
                item = {"LockID": {"S": path + "-md5"}, "Digest": {"S": f"{number:032x}"}}
            else:
                info = {"ID": f"{number:08x}-0000-0000-0000-000000000000", "Operation": "OperationTypeApply", "Info": "",
                        "Who": "anna@elsewhere", "Version": "1.11.4", "Created": "2026-11-24T10:00:00Z", "Path": path}
                item = {"LockID": {"S": path}, "Info": {"S": json.dumps(info)}}
            puts.append({"PutRequest": {"Item": item}})
        left = cloud.dynamodb("BatchWriteItem", {"RequestItems": {table: puts}}).get("UnprocessedItems")
        assert not left, left


def measured(command, environment):
    """Seconds, the most memory it had in MiB, and its exit code."""
    begun = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    size = 0
    while piece := process.stdout.read(1 << 16):
        size += len(piece)
    _, status, used = os.wait4(process.pid, 0)
    return time.perf_counter() - begun, used.ru_maxrss / 1024, os.waitstatus_to_exitcode(status), size


def main():
    cloud = Cloud()
    try:
        environment = dict(
            os.environ, AWS_ENDPOINT_URL=f"http://127.0.0.1:{cloud.port}", AWS_ACCESS_KEY_ID="test",
            AWS_SECRET_ACCESS_KEY="test", AWS_REGION="us-east-1", AWS_DEFAULT_REGION="us-east-1",
            AWS_EC2_METADATA_DISABLED="true",
        )
        environment.pop("AWS_CA_BUNDLE", None)
        print(f"{'items':>8}  {'':28}  {'seconds':>8}  {'items/s':>8}  {'MiB':>6}")
        for items in (10_000, 100_000):
            table = f"locks-{items}"
            fill(cloud, table, items)
            tf = [str(HERE / "target/release/tf"), "locks", "list", "--table", table]
            aws = [str(HERE / "target/tools/bin/aws"), "dynamodb", "scan", "--table-name", table, "--output", "json"]
            for name, command in (("tf locks list", tf), ("tf locks list --json", [*tf, "--json"]), ("aws dynamodb scan", aws)):
                seconds, memory, code, _ = measured(command, environment)
                print(f"{items:8}  {name:28}  {seconds:8.2f}  {items / seconds:8.0f}  {memory:6.1f}", flush=True)
                if code not in (0, 2):
                    sys.exit(f"{name} ended with {code}")
    finally:
        cloud.stop()


if __name__ == "__main__":
    main()
