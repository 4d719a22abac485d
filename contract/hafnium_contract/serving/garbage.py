"""Python's cycle collector, set for a server: what was loaded at the start is never looked at again.

After the imports of KServe and Feast the heap has some 400,000 objects. A full collection walks all of them: 50 to 150 ms in which no
request is answered (it showed as the p99), and with rows waiting in the inference log collections are frequent. Request and answer
are freed by reference counting; cycles are few.
"""

from __future__ import annotations

import gc

YOUNG_MAX = 20_000
"""New objects between two looks at the youngest. Python's 700 are a few requests' worth."""
MIDDLE_EVERY, OLD_EVERY = 20, 50


def settle() -> None:
    """Collects once, and takes everything that is alive out of the collector's sight. Call it when the server is ready."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_MAX, MIDDLE_EVERY, OLD_EVERY)


def release() -> None:
    """Gives everything back to the collector. Call it before the process ends: libraries look then for what was left behind."""
    gc.unfreeze()
