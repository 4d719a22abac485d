"""`hafnium simulate` and `hafnium features …`."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hafnium_contract.contract_file import load_contract
from hafnium_contract.model_contract import ModelContract
from hafnium_local.commands.arguments import Contract, Json, Repo, Seed, parse_time
from hafnium_local.console import Bars, print_json

if TYPE_CHECKING:
    from hafnium_training.feature_store import JoinReport, MaterialiseReport

features = typer.Typer(
    no_args_is_help=True,
    help="Feast, from the contract: definitions, point-in-time join, online store. `build` does all three.",
)
Data = Annotated[Path, typer.Option(help="Folder from `hafnium simulate`, or a CSV or Parquet file.", show_default=False)]
Table = Annotated[Path, typer.Option(help="The training table to write (.parquet or .csv).", show_default=False)]
AllowMissing = Annotated[
    bool, typer.Option("--allow-missing", help="Write the table also when a looked-up feature has no value on any row."),
]
Until = Annotated[
    datetime, typer.Option(parser=parse_time, metavar="TIME", show_default=False,
                           help="The online store holds what was known at this time: 2026-01-31 or 2026-01-31T12:00:00Z."),
]


def simulate(
    out: Annotated[Path, typer.Option(help="Folder to write to.", show_default=False)],
    days: Annotated[int, typer.Option(help="Days of transactions.", min=1)] = 60,
    seed: Seed = 7,
    transactions_per_day: Annotated[int, typer.Option(help="On average.", min=1)] = 2_000,
    as_json: Json = False,
) -> None:
    """Transactions of a card issuer: customers, terminals, three fraud scenarios, labels that arrive weeks late.

    Writes transactions.parquet, one file of daily values per feature view, and summary.json. The same seed gives the same bytes.

    Example: hafnium simulate --out build/simulated --days 60 --seed 7
    """
    from hafnium_training.simulation import simulate as run

    with Bars() as bars:
        summary = run(out, days=days, seed=seed, transactions_per_day=transactions_per_day, progress=bars)
    if as_json:
        print_json(asdict(summary))
    else:
        typer.echo(f"{out}: {summary.transactions} transactions of {days} days, {summary.frauds} frauds ({summary.fraud_share:.2%})")


@features.command()
def apply(contract: Contract, data: Data, repo: Repo, redis: Annotated[
    str | None, typer.Option(help="HOST:PORT of a Redis as the online store, instead of SQLite.", show_default=False)] = None,
) -> None:
    """Writes a Feast repo whose definitions come from the contract, and registers them.

    Example: hafnium features apply --contract C.yaml --data build/simulated --repo build/features
    """
    from hafnium_training.feature_store import write_repo

    with Bars() as bars:
        made = write_repo(load_contract(contract), data, repo, redis=redis, progress=bars)
    typer.echo(f"{made.path}: Feast repo, ready for join and materialise")


@features.command()
def join(
    contract: Contract, data: Data, repo: Repo, out: Table, allow_missing: AllowMissing = False, as_json: Json = False,
) -> None:
    """The training table: each transaction with the values that were known at its time, and no row lost.

    A looked-up feature without a single value is refused: mostly the keys of the two files differ.

    Example: hafnium features join --contract C.yaml --data build/simulated --repo build/features --out build/training.parquet
    """
    from hafnium_training.feature_store import join as run

    with Bars() as bars:
        report = run(load_contract(contract), repo, data, out, progress=bars, allow_missing=allow_missing)
    _tell_join(report, out, as_json)


@features.command()
def materialise(contract: Contract, repo: Repo, until: Annotated[
    datetime | None, typer.Option(parser=parse_time, metavar="TIME", show_default=False,
                                  help="The online store holds what was known at this time; now without it.")] = None, since: Annotated[
    datetime | None, typer.Option(parser=parse_time, metavar="TIME", show_default=False,
                                  help="Go on from an earlier --until: only newer values are written.")] = None,
    as_json: Json = False,
) -> None:
    """Fills the online store with the newest values at a moment: what a request at that time would find.

    Example: hafnium features materialise --contract C.yaml --repo build/features --until 2026-02-24
    """
    from hafnium_training.feature_store import materialise as run

    with Bars() as bars:
        report = run(load_contract(contract), repo, until=until or datetime.now(UTC), since=since, progress=bars)
    if as_json:
        print_json(asdict(report))
    else:
        _tell_store(report, repo)


@features.command()
def copy(repo: Repo, out: Annotated[Path, typer.Option(help="Folder that must not exist yet.", show_default=False)]) -> None:
    """Copies a repo as a store of its own, for trying things out beside the one in use.

    Example: hafnium features copy --repo build/features --out build/features-tried
    """
    from hafnium_training.feature_store import fresh_copy

    typer.echo(f"{fresh_copy(repo, out)}: an independent copy of {repo}")


@features.command()
def build(
    contract: Contract, data: Data, repo: Repo, out: Table, until: Until, allow_missing: AllowMissing = False, as_json: Json = False,
) -> None:
    """apply, join and materialise in one go.

    Example: hafnium features build --contract C.yaml --data build/simulated --repo build/features --out build/training.parquet
    --until 2026-02-24
    """
    from hafnium_training.feature_store import join as run_join
    from hafnium_training.feature_store import materialise as run_materialise
    from hafnium_training.feature_store import write_repo

    parsed: ModelContract = load_contract(contract)
    with Bars() as bars:
        write_repo(parsed, data, repo, progress=bars)
        joined = run_join(parsed, repo, data, out, progress=bars, allow_missing=allow_missing)
        stored = run_materialise(parsed, repo, until=until, progress=bars)
    _tell_join(joined, out, as_json)
    if not as_json:
        _tell_store(stored, repo)


def _tell_join(report: JoinReport, out: Path, as_json: bool) -> None:
    if as_json:
        print_json(asdict(report))
        return
    missing = {name: share for name, share in report.missing.items() if share > 0}
    text = ", ".join(f"{name} {share:.1%}" for name, share in sorted(missing.items(), key=lambda x: -x[1])[:5])
    typer.echo(f"{out}: {report.rows_in} rows in, {report.rows_out} rows out; missing: {text or 'nothing'}")


def _tell_store(report: MaterialiseReport, repo: Path) -> None:
    what = ", ".join(f"{v.entities} of {v.view}" for v in report.views) or "nothing to look up"
    typer.echo(f"{repo}: online store as of {report.until.isoformat()}: {what}")
