"""Runs a server's module, and writes down how many objects it has: nobody outside of a Python process can see that.

    python watched.py FILE MODULE [ARGUMENT...]

A thread of its own, every few seconds. `gc_objects` are those that the cycle collector tracks, but for those that the server froze at its
start; `blocks` are all pieces of memory that the interpreter has given out.
"""

from __future__ import annotations

import gc
import json
import runpy
import sys
import threading
import time
from pathlib import Path

EVERY_S = 3.0


def watch(file: Path) -> None:
    """For ever: each look replaces the last."""
    while True:
        text = json.dumps({"gc_objects": len(gc.get_objects()), "blocks": sys.getallocatedblocks()})
        beside = file.with_suffix(".tmp")
        beside.write_text(text)
        beside.rename(file)
        time.sleep(EVERY_S)


if __name__ == "__main__":
    threading.Thread(target=watch, args=(Path(sys.argv[1]),), daemon=True).start()
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
