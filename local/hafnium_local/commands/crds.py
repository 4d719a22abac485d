"""`hafnium crds`: the CustomResourceDefinitions of this version."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hafnium_local.console import fail
from hafnium_rollout import crds as definitions

COMMITTED = Path("kustomize/crds")


def crds(
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FOLDER", help="Write one file each, and a kustomization.yaml, there.",
                                  show_default=False)] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing: are the files in FOLDER (kustomize/crds unless given) those of this version?"),
    ] = False,
) -> None:
    """The types ModelRollout, ModelEvidence and ModelApproval for a cluster, made from the code that reads them.

    Exit status: 0 done, or the files are as they should be; 1 they are not.

    Example: hafnium crds | kubectl apply --server-side -f -
    """
    if check:
        folder = out or COMMITTED
        stale = definitions.stale(folder)
        if stale:
            fail(f"{folder}: not those of this version: {', '.join(stale)}; run: hafnium crds -o {folder}")
            raise typer.Exit(1)
        typer.echo(f"{folder}: up to date")
    elif out is not None:
        changed = definitions.write(out)
        typer.echo("\n".join(f"{path} written" for path in changed) or f"{out}: up to date")
    else:
        typer.echo(definitions.stream(), nl=False)
