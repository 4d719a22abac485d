"""Importing a library without what it imports for nothing."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def without(module: str) -> Generator[None]:
    """Within it, importing `module` fails as if it were not installed, unless it is loaded already.

    Feast imports torch if it is there, for a `to_tensor()` that nobody here calls: 490 MB and more than half of the time of its
    import (measured). A None in sys.modules is Python's own way to say that a module is not to be had.
    """
    hide = module not in sys.modules
    if hide:
        sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if hide:
            del sys.modules[module]
