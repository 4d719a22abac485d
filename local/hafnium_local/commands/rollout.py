"""`hafnium rollout …`: what is asked of the rollout controller, and what it says."""

from __future__ import annotations

import getpass
import time
from pathlib import Path
from typing import Annotated

import typer

from hafnium_local.commands.arguments import DEFAULT_STATE, Json, State
from hafnium_local.console import print_json
from hafnium_rollout import commands
from hafnium_rollout.objects import load_rollout

app = typer.Typer(
    no_args_is_help=True,
    help="Bring a model in step by step. These commands move no traffic: they ask, and the controller, which has the rules, acts.",
)
Name = Annotated[str, typer.Argument(help="The rollout's name: the model's.", show_default=False)]
Reason = Annotated[str, typer.Option(help="Kept in the history.")]


@app.command()
def check(file: Annotated[Path, typer.Argument(help="A ModelRollout (YAML).", show_default=False)]) -> None:
    """Is the file as it should be? Each problem comes with its line. Exit status: 0 yes, 2 no.

    Example: hafnium rollout check v2.yaml
    """
    found = load_rollout(file)
    steps = ", ".join("shadow" if s.shadow else f"{s.weight} %" for s in found.spec.strategy.steps)
    typer.echo(f"{file}: valid; {found.name} {found.spec.model.version}: {steps}; gates: {', '.join(g.name for g in found.spec.gates)}")


@app.command()
def apply(file: Annotated[Path, typer.Argument(help="A ModelRollout (YAML).", show_default=False)], state: State = DEFAULT_STATE) -> None:
    """Makes this ModelRollout the wanted one; a running `hafnium up` begins with it at once.

    Example: hafnium rollout apply v2.yaml
    """
    typer.echo(commands.apply(state, file))


@app.command()
def status(
    name: Annotated[str | None, typer.Argument(help="Only this one.", show_default=False)] = None,
    state: State = DEFAULT_STATE, as_json: Json = False,
) -> None:
    """Where each rollout stands, what each gate says, and why nothing moves.

    Example: hafnium rollout status
    """
    if as_json:
        print_json(commands.status(state, name))
    else:
        typer.echo(commands.status_table(state, name))


@app.command()
def watch(name: Name, state: State = DEFAULT_STATE) -> None:
    """One line per event until the rollout has ended. Exit status: 0 promoted, 1 rolled back.

    Example: hafnium rollout watch unified-risk
    """
    for point in commands.watch(state, name, time.sleep):
        typer.echo(commands.event_line(point))
    raise typer.Exit(0 if commands.read_status(state, name).phase == "Promoted" else 1)


@app.command()
def promote(name: Name, state: State = DEFAULT_STATE, reason: Reason = "") -> None:
    """Asks for 100 % now: steps are not waited for, Safety gates and approvals still are.

    Example: hafnium rollout promote unified-risk --reason "approved in CHG-1234"
    """
    typer.echo(commands.promote(state, name, reason))


@app.command()
def skip(name: Name, state: State = DEFAULT_STATE, reason: Reason = "") -> None:
    """Asks for the next step without this one's verdict.

    Example: hafnium rollout skip unified-risk
    """
    typer.echo(commands.skip(state, name, reason))


@app.command()
def abort(name: Name, state: State = DEFAULT_STATE, reason: Reason = "") -> None:
    """Asks to take the candidate back; its digest is remembered as rejected.

    Example: hafnium rollout abort unified-risk --reason "wrong training data"
    """
    typer.echo(commands.abort(state, name, reason))


@app.command()
def retry(name: Name, state: State = DEFAULT_STATE, reason: Reason = "") -> None:
    """Lets a paused rollout go on, or a rejected digest try again.

    Example: hafnium rollout retry unified-risk
    """
    typer.echo(commands.retry(state, name, reason))


@app.command()
def approve(
    name: Name,
    stage: Annotated[str, typer.Option(help="Which of the required approvals: validation, security, …", show_default=False)],
    state: State = DEFAULT_STATE,
) -> None:
    """Approves the rollout's model for a stage, in the name of who is logged in.

    On one machine this is a note: whoever can write the state folder can write an approval. On a cluster it is authenticated.

    Example: hafnium rollout approve unified-risk --stage validation
    """
    typer.echo(commands.approve(state, name, stage, getpass.getuser()))
