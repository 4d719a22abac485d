"""The `hafnium` command: every step of the way from data to decided traffic, each as a command of its own.

Exit statuses: 0 done; 1 the thing checked is not as it should be; 2 the input or the usage is wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import typer

from hafnium_contract.errors import HafniumError
from hafnium_local.commands import bundle, contract, crds, data, demo, drift, rollout, serve, train
from hafnium_local.console import fail

app = typer.Typer(
    name="hafnium", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich",
    help="Risk models in production on Kubernetes, kept honest. Start with [bold]hafnium demo[/bold]: the whole story on this machine.",
)
app.command()(demo.demo)
app.command()(data.simulate)
app.add_typer(data.features, name="features")
app.command()(train.train)
app.command()(serve.up)
app.command()(serve.score)
app.command()(serve.replay)
app.add_typer(drift.app, name="drift")
app.add_typer(rollout.app, name="rollout")
app.add_typer(contract.app, name="contract")
app.add_typer(bundle.app, name="bundle")
app.command()(crds.crds)


def guarded(command: Callable[[], object]) -> None:
    """Runs a command line; a HafniumError, or an extra that is not installed, becomes its message and status, never a traceback."""
    try:
        command()
    except HafniumError as e:
        fail("\n".join([str(e), *getattr(e, "__notes__", ())]))
        sys.exit(e.exit_status)
    except ModuleNotFoundError as e:
        missing = (e.name or "").split(".")[0]
        if missing.startswith("hafnium_"):
            raise
        fail(f"this command needs {missing}, which is not installed; run: pip install 'hafnium-serving[local]'")
        sys.exit(2)


def main() -> None:
    """Runs the command line."""
    guarded(app)


if __name__ == "__main__":
    main()
