"""A Feast repo folder: made from a contract and data, applied, opened, copied.

The folder is the store: registry, online values (unless in Redis) and sources lie in it, so a copy of it is another store. The
registry keeps absolute paths of the sources, since Feast's duckdb store wants them; a folder that was moved or copied is
noticed by that and applied again before its sources are read.
"""

from __future__ import annotations

import importlib.util
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from hafnium_contract.errors import InputError
from hafnium_contract.feast_config import read_feast_config
from hafnium_contract.lean_imports import without
from hafnium_contract.model_contract import ModelContract
from hafnium_contract.progress import Progress, Silent
from hafnium_training.feature_store.definitions import (
    CONFIG,
    DEFINITIONS,
    ONLINE,
    REGISTRY,
    SOURCES,
    definitions_text,
    feature_store_yaml,
    project_name,
    service_name,
    view_specs,
)
from hafnium_training.feature_store.sources import view_table, write_source

CONTRACT = "contract.yaml"
"""The contract that the folder was made from: on a cluster the materialising job has the folder and nothing else."""
MATERIALISED = "materialised.json"
"""Up to which moment the online store was filled: going back in time has to empty it first."""


@dataclass(frozen=True)
class FeatureRepo:
    """A repo folder that fits a contract."""

    path: Path
    project: str
    service: str
    views: tuple[str, ...]
    """Empty for a contract without views: then there is no registry and nothing to look up."""
    online: str
    """`sqlite` or `redis`."""


def write_repo(
    contract: ModelContract, data: Path, repo: Path, *, redis: str | None = None, progress: Progress | None = None,
) -> FeatureRepo:
    """Makes (or makes anew) the repo folder from the contract and the views' data, and applies it.

    `data`: a folder with one file per view, or one flat file. An earlier registry and SQLite online store in the folder
    are removed: their values would belong to other definitions. Raises InputError when the data lacks what the views need.
    """
    listener = progress or Silent()
    specs = view_specs(contract)
    if repo.exists() and any(repo.iterdir()) and not (repo / CONFIG).is_file():
        raise InputError(f"{repo}: holds other things than a feature repo; choose an empty folder")
    listener.stage("features", len(specs) + 1)
    tables = {}
    for spec in specs:  # all are read before anything is written, so bad data leaves an earlier repo whole
        tables[spec.view.name] = view_table(contract, spec, data)
        listener.advance()
    repo.mkdir(parents=True, exist_ok=True)
    # first, since it marks the folder as ours: whoever is killed further down finds a folder that it may write again
    (repo / CONFIG).write_text(feature_store_yaml(contract, redis=redis), encoding="utf-8")
    (repo / SOURCES).mkdir(exist_ok=True)
    for name in (REGISTRY, ONLINE, f"{ONLINE}-journal", MATERIALISED):
        (repo / name).unlink(missing_ok=True)
    for name, table in tables.items():
        write_source(repo / SOURCES / f"{name}.parquet", table)
    (repo / DEFINITIONS).write_text(definitions_text(contract), encoding="utf-8")
    said = yaml.safe_dump(contract.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True)
    (repo / CONTRACT).write_text(said, encoding="utf-8")
    found = apply(contract, repo)
    listener.advance()
    if not specs:
        listener.event(f"contract {contract.name} has no views: nothing to look up, requests carry all features")
    return found


def apply(contract: ModelContract, repo: Path) -> FeatureRepo:
    """Registers the folder's definitions with Feast (as `feast apply` does) and makes the online tables."""
    if view_specs(contract):
        _apply_definitions(repo)
    return open_repo(contract, repo)


