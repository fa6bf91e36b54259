"""A loopback S3 and DynamoDB with one bucket and one lock table, and a terraform working directory in it.

Shared by the demo and the measurements.
"""

import http.client
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent.parent
# The parent process of a provisioner is terraform.
WAITS = "echo $PPID > pid; touch began; while test -e began && ! test -e go; do sleep 0.05; done"


def free_port():
    """A port for a server that cannot choose one itself. For a minute, only a socket that asks for it gets it.

    The connection that is closed here leaves the port in TIME-WAIT. tests/support/cloud.rs says why that matters.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            listener.accept()[0].close()
            client.recv(1)
    return port


class Cloud:
    existing = []

    def __init__(self):
        # MiniStack writes /tmp/ministack-PORT.pid, and ends if another user owns a file of that name (proc_sys_fs(5),
        # protected_regular). Its own directory is also where its output is kept until it has started.
        self.temporary = tempfile.TemporaryDirectory(prefix="tf-cloud-")
        self.existing.append(self)
        self.port = free_port()
        environment = dict(
            os.environ, BIND_HOST="127.0.0.1", GATEWAY_PORT=str(self.port), TMPDIR=self.temporary.name)
        log = pathlib.Path(self.temporary.name) / "output"
        with log.open("wb") as output:
            self.server = subprocess.Popen(
                [HERE / "target/tools/bin/ministack"], env=environment, stdout=output, stderr=output)
        deadline = time.monotonic() + 30
        while not self.is_healthy():
            if (ended := self.server.poll()) is not None:
                sys.exit(f"MiniStack ended with exit code {ended}:\n{log.read_text(errors='replace')}")
            if time.monotonic() > deadline:
                self.server.kill()
                sys.exit(f"MiniStack did not answer on port {self.port} for 30 s:\n{log.read_text(errors='replace')}")
            time.sleep(0.05)
        self.ask("PUT", "/bucket", service="s3")
        self.dynamodb("CreateTable", {
            "TableName": "locks", "BillingMode": "PAY_PER_REQUEST",
            "AttributeDefinitions": [{"AttributeName": "LockID", "AttributeType": "S"}],
            "KeySchema": [{"AttributeName": "LockID", "KeyType": "HASH"}],
        })

    def is_healthy(self):
        try:
            return self.ask("GET", "/_ministack/health")[0] == 200
        except (OSError, http.client.HTTPException):
            return False

    def ask(self, method, path, body=b"", headers=None, service="s3"):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        scope = f"test/20260101/us-east-1/{service}/aws4_request"
        all_headers = {
            "Authorization": f"AWS4-HMAC-SHA256 Credential={scope}, SignedHeaders=host, Signature=0",
            "X-Amz-Date": "20260101T000000Z",
            # MiniStack never closes a connection that the client has closed.
            "Connection": "close",
        }
        all_headers.update(headers or {})
        connection.request(method, path, body, all_headers)
        answer = connection.getresponse()
        return answer.status, answer.read()

    def dynamodb(self, operation, body):
        headers = {"X-Amz-Target": f"DynamoDB_20120810.{operation}", "Content-Type": "application/x-amz-json-1.0"}
        return json.loads(self.ask("POST", "/", json.dumps(body), headers, "dynamodb")[1])

    def locks(self, key="prod.tfstate"):
        """The halves of the lock that stand: (where, Info)."""
        item = self.dynamodb("GetItem", {"TableName": "locks", "Key": {"LockID": {"S": f"bucket/{key}"}}}).get("Item")
        if item and "Info" in item:
            yield "DynamoDB", json.loads(item["Info"]["S"])
        status, body = self.ask("GET", f"/bucket/{key}.tflock")
        if status == 200:
            yield "S3", json.loads(body)

    def unlock(self, key="prod.tfstate"):
        self.dynamodb("DeleteItem", {"TableName": "locks", "Key": {"LockID": {"S": f"bucket/{key}"}}})
        self.ask("DELETE", f"/bucket/{key}.tflock")

    def stop(self):
        self.server.kill()
        self.server.wait()
        self.temporary.cleanup()


class Work:
    """A working directory, initialised; `programs` are put first on PATH."""

    def __init__(self, cloud, body, key="prod.tfstate", programs=()):
        self.cloud, self.key = cloud, key
        self.root = pathlib.Path(tempfile.mkdtemp(prefix="tf-work-"))
        self.directory = self.root / "work"
        (self.root / "bin").mkdir()
        (self.root / "home").mkdir()
        self.directory.mkdir()
        for name, target in programs:
            (self.root / "bin" / name).symlink_to(target)
        self.environment = {
            "PATH": f"{self.root}/bin:{os.environ['PATH']}", "HOME": str(self.root / "home"),
            "TERM": os.environ.get("TERM", "dumb"), "CHECKPOINT_DISABLE": "1",
            "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{cloud.port}",
        }
        (self.directory / "main.tf").write_text(configuration(key, body))
        self.run(["terraform", "init", "-no-color"], check=True, stdout=subprocess.DEVNULL)

    def run(self, command, **more):
        return subprocess.run(command, cwd=self.directory, env=self.environment, **more)

    def start(self, command, **more):
        return subprocess.Popen(command, cwd=self.directory, env=self.environment, **more)

    def wait_for(self, name):
        for _ in range(1200):
            if (self.directory / name).exists():
                return
            time.sleep(0.02)
        sys.exit(f"waited in vain for {name} in {self.directory}")

    def terraform(self):
        """The pid of the terraform whose provisioner, `WAITS`, has begun."""
        return int((self.directory / "pid").read_text())

    def forget(self, *names):
        for name in names:
            (self.directory / name).unlink(missing_ok=True)

    def remove(self):
        shutil.rmtree(self.root, ignore_errors=True)


def configuration(key, body, parts=("DynamoDB", "S3")):
    """A configuration whose state is `key` in the bucket, and whose lock has these parts."""
    table = 'dynamodb_table = "locks"' if "DynamoDB" in parts else ""
    lock_file = "use_lockfile   = true" if "S3" in parts else ""
    return f"""
terraform {{
  backend "s3" {{
    bucket         = "bucket"
    key            = "{key}"
    region         = "us-east-1"
    {table}
    {lock_file}
  }}
}}
{body}
"""


def provisioner(command):
    """A resource whose creation runs the command."""
    return f"""
resource "terraform_data" "production" {{
  provisioner "local-exec" {{
    command = {json.dumps(command)}
  }}
}}
"""
