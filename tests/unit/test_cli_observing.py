"""`muai flower` and `muai engines`."""

import json
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from click.testing import CliRunner

from muai_workers.cli import observing


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Celery, list[str]]]:
    """The applications that were started, each with its arguments."""
    calls: list[tuple[Celery, list[str]]] = []
    monkeypatch.setattr(Celery, "start", lambda app, argv: calls.append((app, argv)))
    return calls


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("redis://127.0.0.1:1/0", {}),
        ("sentinel://127.0.0.1:1/0?master_name=m", {"master_name": "m"}),
        ("amqp://127.0.0.1:1//", {}),
    ],
)
def test_Given_a_broker_Then_flower_reaches_it_by_a_transport_whose_queues_it_can_show(
    started: list[tuple[Celery, list[str]]], url: str, options: dict[str, Any]
) -> None:
    env = {"MUAI_BROKER_URL": url, "MUAI_REDIS_URL": "redis://127.0.0.1:1/0"}
    assert CliRunner(env=env).invoke(observing.flower, ["--port", "7777"]).exit_code == 0
    [(app, argv)] = started
    assert argv == ["flower", "--port=7777", "--address=127.0.0.1", "--logging=info"]
    connection = app.connection_for_read()
    assert connection.transport_cls == url.partition("://")[0]
    assert app.conf.broker_transport_options == options


def test_Given_a_file_with_a_login_Then_flower_asks_for_it(
    started: list[tuple[Celery, list[str]]], tmp_path: Path
) -> None:
    (tmp_path / "login").write_text("operator:s3cret\n")
    env = {"MUAI_BROKER_URL": "redis://127.0.0.1:1/0", "MUAI_MON_FLOWER_LOGIN_FILE": str(tmp_path / "login")}
    assert CliRunner(env=env | {"MUAI_MON_FLOWER_PORT": "7778"}).invoke(observing.flower, []).exit_code == 0
    [(_, argv)] = started
    assert "--basic-auth=operator:s3cret" in argv
    assert "--port=7778" in argv


@pytest.mark.parametrize("text", ["", "operator", "operator:", "a:b c", "a:b,c:d"])
def test_Given_a_file_without_a_login_Then_flower_does_not_start_open_to_all(
    started: list[tuple[Celery, list[str]]], tmp_path: Path, text: str
) -> None:
    (tmp_path / "login").write_text(text)
    env = {"MUAI_BROKER_URL": "redis://127.0.0.1:1/0", "MUAI_MON_FLOWER_LOGIN_FILE": str(tmp_path / "login")}
    result = CliRunner(env=env).invoke(observing.flower, [])
    assert result.exit_code == 2
    assert "login_file" in result.output
    assert not started


def test_Given_engines_switched_off_Then_each_says_so() -> None:
    env = {f"MUAI_OPT_{name}_ENABLED": "false" for name in ("VLLM", "DEEPSPEED", "ONNX", "PYTORCH")}
    result = CliRunner(env=env).invoke(observing.engines, ["--json"])
    assert result.exit_code == 0
    report = json.loads(result.output)
    assert set(report) == {"vllm", "deepspeed", "onnx", "pytorch"}
    assert all(not one["available"] and "switched off" in one["reason"] for one in report.values())
    table = CliRunner(env=env).invoke(observing.engines, [])
    assert "deepspeed" in table.output
