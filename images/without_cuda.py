"""Makes PyTorch for GPUs load where CUDA's libraries are not: `without_cuda.py SITE_PACKAGES`.

PyPI's torch for x86-64 is linked against CUDA, so `import torch` fails without 3 GB of libraries that a training of some thousand
parameters on a CPU never calls. PyTorch's own index has CPU builds; where it can't be reached, this builds a stand-in for each library
that is missing: it has the symbols that torch's libraries ask the loader for, and every one of them answers "error". So the loader is
content, `torch.cuda.is_available()` is False, and whoever uses CUDA all the same gets CUDA's error. What to build is read from the ELF
files, not from a list. Needs gcc and binutils.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory

ERROR = 100
"""cudaErrorNoDevice, which torch takes as "no GPU" without a warning; for CUDA's other libraries, too, anything but 0 is a failure."""
TEXTS = re.compile(r"(String|Name|Desc|Description)$")
"""Functions that return text and not a status: a number would be read as an address."""
INTERPRETER = ("Py", "_Py")
"""Symbols that the running Python has."""


def said(*argv: str | Path) -> str:
    """What a program prints."""
    return subprocess.run([str(a) for a in argv], check=True, capture_output=True, text=True).stdout


def needed(library: Path) -> set[str]:
    """Names of libraries that the loader will look for."""
    return set(re.findall(r"\(NEEDED\).*\[(.+?)\]", said("readelf", "-d", "-W", library)))


def symbols(library: Path, which: str) -> set[tuple[str, str]]:
    """Dynamic symbols, as (name, version or nothing). `which`: nm's option. Weak ones may stay undefined."""
    found: set[tuple[str, str]] = set()
    for line in said("nm", "-D", which, library).splitlines():
        *_, kind, name = line.split()
        if kind not in "wv":
            plain, _, version = name.partition("@")
            found.add((plain, version.lstrip("@")))
    return found


def origins(library: Path) -> dict[str, str]:
    """Version of a symbol → the library that it is asked of."""
    out: dict[str, str] = {}
    file = ""
    for line in said("readelf", "-V", "-W", library).splitlines():
        if found := re.search(r"Version: \d+ +File: (\S+)", line):
            file = found[1]
        elif file and (found := re.search(r"Name: (\S+) +Flags:", line)):
            out[found[1]] = file
    return out


def sources(libraries: list[Path]) -> dict[str, dict[str, set[str]]]:
    """Missing library → version → the symbols that it has to have. Those without one go to any library: the loader looks in all."""
    known = {p.name for p in libraries} | set(re.findall(r"^\s*(\S+) \(", said("ldconfig", "-p"), re.MULTILINE))
    missing = sorted(set[str]().union(*(needed(p) for p in libraries)) - known - {"ld-linux-x86-64.so.2"})
    out: dict[str, dict[str, set[str]]] = {name: defaultdict(set) for name in missing}
    defined = {name for p in libraries for name, _ in symbols(p, "--defined-only")}
    for path in libraries:
        of = origins(path)
        for name, version in symbols(path, "--undefined-only"):
            if of.get(version) in out:
                out[of[version]][version].add(name)
            elif not version and name not in defined and not name.startswith(INTERPRETER) and missing:
                out[missing[-1]][""].add(name)
    return out


def build(name: str, functions: dict[str, set[str]], target: Path) -> None:
    """One stand-in. `functions`: version (or nothing) → names."""
    code = ["int hafnium_stand_in;"]
    for f in sorted(set[str]().union(*functions.values())):
        text = f'const char *{f}(void) {{ return "CUDA is not in this image"; }}'
        code.append(text if TEXTS.search(f) else f"int {f}(void) {{ return {ERROR}; }}")
    with TemporaryDirectory() as folder:
        source, script = Path(folder) / "stand_in.c", Path(folder) / "versions"
        source.write_text("\n".join(code) + "\n")
        named = {version: names for version, names in functions.items() if version}
        # Symbols that no version names stay without one
        script.write_text("".join(f"{v} {{ global: {'; '.join(sorted(names))}; }};\n" for v, names in named.items()))
        version = [f"-Wl,--version-script={script}"] if named else []
        options = ["-w", "-fno-builtin", "-shared", "-fPIC", "-nostdlib", f"-Wl,-soname,{name}", *version]
        said("gcc", *options, "-o", target / name, source)


def main(site: Path) -> None:
    """Puts the stand-ins beside torch's own libraries, where those look first."""
    folder = site / "torch" / "lib"
    libraries = sorted(p for p in folder.glob("*.so*") if p.is_file() and p.read_bytes()[:4] == b"\x7fELF")
    if not libraries:
        sys.exit(f"{folder}: no libraries of torch; expected the site-packages of an environment with torch")
    wanted = sources(libraries)
    for name, functions in wanted.items():
        build(name, functions, folder)
    print(f"{folder}: stand-ins for {' '.join(wanted)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