def open_repo(contract: ModelContract, repo: FeatureRepo | Path) -> FeatureRepo:
    """Checks that the folder is a repo that serves this contract. Raises InputError that says what to do when not."""
    path = repo.path if isinstance(repo, FeatureRepo) else repo
    again = "run `hafnium features apply` for this contract"
    try:
        config: Any = yaml.safe_load((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as e:
        raise InputError(f"{path / CONFIG}: can't be read ({type(e).__name__}); {again}") from e
    specs = view_specs(contract)
    found = config.get("project") if isinstance(config, dict) else None
    if found != project_name(contract):
        raise InputError(f"{path}: is the repo of {found!r}, the contract is {project_name(contract)!r}'s; {again}")
    if specs:
        _check_registry(contract, path, again)
    online = str(config.get("online_store", {}).get("type", ""))
    return FeatureRepo(path, project_name(contract), service_name(contract), tuple(s.view.name for s in specs), online)


def fresh_copy(repo: FeatureRepo | Path, target: Path) -> Path:
    """Copies a repo folder as a store of its own, and returns the target. The target must not exist.

    Refused for a repo with Redis: both would write the same keys.
    """
    path = repo.path if isinstance(repo, FeatureRepo) else repo
    if not (path / CONFIG).is_file():
        raise InputError(f"{path}: is no feature repo ({CONFIG} is missing)")
    config: Any = yaml.safe_load((path / CONFIG).read_text(encoding="utf-8"))
    if config.get("online_store", {}).get("type") == "redis":
        raise InputError(f"{path}: its values are in Redis, which a copy would share; write another repo instead")
    if target.exists():
        raise InputError(f"{target}: exists already; choose a folder that does not")
    staging = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(path, staging, ignore=shutil.ignore_patterns("__pycache__", "*.tmp"))
    if (staging / REGISTRY).is_file():
        _apply_definitions(staging)
    staging.rename(target)  # last: a target is whole; `open_store` sees that the sources have moved
    return target


def open_store(repo: Path) -> Any:
    """A feast.FeatureStore with its own view of the registry, whose sources lie in this very folder."""
    store = _store(repo)
    here = str((repo / SOURCES).resolve())
    if any(not str(source.path).startswith(here + "/") for source in store.list_data_sources()):
        _apply_definitions(repo)
        store = _store(repo)
    return store


def _store(repo: Path) -> Any:
    with without("torch"):
        from feast import FeatureStore

    read_feast_config(repo / CONFIG)  # what Feast says about a file that is no YAML quotes it, and a password may be in it
    # Feast logs each step of what it does at INFO and deprecations of its own at WARNING.
    logging.getLogger("feast").setLevel(logging.ERROR)
    return FeatureStore(repo_path=str(repo.resolve()))


def _apply_definitions(repo: Path) -> None:
    """Not Feast's command: that changes the working directory of the process and prints."""
    with without("torch"):
        from feast import Entity, FeatureService, FeatureView

    module = _load(repo / DEFINITIONS)
    store = _store(repo)
    objects = [v for v in vars(module).values() if isinstance(v, Entity | FeatureView | FeatureService)]
    store.apply(objects)


def _load(file: Path) -> ModuleType:
    # Each repo has a module of the same name: it is made anew and never put into sys.modules.
    spec = importlib.util.spec_from_file_location("hafnium_feature_definitions", file)
    if spec is None or spec.loader is None or not file.is_file():
        raise InputError(f"{file}: can't be read; run `hafnium features apply`")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _check_registry(contract: ModelContract, path: Path, again: str) -> None:
    with without("torch"):
        from feast.errors import FeastObjectNotFoundException

    if not (path / REGISTRY).is_file():
        raise InputError(f"{path}: has no {REGISTRY}; {again}")
    store = _store(path)
    for spec in view_specs(contract):
        try:
            view = store.get_feature_view(spec.view.name)
        except FeastObjectNotFoundException as e:
            raise InputError(f"{path}: has no view {spec.view.name}; {again}") from e
        missing = sorted(set(spec.columns) - {f.name for f in view.features})
        if missing:
            raise InputError(f"{path}: view {spec.view.name} has no field {', '.join(missing)}; {again}")
