"""`make image-sizes`: what the Python packages of each image weigh, as a table, beside those of KServe's own Python servers.

Installed from the locks (and, for KServe, from PyPI) into folders of their own, which share uv's cache and are gone afterwards. The base
image (Debian and Python) comes on top of each alike, and so does the parts' own code (1 MB).
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
UV = str(Path(sys.executable).with_name("uv"))
KSERVE = "0.21.0"
PARTS = ("predictors", "transformers", "rollouts", "monitoring")
"""Not training: its torch brings CUDA's libraries as a package, which its Dockerfile replaces."""
RIVALS = {
    f"KServe {KSERVE}: the SDK, which every Python server of it has": [f"kserve=={KSERVE}"],
    f"KServe {KSERVE}: SDK with storage, scikit-learn, joblib (its sklearnserver)": [
        f"kserve[storage]=={KSERVE}", "scikit-learn", "joblib"],
    f"KServe {KSERVE}: SDK with storage and ONNX Runtime": [f"kserve[storage]=={KSERVE}", "onnxruntime"],
}


def installed(*what: str) -> tuple[int, int, list[tuple[int, str]]]:
    """(bytes, distributions, the largest folders) of an installation."""
    with TemporaryDirectory(prefix="hafnium-sizes-") as folder:
        place = Path(folder) / "site"
        argv = [UV, "pip", "install", "--quiet", "--python", sys.executable, "--target", str(place), *what]
        subprocess.run(argv, check=True, cwd=ROOT)
        files = {p.name: [p] if p.is_file() else list(p.rglob("*")) for p in place.iterdir()}
        sizes = {name: sum(f.stat().st_size for f in found if f.is_file()) for name, found in files.items()}
        largest = sorted(((size, name) for name, size in sizes.items()), reverse=True)
        return sum(sizes.values()), len(list(place.glob("*.dist-info"))), largest


def row(name: str, size: int, count: int, largest: list[tuple[int, str]]) -> str:
    top = ", ".join(f"{n} {s / 1e6:.0f}" for s, n in largest[:5])
    return f"| {name} | {size / 1e6:.0f} | {count} | {top} |"


def main() -> None:
    """Prints the table."""
    print("| | MB | packages | the largest, MB |\n|---|---|---|---|")
    for part in PARTS:
        lock = f"{part}/requirements.lock"
        print(row(f"`{lock}`", *installed("--no-deps", "--require-hashes", "-r", lock)), flush=True)
    for name, requirements in RIVALS.items():
        print(row(name, *installed(*requirements)), flush=True)


if __name__ == "__main__":
    main()
