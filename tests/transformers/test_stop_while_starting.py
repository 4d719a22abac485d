"""Told to stop before it was ever ready, a transformer ends at once: nothing is in flight, and an import can't be cut short otherwise."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hafnium_servers import predictor, transformer, wait_until

from hafnium_contract.bundle import Bundle

ENDLESS = """
import os
open(os.environ["IMPORT_BEGAN"], "w").close()
while True:
    pass
"""
"""A Feast whose import never ends, as one on a machine with no CPU to spare."""


@pytest.fixture
def importing(tmp_path: Path) -> dict[str, str]:
    """Environment in which `import feast` finds that one."""
    package = tmp_path / "slow" / "feast"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(ENDLESS)
    path = os.pathsep.join([str(package.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"IMPORT_BEGAN": str(tmp_path / "began"), "PYTHONPATH": path}


def test_sigterm_while_feast_is_imported_ends_the_process_at_once_and_well(
    bundle: Bundle, repo: Path, importing: dict[str, str], tmp_path: Path,
) -> None:
    log = tmp_path / "log"
    with predictor(bundle.path, tmp_path) as behind, transformer(behind.port, tmp_path, repo=repo, log_dir=log, env=importing) as front:
        behind.wait()
        wait_until(Path(importing["IMPORT_BEGAN"]).exists)
        assert front.stop() == 0  # stop() kills after 30 s, and the status would say so
        assert "stopped" in front.log
