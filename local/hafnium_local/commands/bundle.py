"""`hafnium bundle create | check | manifest`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hafnium_contract.bundle import open_bundle
from hafnium_contract.errors import BundleError, InputError
from hafnium_local.commands.arguments import Contract, Json, Seed
from hafnium_local.console import fail, print_json
from hafnium_local.manifest_writer import Pace, Serving, inference_service, model_rollout, to_yaml

app = typer.Typer(no_args_is_help=True, help="Look at a bundle: a model with everything that is known about it.")


@app.command()
def create(
    model: Annotated[Path, typer.Option(help="The model: an ONNX file that fits the contract, whatever trained it.", show_default=False)],
    contract: Contract,
    data: Annotated[
        Path, typer.Option(help="Labelled rows that the model was not trained on (CSV or Parquet); the contract names the columns.",
                           show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder of the bundle to write.", show_default=False)],
    trained_by: Annotated[
        str, typer.Option(help="Who or what trained it, on what; stands in the model card.", show_default=False)],
    model_version: Annotated[
        str | None, typer.Option(help="Name of this version; a short hash of the model without it.", show_default=False)] = None,
    seed: Seed = 7,
    as_json: Json = False,
) -> None:
    """A bundle of a model that something else has trained: scikit-learn, XGBoost, anything that can be written as ONNX.

    The graph takes `features` float32 \\[batch, n] in the contract's order with NaN where a value is missing, and gives `score` \\[batch]
    and `interval` \\[batch, 2]. It is measured on the rows and judged by the same gates as a trained one, directions included.

    Exit status: 0 a bundle was written, 1 a gate says no (each one is named, and nothing is written), 2 wrong input.

    Example: hafnium bundle create --model trees.onnx --contract C.yaml --data held-out.csv --trained-by "risk team" --out build/v1
    """
    from hafnium_training.foreign_model import ForeignOptions, make_bundle_of

    found, gates = make_bundle_of(ForeignOptions(model, contract, data, out, trained_by, model_version, seed))
    m = found.manifest
    if as_json:
        print_json({"bundle": str(out), "version": m.model_version, "digest": m.digest, "gates": {g.name: g.verdict for g in gates}})
        return
    typer.echo(f"{out}: {m.model_name} {m.model_version}, {m.digest[:19]}")
    for g in gates:
        if g.verdict not in ("pass", "not measured"):
            typer.echo(f"  {g.name}: {g.verdict}: {g.message}")


@app.command()
def check(
    bundle: Annotated[Path, typer.Argument(help="The bundle, a directory.", show_default=False)],
    contract_digest: Annotated[
        str | None, typer.Option("--contract", help="It must be made for the contract with this digest.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Answer as JSON.")] = False,
) -> None:
    """Is the bundle whole and unchanged, and does its graph fit its contract?

    Every file is hashed, then the graph is loaded, held against the contract and asked for scores, as a predictor does at its start.
    Exit status: 0 yes, 1 no (the message names the file), 2 there is no such directory.

    Example: hafnium bundle check build/v1
    """
    from prometheus_client import CollectorRegistry

    from hafnium_predictor.engine import load_engine
    from hafnium_predictor.metrics import PredictorMetrics

    try:
        found = open_bundle(bundle, expect_contract=contract_digest)
        load_engine(bundle, PredictorMetrics("check", CollectorRegistry()), rows_max=64, warmup_rows=64)
    except BundleError as e:
        if as_json:
            print_json({"valid": False, "bundle": str(bundle), "problem": str(e)})
        else:
            fail(str(e))
        raise typer.Exit(1) from e
    m = found.manifest
    if as_json:
        print_json({"valid": True, "bundle": str(bundle), **m.model_dump(mode="json")})
    else:
        typer.echo(f"{bundle}: valid; {m.model_name} {m.model_version}, {len(m.files)} files, {m.digest}")


@app.command()
def manifest(
    bundle: Annotated[Path, typer.Argument(help="The bundle, a directory.", show_default=False)],
    features: Annotated[
        Path | None, typer.Option(help="Folder of the Feast repo that the transformer reads; needed when the contract has views.",
                                  show_default=False)] = None,
    rollout: Annotated[bool, typer.Option("--rollout", help="A ModelRollout that brings the model in step by step.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="With --rollout: the pace of the demo, a minute instead of days.")] = False,
) -> None:
    """The YAML that serves a bundle: an InferenceService, or with --rollout a ModelRollout.

    The first model of a service is an InferenceService; each one after it comes by a rollout, since that is what compares it.

    Example: hafnium bundle manifest build/v1 --features build/features > v1.yaml
    """
    found = open_bundle(bundle)
    if found.contract.views and features is None:
        raise InputError(f"contract {found.contract.name} looks features up ({found.contract.views[0].name}, …): give --features REPO")
    if features is not None and not (features / "feature_store.yaml").is_file():
        raise InputError(f"{features}: is no Feast repo (feature_store.yaml is missing); make one with: hafnium features build")
    repo = str(features.resolve()) if features is not None else None
    serving = Serving(feature_repo=repo, log_flush_seconds=1.0 if quick else 10.0)
    uri = bundle.resolve().as_uri()
    if rollout:
        from hafnium_local.demo.plan import PACE

        document = model_rollout(found, uri, serving, PACE if quick else Pace())
    else:
        document = inference_service(found, uri, serving)
    typer.echo(to_yaml(document), nl=False)
