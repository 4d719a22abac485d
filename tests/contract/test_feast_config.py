"""Feast's configuration holds a password by the time it is read: whatever is wrong with it is said without it."""

from __future__ import annotations

from pathlib import Path

import pytest
from feast.repo_config import RepoConfig
from pydantic import ValidationError

from hafnium_contract.errors import InputError
from hafnium_contract.feast_config import check_redis, read_feast_config, single_redis, split_connection, without_values

KNOWN = ("db", "ssl", "username", "password")
TEXT = "project: p\nregistry: r\nprovider: local\nonline_store:\n  type: redis\n  connection_string: ${HAFNIUM_REDIS}\n"


@pytest.mark.parametrize("given", [
    "redis:6379,password=s3cret,0ther", "redis:6379,password=s3cret,n4me=v4lue", "redis:6379,db=1,password=s3cret,,ssl=true",
    "redis:6379,password=s3cret,0ther:6379", "redis:6379,password=s3cret,username",
])
def test_a_password_with_a_comma_is_named_as_such_and_not_shown(given: str) -> None:
    with pytest.raises(InputError, match=r"something else behind password=\. .*splits at commas") as e:
        split_connection(given, KNOWN)
    assert not any(part in str(e.value) for part in ("s3cret", "0ther", "n4me", "v4lue"))


@pytest.mark.parametrize(("given", "expected"), [
    ("redis:6379", ("redis", 6379, {})),
    ("redis:6379,password=", ("redis", 6379, {"password": ""})),
    ("redis:6379,password=p=q,db=2,ssl=true", ("redis", 6379, {"password": "p=q", "db": "2", "ssl": "true"})),
    ("password=p,db=2", None), ("a:1,b:2", None), ("redis", None), ("redis:6379,unknown=1", None),
])
def test_connection_strings_are_split_as_feast_does(given: str, expected: tuple[str, int, dict[str, str]] | None) -> None:
    if expected is not None:
        assert split_connection(given, KNOWN) == expected
        return
    with pytest.raises(InputError, match="expected HOST:PORT"):
        split_connection(given, KNOWN)


def test_what_feasts_client_knows_is_let_through_and_other_stores_are_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check_redis({"online_store": {"type": "redis", "connection_string": "redis:6379,password=p,socket_timeout=1"}})
    with pytest.raises(InputError, match="splits at commas"):
        check_redis({"online_store": {"type": "redis", "connection_string": "redis:6379,password=p,socket=1"}})
    for other in ({}, {"online_store": "sqlite"}, {"online_store": {"type": "sqlite"}},
                  {"online_store": {"type": "redis", "redis_type": "redis_cluster", "connection_string": "a:1,b:2,password=p,q"}}):
        assert single_redis(other) is None
        check_redis(other)
    (tmp_path / "f.yaml").write_text(TEXT)
    monkeypatch.setenv("HAFNIUM_REDIS", "redis:6379,password=p")
    assert single_redis(read_feast_config(tmp_path / "f.yaml")) == "redis:6379,password=p"


@pytest.mark.parametrize("password", ["s3cret: x", 's3cret"\n: [', "s3cret\n  - y"], ids=["colon", "quotes", "lines"])
def test_a_password_that_is_no_text_to_yaml_is_not_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, password: str) -> None:
    monkeypatch.setenv("HAFNIUM_REDIS", f"redis:6379,password={password}")
    (tmp_path / "f.yaml").write_text(TEXT)
    with pytest.raises(InputError, match=r"f\.yaml: not a Feast configuration with its variables filled in: line \d+") as e:
        read_feast_config(tmp_path / "f.yaml")
    assert "s3cret" not in str(e.value)
    assert e.value.__suppress_context__, "its traceback would quote the line"


def test_what_feast_refuses_is_said_without_its_values() -> None:
    wrong = {"type": "redis", "connection_string": ["redis:6379,password=s3cret"], "redis_type": "s3cret"}
    with pytest.raises(ValidationError) as e:
        RepoConfig(project="p", registry="r", provider="local", online_store=wrong)
    assert "s3cret" in str(e.value), "else there is nothing to hide"
    said = without_values(e.value)
    assert "s3cret" not in said
    assert "connection_string" in said
    assert "redis_type" in said
    assert without_values(ValueError("else")) == "else"
