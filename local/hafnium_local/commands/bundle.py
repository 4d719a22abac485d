"""`hafnium bundle check | manifest`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hafnium_contract.bundle import open_bundle
from hafnium_contract.errors import BundleError, InputError
from hafnium_local.console import fail, print_json
from hafnium_local.manifest_writer import Pace, Serving, inference_service, model_rollout, to_yaml

app = typer.Typer(no_args_is_help=True, help="Look at a bundle: a model with everything that is known about it.")


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
