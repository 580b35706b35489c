"""The command line itself: what it lists, how it starts, how it ends."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest

from muai_config import ConfigError, Problem
from muai_producers.cli import registry
from muai_producers.cli.main import muai, run
from muai_producers.errors import QueueFullError

ROOT = Path(__file__).parents[2]
REGISTERED = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["muai.commands"]


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> dict[str, BaseException]:
    """What the command `status` raises, under "error"."""
    box: dict[str, BaseException] = {}

    @click.command()
    def fail() -> None:
        raise box["error"]

    monkeypatch.setattr(type(muai), "get_command", lambda *_: fail)
    monkeypatch.delenv("MUAI_LOG_LEVEL", raising=False)
    return box


def test_Given_the_source_tree_Then_its_commands_are_those_of_the_distribution() -> None:
    assert dict(registry.command_targets()) == REGISTERED


@pytest.mark.parametrize("name", sorted(REGISTERED))
def test_Given_a_registered_command_Then_it_loads_and_has_a_summary(name: str) -> None:
    command = muai.get_command(click.Context(muai), name)
    assert isinstance(command, click.Command)
    assert command.name == name
    assert registry.summary(REGISTERED[name])


def test_Given_help_Then_nothing_heavy_is_imported() -> None:
    code = (
        "import sys, json; from muai_producers.cli.main import run; status = run(['--help']);"
        "print(json.dumps([status, sorted(sys.modules)]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=child_env())
    *listing, last = done.stdout.splitlines()
    status, modules = json.loads(last)
    assert status == 0
    for name in REGISTERED:
        assert any(line.startswith(f"  {name} ") for line in listing)
    assert not {"pydantic", "redis", "celery", "kombu", "rich", "torch", "msgspec"} & set(modules)


def child_env() -> dict[str, str]:
    return {"PYTHONPATH": ":".join(str(ROOT / part) for part in ("config", "producers", "batching", "workers"))}


def test_Given_an_error_of_ours_Then_it_is_one_line_with_its_code(
    failing: dict[str, BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    failing["error"] = QueueFullError("full:\n100 of 100")
    assert run(["status"]) == 1
    assert capsys.readouterr().err == "queue_full: full: 100 of 100\n"


def test_Given_a_wrong_configuration_Then_its_lines_are_printed(
    failing: dict[str, BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    failing["error"] = ConfigError([Problem("a", "is wrong"), Problem("b", "too")])
    assert run(["status"]) == 2
    assert capsys.readouterr().err == "a: is wrong\nb: too\n"


def test_Given_a_missing_extra_Then_its_installation_is_named(
    failing: dict[str, BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    failing["error"] = ModuleNotFoundError("no", name="flower.command")
    assert run(["status"]) == 1
    assert capsys.readouterr().err == "this needs flower, which is not installed: pip install 'muai[monitoring]'\n"


def test_Given_a_module_of_nobodys_missing_Then_the_fault_is_not_hidden(failing: dict[str, BaseException]) -> None:
    failing["error"] = ModuleNotFoundError("no", name="muai_typo")
    with pytest.raises(ModuleNotFoundError):
        run(["status"])


@pytest.mark.parametrize(
    ("error", "status"),
    [(KeyboardInterrupt(), 130), (click.UsageError("no"), 2), (SystemExit(7), 7), (SystemExit(), 0)],
)
def test_Given_how_a_command_ends_Then_the_exit_status_says_so(
    failing: dict[str, BaseException], error: BaseException, status: int
) -> None:
    failing["error"] = error
    assert run(["status"]) == status


def test_Given_an_unknown_command_Then_it_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["frobnicate"]) == 2
    assert "frobnicate" in capsys.readouterr().err


def test_Given_extras_named_by_the_command_line_Then_they_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(registry.EXTRA_BY_MODULE.values()) <= set(extras)
