"""Where rollouts are: in the state folder of this machine, or in a namespace of a cluster. The same options for every verb."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from hafnium_local.commands.arguments import DEFAULT_STATE
from hafnium_rollout.stores import FolderStore, RolloutStore

StateHere = Annotated[Path | None, typer.Option(
    "--state", help=f"State folder of `hafnium up` \\[default: {DEFAULT_STATE}, unless a cluster is asked for].", show_default=False)]
Namespace = Annotated[str | None, typer.Option(
    "--namespace", "-n", help="On a cluster: this namespace \\[default: the context's].", show_default=False)]
Context = Annotated[str | None, typer.Option(help="On a cluster: this context of the kubeconfig.", show_default=False)]
Kubeconfig = Annotated[Path | None, typer.Option(
    help="On a cluster: this file of credentials \\[default: KUBECONFIG, ~/.kube/config].", show_default=False)]


@dataclass
class Defaults:
    """What the kubectl plugin sets before the verb is known."""

    cluster: bool = False
    namespace: str | None = None
    context: str | None = None
    kubeconfig: Path | None = None


DEFAULTS = Defaults()


def store_from(state: Path | None, namespace: str | None, context: str | None, kubeconfig: Path | None) -> RolloutStore:
    """The folder, unless one of the cluster's options was given. KUBECONFIG alone is no wish: it is set all day long.

    Raises BadParameter when both were asked for, InputError without credentials.
    """
    d = DEFAULTS
    namespace, context, kubeconfig = namespace or d.namespace, context or d.context, kubeconfig or d.kubeconfig
    asked = namespace is not None or context is not None or kubeconfig is not None
    if state is not None and asked:
        raise typer.BadParameter("give --state for this machine, or --namespace, --context, --kubeconfig for a cluster, not both")
    if state is not None or not (asked or d.cluster):
        return FolderStore(state or DEFAULT_STATE)
    # Only here: one machine needs neither the package nor the second that it takes to load.
    from hafnium_rollout.kubernetes.client import connect, current_namespace
    from hafnium_rollout.kubernetes.store import KubernetesStore

    kubectl = shlex.join(["kubectl", *_options(context=context, kubeconfig=kubeconfig)])
    return KubernetesStore(
        connect(kubeconfig=kubeconfig, context=context), namespace or current_namespace(kubeconfig, context), kubectl=kubectl)


def command_line(
    *words: str, state: Path | None, namespace: str | None, context: str | None, kubeconfig: Path | None,
) -> str:
    """The command as a person types it again, at the same place: for errors that say what to do."""
    d = DEFAULTS
    program = ["kubectl", "hafnium"] if d.cluster else ["hafnium", "rollout"]
    place = _options(state=state, namespace=namespace or d.namespace, context=context or d.context, kubeconfig=kubeconfig or d.kubeconfig)
    return shlex.join([*program, *words, *place])


def _options(**given: str | Path | None) -> list[str]:
    return [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]
