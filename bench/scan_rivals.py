"""Other programs that read a whole lock table, to compare `tf locks list` with.

Each prints the locks of the table as JSON, one a line. That is the least that a list of the locks needs. Like `tf`, each
asks the service to leave out the digests.

    python3 scan_rivals.py boto3|http TABLE
"""

import os
import sys

LOCKS = {"FilterExpression": "attribute_exists(#info)", "ExpressionAttributeNames": {"#info": "Info"}}


def with_boto3(table):
    """With AWS's own library, as most scripts are written."""
    import boto3

    pages = boto3.client("dynamodb").get_paginator("scan").paginate(TableName=table, **LOCKS)
    for page in pages:
        for item in page["Items"]:
            print(item["Info"]["S"])


def with_http(table):
    """Without a signature, a retry or a check, over one connection, with the fastest parser that Python has."""
    import http.client
    import urllib.parse

    import orjson

    connection = http.client.HTTPConnection(urllib.parse.urlsplit(os.environ["AWS_ENDPOINT_URL"]).netloc)
    headers = {"Content-Type": "application/x-amz-json-1.0", "X-Amz-Target": "DynamoDB_20120810.Scan"}
    request = {"TableName": table, **LOCKS}
    while True:
        connection.request("POST", "/", orjson.dumps(request), headers)
        page = orjson.loads(connection.getresponse().read())
        for item in page["Items"]:
            print(item["Info"]["S"])
        if "LastEvaluatedKey" not in page:
            return
        request["ExclusiveStartKey"] = page["LastEvaluatedKey"]


if __name__ == "__main__":
    {"boto3": with_boto3, "http": with_http}[sys.argv[1]](sys.argv[2])
