"""Feast's feature_store.yaml with its variables filled in, read so that no error shows what was filled in.

A password comes in by a variable (`${HAFNIUM_REDIS}`) and is text among text from then on: YAML's errors quote the line, pydantic's the
value, and Feast splits the connection string at each comma, so that the rest of a password is a host or an option's name to it.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import ValidationError

from hafnium_contract.errors import InputError

_FIELD = "online_store.connection_string"
_USUAL = "db, ssl, username, password"
_COMMA = "If it is the rest of the password: Feast splits at commas, so a password can't have one; take one of letters and digits"


def read_feast_config(file: Path) -> dict[str, Any]:
    """What Feast would read. Raises InputError, without a line of the text: its variables hold passwords."""
    try:
        found: Any = yaml.safe_load(os.path.expandvars(file.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{file}: not a Feast configuration: {e}") from e
    except yaml.YAMLError as e:
        said = "can't be read as YAML"
        if isinstance(e, yaml.MarkedYAMLError) and e.problem_mark is not None:
            said = f"line {e.problem_mark.line + 1}: {e.problem}"
        # from None: a traceback would show what this doesn't
        raise InputError(f"{file}: not a Feast configuration with its variables filled in: {said}") from None
    if not isinstance(found, dict):
        raise InputError(f"{file}: not a Feast configuration: expected a mapping, got {type(found).__name__}")
    return cast(dict[str, Any], found)


def without_values(e: Exception) -> str:
    """What an error of Feast's configuration says, without the values that it says it of."""
    if not isinstance(e, ValidationError):
        return str(e)
    said: list[str] = []
    for error in e.errors(include_url=False, include_input=False):
        inner = error.get("ctx", {}).get("error")  # of the online store, inside a validator of all
        if isinstance(inner, ValidationError):
            said.append(without_values(inner))
        else:
            said.append(f"{'.'.join(str(at) for at in error['loc'])}: {error['msg']}")
    return "; ".join(said)


def single_redis(config: dict[str, Any]) -> str | None:
    """The connection string of an online store that is one Redis; None for another store, Redis Cluster and Sentinel."""
    online: Any = config.get("online_store")
    if not isinstance(online, dict):
        return None
    given = cast(dict[str, Any], online)
    if given.get("type") != "redis" or str(given.get("redis_type", "redis")) != "redis":
        return None
    return str(given.get("connection_string", "localhost:6379"))


def check_redis(config: dict[str, Any]) -> None:
    """Raises InputError when Feast's client would take a part of the password for something else: its own error quotes that part.

    Where Redis' client is installed, which Feast needs for that store.
    """
    connection_string = single_redis(config)
    if connection_string is not None:
        from redis import Redis

        split_connection(connection_string, list(inspect.signature(Redis).parameters))


def split_connection(text: str, known: Collection[str]) -> tuple[str, int, dict[str, str]]:
    """`HOST:PORT,name=value,…` of a single Redis, split as Feast does it: host, port, options. `known`: names of options.

    Raises InputError that shows no value, and nothing of what stands behind a password: it may be the rest of it.
    """
    parts = text.split(",")
    places = [i for i, part in enumerate(parts) if part.startswith("password=")]
    before, behind = (parts[: places[0] + 1], parts[places[0] + 1 :]) if places else (parts, [])
    if any(part.partition("=")[0] not in known or "=" not in part for part in behind):
        raise InputError(f"{_FIELD}: expected HOST:PORT with {_USUAL}, got something else behind password=. {_COMMA}")
    nodes = [part for part in before if "=" not in part]
    options: dict[str, str] = dict(part.split("=", 1) for part in (*before, *behind) if "=" in part)
    unknown = sorted(set(options) - set(known))
    host, _, port = (nodes or [""])[0].rpartition(":")
    if unknown or len(nodes) != 1 or not port.isdigit() or not host:
        raise InputError(
            f"{_FIELD}: expected HOST:PORT with {_USUAL}, got {len(nodes)} nodes"
            f"{' and ' + ', '.join(unknown) if unknown else ''}"
        )
    return host, int(port), options
