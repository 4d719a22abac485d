"""`hafnium up`, `hafnium score` and `hafnium replay`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from hafnium_contract.contract_file import load_contract
from hafnium_contract.errors import InputError
from hafnium_local.commands.arguments import DEFAULT_STATE, Json, Port, State, parse_seconds, parse_time
from hafnium_local.console import ERR, Bars, print_json

Since = Annotated[datetime | None, typer.Option(parser=parse_time, metavar="TIME", help="Only rows from then on.", show_default=False)]
Until = Annotated[datetime | None, typer.Option(parser=parse_time, metavar="TIME", help="Only rows before.", show_default=False)]


def up(
    files: Annotated[
        list[Path] | None, typer.Argument(help="InferenceService and ModelRollout YAML; none: go on with what the state folder has.")
    ] = None,
    port: Port = None,
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
    since: Since = None, until: Until = None, as_json: Json = False,
) -> None:
    """Rows in, scores out: one line each, in order; a row that is refused has its error instead. `row` is its number in the file, from 0.

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

        summary = score_file(
            url, file, out if out is not None else sys.stdout, contract=parsed, on_rows=on_rows, since=since, until=until,
        )
    if as_json and out is not None:
        print_json(asdict(summary))
    elif out is not None:
        typer.echo(f"{out}: {summary.scored} of {summary.rows} rows scored, {summary.refused} refused")
    raise typer.Exit(1 if summary.refused else 0)


def replay(
    file: Annotated[Path, typer.Argument(
        help="Requests (.jsonl), or with --contract a CSV or Parquet file or a folder of `hafnium simulate`.", show_default=False)],
    url: Annotated[str, typer.Option(help="The gateway's address, as `hafnium up` prints it.", show_default=False)],
    contract: Annotated[
        Path | None, typer.Option(help="Makes requests of a table's rows, in the order of their time.", show_default=False)] = None,
    since: Since = None, until: Until = None,
    rate: Annotated[float, typer.Option(help="Requests per second.", min=0.01, max=100_000)] = 100.0,
    duration: Annotated[
        float | None, typer.Option("--for", parser=parse_seconds, metavar="DURATION", show_default=False,
                                   help="Stop after this; without it after the last request.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Begin anew at the end, under other ids, until Ctrl-C.")] = False,
    workers: Annotated[int, typer.Option(help="Requests in flight at most.", min=1, max=10_000)] = 64,
    as_json: Json = False,
) -> None:
    """Traffic: sends score requests at a steady rate, each until it is answered.

    Exit status: 0 every request was answered with a score; 1 some were lost, refused, failed or repeat an id (not sent); 2 wrong input.

    Example: hafnium replay --url http://127.0.0.1:8080 --contract examples/unified-risk/contract.yaml build/simulated --since 2026-02-24
    """
    import asyncio
    import tempfile

    from hafnium_local.replay import again_and_again, read_requests, stop_event
    from hafnium_local.replay import replay as run

    if contract is None and (since is not None or until is not None):
        raise InputError("--since and --until need --contract, which says which column is the time")
    with tempfile.TemporaryDirectory(prefix="hafnium-replay-") as folder:
        requests = file
        if contract is not None:
            from hafnium_training.replay_requests import score_requests

            requests = Path(folder) / "requests.jsonl"
            with requests.open("w", encoding="utf-8") as f:
                for row in score_requests(load_contract(contract), file, start=since, end=until):
                    f.write(json.dumps(row) + "\n")
            if requests.stat().st_size == 0:
                raise InputError(f"{file}: has no row{' between --since and --until' if since or until else ''}")
        rows = again_and_again(requests) if again else read_requests(requests)
        ERR.print(f"sending to {url} at {rate:g}/s; Ctrl-C ends it", markup=False)
        with stop_event() as stop:
            found = asyncio.run(run(
                rows, url, rate_per_s=rate, workers=workers, journal=Path(folder) / "journal", duration_s=duration, stop=stop,
            ))
    if as_json:
        print_json(found.as_json())
    else:
        typer.echo(
            f"{found.answered} answered ({found.ok} scored, {found.refused} refused, {found.failed} failed), "
            f"{found.lost + found.unanswered} without an answer; "
            + (f"{found.repeated} not sent, their request_id came before; " if found.repeated else "")
            + f"p50 {found.p50_ms or 0:.1f} ms, p99 {found.p99_ms or 0:.1f} ms; "
            + ", ".join(f"{n} by {v}" for v, n in sorted(found.by_version.items()))
        )
        if found.last_error:
            ERR.print(f"last error: {found.last_error}", markup=False)
    raise typer.Exit(0 if found.ok and found.ok == found.answered and not found.lost + found.unanswered + found.repeated else 1)
