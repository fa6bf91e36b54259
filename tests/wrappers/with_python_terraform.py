"""Applies a directory with python-terraform: with_python_terraform.py PROGRAM DIRECTORY."""

import json
import sys

import python_terraform

program, directory = sys.argv[1:]
terraform = python_terraform.Terraform(working_dir=directory, terraform_bin_path=program)
for command in (terraform.init, lambda: terraform.apply(skip_plan=True)):
    code, out, err = command()
    print(code, out, err)
    if code:
        sys.exit(1)
print(json.dumps(terraform.output()))
