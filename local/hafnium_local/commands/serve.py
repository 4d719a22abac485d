"""`hafnium up` and `hafnium score`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from hafnium_contract.contract_file import load_contract
from hafnium_local.commands.arguments import DEFAULT_STATE, Json, State
from hafnium_local.console import ERR, Bars, print_json


def up(
    files: Annotated[
        list[Path] | None, typer.Argument(help="InferenceService and ModelRollout YAML; none: go on with what the state folder has.")
    ] = None,
    port: Annotated[int | None, typer.Option(help="The gateway's port; any free one without it.", show_default=False, min=0)] = None,
    state: State = DEFAULT_STATE,
    look_seconds: Annotated[float, typer.Option(help="Seconds between two looks of the rollout controller.", min=0.2)] = 10.0,
    access_log: Annotated[bool, typer.Option(help="Write the gateway's access log (JSON) to logs/.")] = False,
) -> None:
    """Runs the same YAML as `kubectl apply` on this machine, behind Envoy, until Ctrl-C.

    Prints the gateway's address when it answers. Crashed processes are started again; their logs are in the state folder. Everything
    may be killed and `hafnium up` without files goes on where it was.

    Example: hafnium up v1.yaml --port 8080
    """
    from hafnium_local.runtime import run

    def tell(line: str) -> None:
        if line.startswith("gateway: http"):
            typer.echo(line.removeprefix("gateway: "))
        else:
            ERR.print(line, markup=False)

    raise typer.Exit(run(files or [], state, port, tell, look_seconds=look_seconds, access_log=access_log))


def score(
    file: Annotated[Path, typer.Argument(help="Rows: .jsonl of score requests, or a .csv or .parquet table.", show_default=False)],
    url: Annotated[str, typer.Option(help="The gateway's address, as `hafnium up` prints it.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(help="Write there (.jsonl or .csv) instead of to standard output.", show_default=False)] = None,
    contract: Annotated[
        Path | None, typer.Option(help="Tells a table's columns apart; without it they are called entity.NAME and features.NAME.",
                                  show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """Rows in, scores out: one line each, in order; a row that is refused has its error instead.

    Exit status: 0 all rows were scored, 1 some were refused, 2 wrong input or nobody answers at the address.

    Example: hafnium score --url http://127.0.0.1:8080 --contract examples/creditcard/contract.yaml rows.csv --out scores.csv
    """
    from hafnium_local.batch_scores import score_file

    parsed = load_contract(contract) if contract is not None else None
    with Bars() as bars:
        done = 0

        def on_rows(rows: int) -> None:
            nonlocal done
            bars.advance(rows - done)
            done = rows

        summary = score_file(url, file, out if out is not None else sys.stdout, contract=parsed, on_rows=on_rows)
    if as_json and out is not None:
        print_json(asdict(summary))
    elif out is not None:
        typer.echo(f"{out}: {summary.scored} of {summary.rows} rows scored, {summary.refused} refused")
    raise typer.Exit(1 if summary.refused else 0)
