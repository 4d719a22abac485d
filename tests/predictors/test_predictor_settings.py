from __future__ import annotations

from pathlib import Path

import pytest

from hafnium_contract.errors import InputError
from hafnium_predictor.__main__ import main
from hafnium_predictor.settings import Settings, parse_settings


def test_flags_win_over_the_environment_and_the_environment_over_defaults() -> None:
    env = {"HAFNIUM_MODEL_DIR": "/from/env", "HAFNIUM_HTTP_PORT": "9000", "HAFNIUM_ENABLE_GRPC": "false", "OTHER": "1"}
    settings = parse_settings(["--model_name", "risk", "--http_port", "9001"], env)
    assert (settings.model_name, settings.http_port, settings.model_dir) == ("risk", 9001, Path("/from/env"))
    assert settings.enable_grpc is False
    assert settings.grpc_port == 8081


def test_arguments_of_the_sdk_are_passed_on() -> None:
    assert parse_settings(["--max_threads=2"], {}).sdk_arguments == ("--max_threads=2",)


@pytest.mark.parametrize(("argv", "said"), [
    (["--http_port", "0"], "--http_port .*HAFNIUM_HTTP_PORT"),
    (["--http_port", "x"], "--http_port"),
    (["--model_name", "a/b"], "--model_name"),
])
def test_bad_value_is_named_with_its_flag(argv: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        parse_settings(argv, {})


def test_unknown_argument_ends_with_status_2(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["hafnium_predictor"])
    assert main(["--modell_dir", "/x"]) == 2
    assert "--modell_dir" in capsys.readouterr().err
    assert main(["--http_port", "99999"]) == 2


def test_every_setting_is_documented() -> None:
    assert [n for n, f in Settings.model_fields.items() if not f.description] == []
