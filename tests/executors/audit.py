"""The scheduled audit of shell/audit/github, run by act on this host, with a stand-in for the API of GitHub."""

import http.server
import json
import shutil
import threading
import time

from around import ROOT, Place, check
from recipes import INSTALLED, RECIPES, github_repository, replace

AUDIT = ROOT / "shell/audit"
ISSUES = "/repos/group/infra/issues"
TITLE = "Stale state lock: "
NAME = "GitHub, scheduled audit: one issue is open for each stale lock, and a failed audit closes none"


class Issues(http.server.BaseHTTPRequestHandler):
    """The issues of one repository. It is reached as a proxy, with the whole URL in each request: gh asks the API of a
    host below localhost with HTTP."""

    protocol_version = "HTTP/1.1"
    # What `start` sets in a class of its own.
    issues = requests = None

    @classmethod
    def start(cls):
        """Serves on a port of its own. Returns the class with its issues and requests, and the server."""
        handler = type("Handler", (cls,), {"issues": [], "requests": []})
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return handler, server

    @classmethod
    def titles(cls, state="open"):
        return sorted(issue["title"] for issue in cls.issues if issue["state"] == state)

    def body(self):
        # gh sends what it reads from a pipe in chunks.
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        text = b""
        while size := int(self.rfile.readline(), 16):
            text += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return text

    def respond(self):
        path = self.path.removeprefix("http://api.github.localhost")
        body = json.loads(self.body() or "null")
        self.requests.append(f"{self.command} {path}")
        if self.headers.get("Authorization") != "token secret":
            status, answer = 401, {"message": "Bad credentials"}
        elif (self.command, path) == ("GET", f"{ISSUES}?state=open&labels=stale-terraform-lock&per_page=100"):
            status, answer = 200, [issue for issue in self.issues if issue["state"] == "open"]
        elif (self.command, path) == ("POST", ISSUES):
            number = len(self.issues) + 1
            answer = {**body, "number": number, "state": "open", "html_url": f"https://github.localhost/{number}"}
            status = 201
            self.issues.append(answer)
        elif self.command == "PATCH" and path.startswith(f"{ISSUES}/"):
            status, answer = 200, self.issues[int(path.rpartition("/")[2]) - 1]
            answer.update(body)
        else:
            status, answer = 404, {"message": "Not Found"}
        text = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json; charset=utf-8")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = do_PATCH = respond

    def log_message(self, *_):
        pass


class Audit:
    """The workflow in a place, with a lock table of its own, and the prefix prod/ of the bucket."""

    def __init__(self, cloud, release):
        for program in ("gh", "jq"):
            check(shutil.which(program), f"{program} is installed")
        self.place, self.cloud = Place(cloud, "act-audit"), cloud
        self.issues, self.server = Issues.start()
        self.table = "audited"
        cloud.dynamodb("CreateTable", {
            "TableName": self.table, "BillingMode": "PAY_PER_REQUEST",
            "AttributeDefinitions": [{"AttributeName": "LockID", "AttributeType": "S"}],
            "KeySchema": [{"AttributeName": "LockID", "KeyType": "HASH"}],
        })
        targets = (AUDIT / "targets.txt").read_text()
        values = {"terraform-locks": self.table, "example-state": "bucket", "eu-central-1": "us-east-1"}
        for old, new in values.items():
            targets = replace(targets, old, new)
        files = {
            ".github/workflows/workflow.yml": (AUDIT / "github/workflow.yml").read_text(),
            ".github/stale-locks": (AUDIT / "github/stale-locks").read_text(),
            ".github/tf-targets.txt": targets,
            ".github/actions/tf/action.yml": (RECIPES / "github/action.yml").read_text(),
        }
        self.targets = self.place.work / ".github/tf-targets.txt"
        self.arguments = [
            *github_repository(self.place, files, release), "--secret", "GITHUB_TOKEN=secret",
            "--env", "GH_HOST=github.localhost", "--env", f"http_proxy=http://127.0.0.1:{self.server.server_port}",
        ]

    def run(self):
        """Runs the workflow. Returns its exit code and its log."""
        self.issues.requests.clear()
        command = [INSTALLED / "bin/act", "schedule", "--platform", "ubuntu-24.04=-self-hosted", *self.arguments]
        end = self.place.run(command)
        issues = json.dumps(self.issues.issues, indent=1)
        return end.returncode, f"{end.stdout}{end.stderr}\n{self.issues.requests}\n{issues}"

    def put(self, path, hours):
        """Stores a lock in the table, as old as this, of a holder on another host. Returns its ID."""
        created = time.strftime("%Y-%m-%dT%H:%M:%S.5Z", time.gmtime(time.time() - hours * 3600))
        info = {"ID": f"id-of-{path}", "Operation": "OperationTypeApply", "Info": "", "Who": "anna@elsewhere",
                "Version": "1.11.4", "Created": created, "Path": path}
        item = {"LockID": {"S": path}, "Info": {"S": json.dumps(info)}}
        self.cloud.dynamodb("PutItem", {"TableName": self.table, "Item": item})
        return info["ID"]

    def delete(self, path):
        self.cloud.dynamodb("DeleteItem", {"TableName": self.table, "Key": {"LockID": {"S": path}}})

    def check_issues(self):
        lock = self.put("b/old", hours=3)
        self.put("b/new", hours=1)
        for what in ("the first run opens an issue for the old lock alone", "the second run opens no other"):
            code, log = self.run()
            check(code == 0 and self.issues.titles() == [f"{TITLE}b/old"] and len(self.issues.issues) == 1, what, log)
        check(f"    ID: {lock}\n" in self.issues.issues[0]["body"], "the issue names the lock", log)

        self.delete("b/old")
        self.put("b/older", hours=4)
        targets = self.targets.read_text()
        self.targets.write_text(f"{targets}--table no-such-table --region us-east-1\n")
        code, log = self.run()
        check(code != 0 and "no issue is closed" in log, "if a target cannot be read, the workflow fails", log)
        both = [f"{TITLE}b/old", f"{TITLE}b/older"]
        check(self.issues.titles() == both, "it closes no issue, and opens the one of the new lock", log)

        self.targets.write_text(targets)
        code, log = self.run()
        check(code == 0 and self.issues.titles() == both[1:], "the issue of the lock that is gone is closed", log)
        check(self.issues.titles("closed") == both[:1], "no other issue is closed", log)

    def remove(self):
        self.server.shutdown()
        self.place.remove()


def checks(cloud, report, release):
    if not report.wants(NAME):
        return

    def promise():
        audit = Audit(cloud, release)
        try:
            audit.check_issues()
        finally:
            audit.remove()

    report.run(NAME, promise)
