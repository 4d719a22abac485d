"""`hafnium demo`."""

from __future__ import annotations

import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from hafnium_contract.errors import InputError
from hafnium_local.commands.arguments import Json, Port, Seed
from hafnium_local.console import ERR, OUT, print_json
from hafnium_local.demo.plan import FAULTS, DemoOptions, FaultKind

DEFAULT_CONTRACT = Path("examples/unified-risk/contract.yaml")
PACKAGED = Path(__file__).parents[1] / "demo" / "unified-risk.yaml"
"""The same file in an installed wheel, for whoever has no checkout."""


def _fault(text: str) -> str:
    if text not in FAULTS:
        raise typer.BadParameter(f"{text!r}; choose one of {', '.join(FAULTS)}")
    return text


def demo(
    contract: Annotated[
        Path | None, typer.Option(help="The model contract; without it the one of the simulated data.", show_default=False)] = None,
    data: Annotated[
        Path | None, typer.Option(help="A CSV or Parquet file for the contract; without it, data is simulated.", show_default=False)
    ] = None,
    fault: Annotated[str, typer.Option(
        callback=_fault, metavar="units|stale|slow|crash",
        help="What is wrong with v3: cents instead of units, a feed that stands still, slow answers, or a process that crashes.",
    )] = "units",
    work: Annotated[Path, typer.Option(help="Folder for everything that the demo makes; emptied first.")] = Path(".hafnium/demo"),
    days: Annotated[int, typer.Option(help="Simulated days.", min=45)] = 60,
    trials: Annotated[int, typer.Option(help="Trials of v1's search.", min=1, max=100)] = 3,
    rate: Annotated[float, typer.Option(help="Requests per second that are replayed.", min=10, max=2000)] = 100.0,
    port: Port = None,
    seed: Seed = 7,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the demo in --work after its last finished act.")] = False,
    as_json: Json = False,
    unguarded: Annotated[bool, typer.Option("--unguarded", hidden=True)] = False,
) -> None:
    """The whole story on this machine, in minutes, on real parts.

    Data is simulated (or read); Feast joins and serves features; Ray Tune and Optuna search a monotone network; v1 serves behind Envoy
    while unseen days are replayed; v2, trained on more data, is promoted through shadow, 5 %, 25 % and 100 %; v3 carries a fault that no
    offline gate sees, and traffic goes back. Ends with a table and an HTML report.

    Exit status: 0 v2 was promoted and v3 rejected for the right reason with no request lost; 1 something went differently (it says what,
    and where to look); 2 wrong input.

    Example: hafnium demo --fault crash
    """
    from hafnium_local.demo.play import INTERRUPTED, guard, inner_command, play, prepared

    if contract is None and data is not None:
        raise InputError(f"--data {data}: give --contract too: the default one describes the simulated data (docs/contracts.md)")
    if contract is None:
        contract = DEFAULT_CONTRACT if DEFAULT_CONTRACT.is_file() or not PACKAGED.is_file() else PACKAGED
    options = DemoOptions(work, contract, data, _checked(fault), days, seed, trials, rate, port)
    if not unguarded:
        arguments = sys.argv[2:]
        with prepared(options, resume=resume):
            raise typer.Exit(guard(inner_command(arguments), lambda line: ERR.print(line, markup=False)))
    # the guardian asks by SIGINT, which whoever was started in the background ignores
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        played = play(options, lambda line: ERR.print(f"• {line}", markup=False), resumed=resume)
    except KeyboardInterrupt:
        given = [a for a in sys.argv[2:] if a not in ("--unguarded", "--resume")]
        again = shlex.join([str(Path(sys.executable).with_name("hafnium")), "demo", *given, "--resume"])
        ERR.print(f"interrupted; what ran is stopped. To go on: {again}", markup=False)
        raise typer.Exit(INTERRUPTED) from None
    if as_json:
        print_json({
            "good": played.verdict.good, "wrong": list(played.verdict.wrong), "failure": played.failure, "report": str(played.report),
            "rows": {r.what: r.value for r in played.verdict.rows},
        })
    else:
        table = Table("what happened", "", box=None, pad_edge=False)
        for row in played.verdict.rows:
            style = {True: "green", False: "red", None: ""}[row.good]
            table.add_row(row.what, f"[{style}]{row.value}[/{style}]" if style else row.value)
        OUT.print()
        OUT.print(table)
        for sentence in played.verdict.wrong:
            OUT.print(f"[red]went differently:[/red] {sentence}")
        if played.failure:
            OUT.print(f"[red]ended early:[/red] {played.failure}")
        if not played.verdict.good:
            OUT.print(f"look at: {work}/story.jsonl, {work}/logs, {work}/state/logs, {work}/state/status")
        OUT.print(f"\nreport: {played.report}")
    raise typer.Exit(played.exit_status)


def _checked(fault: str) -> FaultKind:
    return next(f for f in FAULTS if f == fault)
