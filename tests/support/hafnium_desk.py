"""A desk in a cluster: a pod that has a test's volumes, puts files there and asks services from inside. Also: which images are there."""

from __future__ import annotations

import io
import json
import os
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hafnium_kubectl import Kubectl

PYTHON = "/opt/hafnium/bin/python"
"""In every image of ours."""
TIMEOUT_S = 180
_ASK = """
import json, sys, urllib.error, urllib.request
url, body = json.load(sys.stdin)
request = urllib.request.Request(url, json.dumps(body).encode() if body is not None else None, {"content-type": "application/json"})
try:
    with urllib.request.urlopen(request, timeout=30) as answer:
        print(json.dumps([answer.status, answer.read().decode()]))
except urllib.error.HTTPError as e:
    print(json.dumps([e.code, e.read().decode()]))
"""


def image(part: str) -> str:
    """The part's image. Without one the test is skipped."""
    name = f"HAFNIUM_{part.upper()}_IMAGE"
    found = os.environ.get(name)
    if not found:
        pytest.skip(f"NOT TESTED: {name} is not set; `make test-cluster` builds the image and names it")
    return found


@dataclass(frozen=True)
class Desk:
    """The pod `desk` of a namespace, which has its volumes below `root`."""

    kubectl: Kubectl
    root: str

    def run(self, code: str, given: bytes = b"") -> str:
        """What Python code prints there. Fails the test when the code does."""
        done = subprocess.run(
            ["kubectl", "-n", self.kubectl.namespace, "exec", "-i", "desk", "--", PYTHON, "-c", code], input=given, capture_output=True,
            timeout=TIMEOUT_S, check=False)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode()

    def put(self, source: Path, place: str) -> None:
        """Copies a file or folder of this machine to ROOT/PLACE."""
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as tar:
            tar.add(source, arcname=place)
        self.run(f"import sys, tarfile; tarfile.open(fileobj=sys.stdin.buffer, mode='r|').extractall({self.root!r})", packed.getvalue())

    def ask(self, url: str, body: Any = None) -> tuple[int, Any]:
        """Status and JSON of one request."""
        status, text = json.loads(self.run(_ASK, json.dumps([url, body]).encode()))
        return status, json.loads(text)
