"""`hafnium rollout …`: what is asked of the rollout controller, and what it says."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from hafnium_contract.errors import HafniumError
from hafnium_contract.shown_text import one_line
from hafnium_contract.whole_files import write_atomically
from hafnium_local.commands.arguments import DEFAULT_STATE, Json, State, parse_seconds, parse_time
from hafnium_local.commands.places import Context, Kubeconfig, Namespace, StateHere, command_line, store_from
from hafnium_local.console import fail, print_json
from hafnium_rollout import commands
from hafnium_rollout.errors import RolloutFileError
from hafnium_rollout.objects import load_rollout
from hafnium_rollout.replay_story import Summary, ending

app = typer.Typer(
    no_args_is_help=True,
    help="Bring a model in step by step. These commands move no traffic: they ask, and the controller, which has the rules, acts.",
)
Name = Annotated[str, typer.Argument(help="The rollout's name: the model's.", show_default=False)]
Reason = Annotated[str, typer.Option(help="Kept in the history.")]


@app.command()
def check(file: Annotated[Path, typer.Argument(help="A ModelRollout (YAML).", show_default=False)], as_json: Json = False) -> None:
    """Is the file as it should be? Each problem comes with its line. Exit status: 0 yes, 1 no, 2 it can't be read.

    Example: hafnium rollout check v2.yaml
    """
    try:
        found = load_rollout(file)
    except RolloutFileError as e:
        if as_json:
            print_json({"valid": False, "file": str(file), "problems": [vars(p) for p in e.problems]})
        else:
            fail(str(e))
        raise typer.Exit(1) from e
    if as_json:
        print_json({"valid": True, "file": str(file), "name": found.name, "digest": found.spec.model.digest})
        return
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
    state: StateHere = None, namespace: Namespace = None, context: Context = None, kubeconfig: Kubeconfig = None,
    as_json: Json = False,
) -> None:
    """Where each rollout stands, what each gate says, and why nothing moves.

    Example: hafnium rollout status
    """
    store = store_from(state, namespace, context, kubeconfig)
    if as_json:
        print_json(commands.status(store, name))
    else:
        typer.echo(commands.status_table(store, name))


@app.command()
def watch(
    name: Name, state: StateHere = None, namespace: Namespace = None, context: Context = None, kubeconfig: Kubeconfig = None,
    timeout: Annotated[
        float | None, typer.Option(parser=parse_seconds, metavar="DURATION", help="Stop watching after this.", show_default=False)
    ] = None,
) -> None:
    """One line per event until the rollout of the applied model has ended.

    Exit status: 0 promoted, 1 rolled back, paused (a person has to decide: retry, skip or abort), or --timeout has passed.

    Example: hafnium rollout watch unified-risk
    """
    store = store_from(state, namespace, context, kubeconfig)
    end = None if timeout is None else time.monotonic() + timeout

    def wait(seconds: float) -> None:
        if end is not None and time.monotonic() >= end:
            phase = commands.read_status(store, name).phase
            fail(f"{name}: not ended after {timeout:g} s, it is {phase}; why: hafnium rollout status {name}")
            raise typer.Exit(1)
        time.sleep(seconds)

    for point in commands.watch(store, name, wait):
        typer.echo(commands.event_line(point))
    found = commands.read_status(store, name)
    if found.phase == "Paused":
        fail(f"{name} is paused: {one_line(found.message)} `hafnium rollout retry | skip | abort {name}`")
    wanted = commands.wanted_digest(store, name)
    if wanted in found.rejected_digests and (found.candidate is None or found.candidate.digest != wanted):
        fail(f"{name}: {wanted[:19]} was rejected before; `hafnium rollout retry {name}` lets it try again")
        raise typer.Exit(1)
    raise typer.Exit(0 if found.phase == "Promoted" else 1)


@app.command()
def plan(
    file: Annotated[Path, typer.Argument(help="A ModelRollout (YAML).", show_default=False)],
    rate: Annotated[float, typer.Option(help="Requests per second of all clients.", min=0.001, show_default=False)],
    base: Annotated[float, typer.Option(help="Share of requests that are bad today.", min=0.0, max=1.0)] = 0.001,
    regression: Annotated[float, typer.Option(help="Additional share that must not be missed.", min=0.0, max=1.0)] = 0.02,
    as_json: Json = False,
) -> None:
    """How long each step will take and what would be missed, before anything moves.

    Example: hafnium rollout plan v2.yaml --rate 100
    """
    if as_json:
        print_json(commands.plan(file, rate=rate, base=base, regression=regression))
    else:
        typer.echo(commands.plan_table(file, rate=rate, base=base, regression=regression))


@app.command()
def promote(
    name: Name, reason: Reason = "", state: StateHere = None,
    namespace: Namespace = None, context: Context = None, kubeconfig: Kubeconfig = None,
) -> None:
    """Asks for 100 % now. Steps and gates are not waited for; approvals are.

    What takes a candidate back still does: a Safety gate's Fail, or one that is blind for longer than maxBlindDuration.

    Example: hafnium rollout promote unified-risk --reason "approved in CHG-1234"
    """
    store = store_from(state, namespace, context, kubeconfig)
    typer.echo(commands.promote(store, name, reason, by=store.whoami()))


@app.command()
def skip(
    name: Name, reason: Reason = "", state: StateHere = None,
    namespace: Namespace = None, context: Context = None, kubeconfig: Kubeconfig = None,
) -> None:
    """Asks for the next step without this one's verdict.

    Example: hafnium rollout skip unified-risk
    """
    store = store_from(state, namespace, context, kubeconfig)
    typer.echo(commands.skip(store, name, reason, by=store.whoami()))


@app.command()
def abort(
    name: Name, reason: Reason = "", state: StateHere = None,
    namespace: Namespace = None, context: Context = None, kubeconfig: Kubeconfig = None,
) -> None:
    """Asks to take the candidate back; its digest is remembered as rejected.

    Example: hafnium rollout abort unified-risk --reason "wrong training data"
    """
    store = store_from(state, namespace, context, kubeconfig)
    try:
        by = store.whoami()
    except (HafniumError, KeyError, OSError, ImportError):  # an API server without SelfSubjectReview, a user without a name
        by = ""  # on a cluster the audit log knows it; an abort must not fail for that
    typer.echo(commands.abort(store, name, reason, by=by))


@app.command()
def retry(
    name: Name, reason: Reason = "", state: StateHere = None,
    namespace: Namespace = None, context: Context = None, kubeconfig: Kubeconfig = None,
) -> None:
    """Lets a paused rollout go on, or a rejected digest try again.

    Example: hafnium rollout retry unified-risk
    """
    store = store_from(state, namespace, context, kubeconfig)
    typer.echo(commands.retry(store, name, reason, by=store.whoami()))


@app.command()
def approve(
    name: Name,
    stage: Annotated[str, typer.Option(help="Which of the required approvals: validation, security, …", show_default=False)],
    digest: Annotated[str | None, typer.Option(
        metavar="HEX", show_default=False, help="Of the model that you reviewed: its first 12 hex digits or more. Required on a cluster.",
    )] = None,
    state: StateHere = None, namespace: Namespace = None, context: Context = None, kubeconfig: Kubeconfig = None,
) -> None:
    """Approves the model that you reviewed for a stage, in the name of who is logged in.

    A ModelRollout may be given another model while you read, so --digest says which one it is; without it on a cluster nothing is
    approved, and the digest, version and trainer are shown. On one machine an approval is a note: whoever can write the state folder
    can write one. On a cluster it is authenticated.

    Example: hafnium rollout approve unified-risk --stage validation --digest 3f9a0c21b7de
    """
    store = store_from(state, namespace, context, kubeconfig)
    again = command_line(
        "approve", name, "--stage", stage, state=state, namespace=namespace, context=context, kubeconfig=kubeconfig)
    typer.echo(commands.approve(store, name, stage, store.whoami(), digest, again=again))


@app.command()
def replay(
    name: Annotated[str | None, typer.Argument(help="The rollout's name; not needed with --record.", show_default=False)] = None,
    file: Annotated[
        Path | None, typer.Option(help="A ModelRollout whose gates, strategy and approvals are tried.", show_default=False)
    ] = None,
    until: Annotated[
        datetime | None, typer.Option(parser=parse_time, metavar="TIME", help="Stop there: 2026-01-31T12:00:00Z.", show_default=False)
    ] = None,
    record: Annotated[
        Path | None, typer.Option(help="A record, as a file or a folder, instead of the rollout's own.", show_default=False)
    ] = None,
    state: StateHere = None, namespace: Namespace = None, context: Context = None, kubeconfig: Kubeconfig = None,
    as_json: Json = False,
) -> None:
    """Decides again over what was recorded, turn by turn; with --file, what other rules would have decided.

    Exit status: 0, or 1 when a decision is not the one that was made (another version of Hafnium, or a changed record).

    Example: hafnium rollout replay unified-risk --file stricter.yaml
    """
    if record is None and name is None:
        raise typer.BadParameter("give the rollout's NAME, or --record")
    found = record if record is not None else commands.record_of(store_from(state, namespace, context, kubeconfig), name or "")
    other = None if file is None else load_rollout(file)
    summary = Summary()
    for line in commands.replay(found, other, until, summary, keep=as_json):
        if not as_json:
            typer.echo(line)
    if as_json:
        print_json({"exact": summary.exact, **vars(summary)})
    else:
        for line in ending(summary, "" if file is None else str(file)):
            typer.echo(line)
    raise typer.Exit(0 if summary.exact else 1)


@app.command()
def report(
    name: Annotated[str | None, typer.Argument(help="The rollout's name; not needed with --record.", show_default=False)] = None,
    out: Annotated[Path | None, typer.Option(help="Where to; NAME-rollout.html without it.", show_default=False)] = None,
    record: Annotated[
        Path | None, typer.Option(help="A record, as a file or a folder, instead of what the rollout's store has.", show_default=False)
    ] = None,
    state: StateHere = None, namespace: Namespace = None, context: Context = None, kubeconfig: Kubeconfig = None,
) -> None:
    """Writes one self-contained HTML file: what was decided, on which evidence, by whom, with a sha256 of the inputs.

    Example: hafnium rollout report unified-risk --out evidence.html
    """
    if record is None and name is None:
        raise typer.BadParameter("give the rollout's NAME, or --record")
    if record is not None:
        text = commands.report_of_record(record)
    else:
        text = commands.report(store_from(state, namespace, context, kubeconfig), name or "")
    target = out or Path(f"{name or 'recorded'}-rollout.html")
    write_atomically(target, text)
    typer.echo(f"{target}: {len(text.encode()):,} bytes")
