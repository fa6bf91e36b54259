"""Other programs that read a whole lock table, to compare `tf locks list` with.

Each prints the locks of the table as JSON, one a line. That is the least that a list of the locks needs. Like `tf`, each
asks the service to leave out the digests. With PROCESSES, so many processes read one segment of the table each, and no
order of the locks is kept.

    python3 scan_rivals.py boto3|http TABLE [PROCESSES]
"""

import multiprocessing
import os
import sys

LOCKS = {"FilterExpression": "attribute_exists(#info)", "ExpressionAttributeNames": {"#info": "Info"}}


def pages_of_boto3(request):
    """With AWS's own library, as most scripts are written."""
    import boto3

    for page in boto3.client("dynamodb").get_paginator("scan").paginate(**request):
        yield page["Items"]


def pages_of_http(request):
    """Without a signature, a retry or a check, over one connection, with the fastest parser that Python has."""
    import http.client
    import urllib.parse

    import orjson

    connection = http.client.HTTPConnection(urllib.parse.urlsplit(os.environ["AWS_ENDPOINT_URL"]).netloc)
    headers = {"Content-Type": "application/x-amz-json-1.0", "X-Amz-Target": "DynamoDB_20120810.Scan"}
    while True:
        connection.request("POST", "/", orjson.dumps(request), headers)
        page = orjson.loads(connection.getresponse().read())
        yield page["Items"]
        if "LastEvaluatedKey" not in page:
            return
        request["ExclusiveStartKey"] = page["LastEvaluatedKey"]


def show(pages, lock):
    """Prints the locks of each page while `lock` is held, or the lines of two processes could be mixed."""
    for items in pages:
        lines = "".join(f"{item['Info']['S']}\n" for item in items)
        with lock:
            sys.stdout.write(lines)
            sys.stdout.flush()


def main():
    program, table, processes = sys.argv[1], sys.argv[2], int((sys.argv[3:] or [1])[0])
    pages = {"boto3": pages_of_boto3, "http": pages_of_http}[program]
    lock = multiprocessing.Lock()
    request = {"TableName": table, **LOCKS}
    if processes == 1:
        show(pages(request), lock)
        return
    # Loaded once, and not by each process.
    __import__({"boto3": "boto3", "http": "orjson"}[program])
    context = multiprocessing.get_context("fork")
    started = []
    for segment in range(processes):
        pages_of_segment = pages({**request, "Segment": segment, "TotalSegments": processes})
        started.append(context.Process(target=show, args=(pages_of_segment, lock)))
        started[-1].start()
    for process in started:
        process.join()
    sys.exit(any(process.exitcode for process in started))


if __name__ == "__main__":
    main()
