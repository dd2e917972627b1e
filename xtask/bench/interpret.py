"""Reads milliseconds, one number a line; for each, works so long and prints how often it was done.

The work is Python's own: parsing, compiling and printing some of its standard library.
"""
import ast
import json
import sys
import time

MODULES = ["argparse", "ast", "dataclasses", "difflib", "inspect", "pathlib", "shutil", "typing"]


def sources():
    for name in MODULES:
        module = __import__(name)
        with open(module.__file__, encoding="utf-8") as file:
            yield name, file.read()


def plain(node):
    if isinstance(node, ast.AST):
        fields = {name: plain(value) for name, value in ast.iter_fields(node)}
        return {"node": type(node).__name__, **fields}
    if isinstance(node, list):
        return [plain(item) for item in node]
    return repr(node)


def work(texts):
    for name, text in texts:
        tree = ast.parse(text, name)
        compile(tree, name, "exec", dont_inherit=True)
        json.loads(json.dumps(plain(tree)))


texts = list(sources())
for line in iter(sys.stdin.readline, ""):
    end = time.monotonic() + int(line) / 1000
    done = 0
    while done == 0 or time.monotonic() < end:
        work(texts)
        done += 1
    print(done, flush=True)
