"""`kubectl hafnium …`: the rollout verbs, on the cluster that kubectl would take. kubectl finds a program of this name on the PATH."""

from __future__ import annotations

import typer

from hafnium_local.__main__ import guarded
from hafnium_local.commands import rollout
from hafnium_local.commands.places import DEFAULTS, Context, Kubeconfig, Namespace

app = typer.Typer(
    name="kubectl hafnium", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Where rollouts stand, and what people ask of them. They are brought in with `kubectl apply`.",
)
VERBS = (rollout.status, rollout.watch, rollout.plan, rollout.replay, rollout.report, rollout.promote, rollout.skip, rollout.abort,
         rollout.retry, rollout.approve, rollout.check)
for _verb in VERBS:
    app.command()(_verb)


@app.callback()
def place(namespace: Namespace = None, context: Context = None, kubeconfig: Kubeconfig = None) -> None:
    """Takes the options before the verb, too, as kubectl does."""
    DEFAULTS.namespace, DEFAULTS.context, DEFAULTS.kubeconfig = namespace, context, kubeconfig


def main() -> None:
    """Entry point `kubectl-hafnium`."""
    DEFAULTS.cluster = True
    guarded(lambda: app(prog_name="kubectl hafnium"))


if __name__ == "__main__":
    main()
