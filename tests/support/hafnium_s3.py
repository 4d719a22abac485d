"""A real S3 for tests: SeaweedFS on free ports of 127.0.0.1, with its data in a folder of the test."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Self

from hafnium_servers import free_port

KEY, SECRET = "hafnium", "hafnium-secret"
_CONFIG = '{"identities": [{"name": "t", "credentials": [{"accessKey": "%s", "secretKey": "%s"}], "actions": ["Admin", "Read", "Write"]}]}'


class S3:
    """`with` starts and stops it. `environment` holds the credentials, as AWS's variables."""

    def __init__(self, folder: Path) -> None:
        (folder / "data").mkdir(parents=True)
        (folder / "s3.json").write_text(_CONFIG % (KEY, SECRET))
        self.port, self._master = free_port(), free_port()
        self.environment = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_EC2_METADATA_DISABLED": "true"}
        ports = {
            "master.port": self._master, "master.port.grpc": free_port(), "volume.port": free_port(), "volume.port.grpc": free_port(),
            "filer.port": free_port(), "filer.port.grpc": free_port(), "s3.port": self.port, "s3.port.grpc": free_port(),
            "s3.port.iceberg": 0, "s3.port.lance": 0,  # else at fixed ports, which others may have
        }
        self._argv = [
            str(Path(sys.executable).with_name("weed")), "server", f"-dir={folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
            # Its own journal takes seven volumes when it can: of a few it could leave the bucket none
            "-filer", "-s3", f"-s3.config={folder / 's3.json'}", "-volume.max=100",
            "-master.volumeSizeLimitMB=64", *(f"-{k}={v}" for k, v in ports.items()),
        ]
        self._log = folder / "weed.log"
        self._process: subprocess.Popen[bytes] | None = None

    def uri(self, path: str) -> str:
        """As --inference_log takes it."""
        return f"s3://{path}?endpoint_override=127.0.0.1:{self.port}&scheme=http&region=us-east-1&allow_bucket_creation=true"

    def __enter__(self) -> Self:
        with self._log.open("ab") as out:
            self._process = subprocess.Popen(self._argv, stdout=out, stderr=subprocess.STDOUT)
        until = time.monotonic() + 60.0
        while time.monotonic() < until and self._process.poll() is None:
            if self._speaks() and self._has_room():
                return self
            time.sleep(0.1)
        raise AssertionError(f"SeaweedFS did not start:\n{self._log.read_text()[-2000:]}")

    def _speaks(self) -> bool:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{self.port}/", timeout=2).close()
        except urllib.error.HTTPError:  # it wants credentials
            return True
        except OSError:
            return False
        return True

    def _has_room(self) -> bool:
        """Its volume server has found its master: before, whatever is written fails."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._master}/dir/assign", timeout=2) as answer:
                return "fid" in json.load(answer)
        except OSError:
            return False

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        self.kill()

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
            self._process = None
