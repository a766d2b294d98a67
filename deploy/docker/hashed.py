"""Prints what the report of `pip install --dry-run` (standard input) has found as requirements with the digests of files."""

import json
import sys

found = json.load(sys.stdin)["install"]
files = {each["metadata"]["name"].lower(): each for each in found if not each.get("is_direct")}
print("# Made by `make hashes`: the very files that an image gets on this kind of machine. Not to be edited.")
for name, each in sorted(files.items()):
    digest = each["download_info"]["archive_info"]["hashes"]["sha256"]
    print(f"{name}=={each['metadata']['version']} --hash=sha256:{digest}")
