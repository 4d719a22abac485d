"""`hafnium train`."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from hafnium_contract.errors import InputError
from hafnium_local.commands.arguments import Contract, Json, Seed, parse_time
from hafnium_local.console import Bars, print_json


def train(
    contract: Contract,
    data: Annotated[Path, typer.Option(help="Training table (CSV or Parquet); the contract names its columns.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder of the bundle to write.", show_default=False)],
    model_version: Annotated[
        str | None, typer.Option(help="Name of this version; a short hash of data and options without it.", show_default=False)] = None,
    trials: Annotated[int, typer.Option(help="Trials of the search (Ray Tune, Optuna); 1 trains without a search.", min=1, max=1000)] = 1,
    seed: Seed = 7,
    until: Annotated[
        datetime | None, typer.Option(parser=parse_time, metavar="TIME", show_default=False,
                                      help="Use only what was known then: events before it whose label had arrived.")] = None,
    params: Annotated[
        Path | None, typer.Option(help="Hyperparameters: a JSON file, or a bundle that was trained with them.", show_default=False)] = None,
    production: Annotated[
        Path | None, typer.Option(help="Bundle in production: the new model must not be worse.", show_default=False)] = None,
    tracking: Annotated[
        str | None, typer.Option(help="MLflow: a folder, or http(s):// of a server; runs and the registry.", show_default=False)] = None,
    at_once: Annotated[int, typer.Option(
        min=1, max=1000, help="Trials side by side, in batches, none ended early; on the Ray cluster of RAY_ADDRESS, or here.",
    )] = 1,
    trial_storage: Annotated[
        str | None, typer.Option(help="Where an unfinished search is kept: a folder that all nodes have, or s3://BUCKET/PREFIX.",
                                 show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """Data → search → monotone network → gates → bundle. The same data, config and seed give the same bundle digest.

    Exit status: 0 a bundle was written, 1 a gate says no (each one is named, and nothing is written), 2 wrong input, 3 a bundle was
    written, but MLflow (--tracking) could not be told; the same command again records it.

    Example: hafnium train --contract C.yaml --data build/training.parquet --out build/v1 --trials 4
    """
    from hafnium_training.hyperparameters import read_hyperparameters
    from hafnium_training.pipeline import TrainOptions
    from hafnium_training.pipeline import train as run

    if params is not None and trials > 1:
        raise InputError("--params and --trials: given hyperparameters are used as they are, so there is nothing to search; leave one out")
    options = TrainOptions(
        contract=contract, data=data, out=out, version=model_version, trials=trials, seed=seed, until=until,
        params=read_hyperparameters(params) if params is not None else None, tracking=tracking, production=production,
        at_once=at_once, work=trial_storage,
    )
    with Bars() as bars:
        result = run(options, bars)
    manifest = result.bundle.manifest
    if as_json:
        print_json({"bundle": str(out), "version": manifest.model_version, "digest": manifest.digest, "metrics": dict(result.metrics)})
    else:
        shown = ", ".join(f"{name} {value:.3f}" for name, value in result.metrics.items())
        typer.echo(f"{out}: {manifest.model_name} {manifest.model_version}, {manifest.digest[:19]}; {shown}")
