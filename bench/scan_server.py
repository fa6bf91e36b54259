"""A DynamoDB service with one on-demand table, whose pages were made before. It answers Scan and DescribeTable.

What it costs the machine is small beside what a scanner costs, so a scan of 1,000,000 items measures the scanner. A page
has items of 1 MB, as DynamoDB's have, and the header with its checksum. A tenth of the items are locks and the rest are
digests. The locks were taken on 100 hosts. If a request has a filter, the digests are left out of the page, whatever the
filter says: DynamoDB filters a page after it has read 1 MB of items (DynamoDB API reference, Scan).
"""

import json
import socket
import sys
import threading
import zlib

# DynamoDB ends a page after 1 MB of items. An item's size is the length of its names and values.
PAGE = 1 << 20


def item(number):
    path = f"bucket/env/{number:07}/prod.tfstate"
    if number % 10:
        return {"LockID": {"S": path + "-md5"}, "Digest": {"S": f"{number:032x}"}}
    info = {"ID": f"{number:08x}-0000-0000-0000-000000000000", "Operation": "OperationTypeApply", "Info": "",
            "Who": f"runner@build-{number // 10 % 100:02}", "Version": "1.11.4", "Created": "2026-11-24T10:00:00Z",
            "Path": path}
    return {"LockID": {"S": path}, "Info": {"S": json.dumps(info, separators=(",", ":"))}}


def pages(items):
    """The items of each page, as texts: the locks, and the digests."""
    made, locks, digests, size = [], [], [], 0
    for number in range(items):
        one = item(number)
        size += sum(len(name) + len(value["S"]) for name, value in one.items())
        (locks if "Info" in one else digests).append(json.dumps(one, separators=(",", ":")))
        if size >= PAGE or number == items - 1:
            made.append((locks, digests))
            locks, digests, size = [], [], 0
    return made


def response(body):
    head = (f"HTTP/1.1 200 OK\r\nContent-Type: application/x-amz-json-1.0\r\n"
            f"x-amz-crc32: {zlib.crc32(body)}\r\nContent-Length: {len(body)}\r\n\r\n")
    return head.encode() + body


class ScanServer:
    """Serves one table, whatever its name, at `port` of 127.0.0.1."""

    def __init__(self, items):
        self.items, self.pages = items, pages(items)
        self.answers = {}
        self.lock = threading.Lock()
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def prepare(self, segments, is_filtered):
        """Returns the answers of a scan with this number of segments: page N belongs to segment N % segments."""
        with self.lock:
            if (segments, is_filtered) in self.answers:
                return self.answers[segments, is_filtered]
            answers = []
            for number, (locks, digests) in enumerate(self.pages):
                items = locks if is_filtered else locks + digests
                last = {"LastEvaluatedKey": {"LockID": {"S": f"page-{number + segments}"}}}
                end = "," + json.dumps(last)[1:] if number + segments < len(self.pages) else "}"
                head = f'{{"Count":{len(items)},"ScannedCount":{len(locks) + len(digests)},"Items":['
                answers.append(response(f"{head}{','.join(items)}]{end}".encode()))
            self.answers[segments, is_filtered] = answers
            return answers

    def accept(self):
        while True:
            client, _ = self.listener.accept()
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self.serve, args=(client,), daemon=True).start()

    def serve(self, client):
        file = client.makefile("rb")
        try:
            while file.readline():
                headers = {}
                while line := file.readline().strip():
                    name, value = line.split(b":", 1)
                    headers[name.lower()] = value.strip()
                request = json.loads(file.read(int(headers[b"content-length"])))
                asks_for = headers[b"x-amz-target"].decode().split(".")[1]
                client.sendall({"Scan": self.scan, "DescribeTable": self.describe}[asks_for](request))
        except ConnectionError:
            pass
        finally:
            client.close()

    def describe(self, request):
        table = {"TableName": request["TableName"], "TableStatus": "ACTIVE", "ItemCount": self.items,
                 "KeySchema": [{"AttributeName": "LockID", "KeyType": "HASH"}],
                 "BillingModeSummary": {"BillingMode": "PAY_PER_REQUEST"}}
        return response(json.dumps({"Table": table}).encode())

    def scan(self, request):
        segments, segment = request.get("TotalSegments", 1), request.get("Segment", 0)
        answers = self.prepare(segments, "FilterExpression" in request)
        key = request.get("ExclusiveStartKey")
        number = int(key["LockID"]["S"].removeprefix("page-")) if key else segment
        if number < len(self.pages):
            return answers[number]
        return response(b'{"Count":0,"ScannedCount":0,"Items":[]}')


if __name__ == "__main__":
    print(ScanServer(int(sys.argv[1])).port, flush=True)
    # The process that started the server keeps this pipe open while it needs the server.
    sys.stdin.read()
