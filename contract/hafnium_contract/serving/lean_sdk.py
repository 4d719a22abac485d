"""KServe's SDK in an image that lacks what the SDK imports and no server of it uses.

`import kserve` imports the Kubernetes client (75 MB, for a class that manages InferenceServices) and pandas (45 MB, for one return type).
Where they are not installed, placeholders stand in for them, so that the import succeeds; whoever uses one all the same gets an error that
names it. Where they are installed nothing changes.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any, NoReturn

CLIENT = "kserve.api.kserve_client"
"""The only module of the SDK's that `import kserve` loads and that needs the Kubernetes client."""


class _Absent(ModuleType):
    """A module that is not there. Its names listed in `types` are empty classes, so that annotations and isinstance() work."""

    def __init__(self, name: str, missing: str, types: tuple[str, ...]) -> None:
        super().__init__(name)
        self._missing = missing
        for each in types:
            setattr(self, each, type(each, (_Unusable,), {"missing": missing}))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked by Python itself
            raise AttributeError(name)
        raise ModuleNotFoundError(f"{self.__name__}.{name} needs {self._missing}, which this image leaves out", name=self._missing)


class _Unusable:
    missing = ""

    def __init__(self, *_: Any, **__: Any) -> NoReturn:
        raise ModuleNotFoundError(f"{type(self).__name__} needs {self.missing}, which this image leaves out", name=self.missing)


def lean_sdk() -> tuple[str, ...]:
    """Call it before the first `import kserve`. Returns what is not installed and has a placeholder now."""
    stand_ins = {
        "kubernetes": (CLIENT, ("KServeClient",)),
        "pandas": ("pandas", ("DataFrame", "Series")),
    }
    missing = [name for name in stand_ins if name not in sys.modules and not _installed(name)]
    for name in missing:
        module, types = stand_ins[name]
        sys.modules.setdefault(module, _Absent(module, name, types))
    return tuple(missing)


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # an import hook says so
        return False
