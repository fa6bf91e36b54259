"""Applies a directory with tftest: with_tftest.py PROGRAM DIRECTORY."""

import json
import sys

import tftest

program, directory = sys.argv[1:]
test = tftest.TerraformTest(directory, binary=program)
test.setup()
print(test.apply(output=False))
print(json.dumps(dict(test.output())))
