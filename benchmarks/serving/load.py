"""wrk, and what it says. The script writes one line of JSON at the end; bodies are read from a file, one a line."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

SCRIPT = """
local bodies, at = {}, 0
for line in io.lines(os.getenv("BENCH_BODIES")) do bodies[#bodies + 1] = line end
local head = {["content-type"] = "application/json"}
local requests = {}
function init(args)
  for i, body in ipairs(bodies) do requests[i] = wrk.format("POST", wrk.path, head, body) end
  at = math.random(#requests)
end
function request() at = at % #requests + 1; return requests[at] end
function done(summary, latency, requests)
  io.write(string.format('\\n{"requests": %d, "seconds": %f, "p50_us": %f, "p99_us": %f, "bad": %d}\\n', summary.requests,
    summary.duration / 1e6, latency:percentile(50), latency:percentile(99),
    summary.errors.status + summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.timeout))
end
"""


@dataclass(frozen=True)
class Load:
    """One run of wrk."""

    per_s: float
    p50_ms: float
    p99_ms: float
    requests: int
    bad: int
    """Answers that were no success, and connections that broke."""


def wrk_or_none() -> str | None:
    """wrk's path; Debian has it."""
    return shutil.which("wrk")


def press(url: str, bodies: Path, connections: int, seconds: int, script: Path) -> Load:
    """Closed loop: each connection asks again as soon as it has its answer. Raises RuntimeError when wrk could not."""
    if not script.exists():
        script.write_text(SCRIPT)
    argv = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "10s", "-s", str(script), url]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=seconds + 60, check=False, env={"BENCH_BODIES": str(bodies)})
    if done.returncode != 0:
        raise RuntimeError(f"wrk at {url}: {(done.stderr or done.stdout).strip()[-300:]}")
    said = json.loads(done.stdout.strip().splitlines()[-1])
    return Load(
        said["requests"] / said["seconds"], said["p50_us"] / 1000.0, said["p99_us"] / 1000.0, int(said["requests"]), int(said["bad"])
    )
