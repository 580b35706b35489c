"""The command line, the files that are generated from the declarations, and the files that are shipped."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from muai_config import Settings, load_settings
from muai_config.cli import config
from muai_config.render import render_example, render_reference

ROOT = Path(__file__).parents[2]
SCENARIOS = sorted((ROOT / "config/scenarios").glob("*.yaml"))


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("MUAI_")]:
        monkeypatch.delenv(name)
    return tmp_path


def invoke(*args: str, **env: str) -> Result:
    return CliRunner(env=env).invoke(config, args, catch_exceptions=False)


def test_Given_the_example_in_the_repository_Then_it_is_what_the_code_says() -> None:
    path = ROOT / "config/optimization.example.yaml"
    assert path.read_text() == render_example(), f"stale: run `muai config example --output {path}`"


def test_Given_the_reference_in_the_repository_Then_it_is_what_the_code_says() -> None:
    path = ROOT / "docs/configuration.md"
    assert path.read_text() == render_reference(), f"stale: run `muai config docs --output {path}`"


def test_Given_the_example_When_loaded_Then_it_changes_nothing() -> None:
    assert load_settings(ROOT / "config/optimization.example.yaml", {}) == Settings()


def test_Given_the_scenarios_Then_there_is_one_for_each_situation() -> None:
    names = {path.stem for path in SCENARIOS}
    assert names == {"laptop", "single-gpu", "multi-gpu", "high-throughput", "low-latency", "monitoring-only"}


@pytest.mark.parametrize("path", [ROOT / "config/optimization.yaml", *SCENARIOS], ids=lambda path: path.stem)
def test_Given_a_shipped_file_When_checked_Then_it_is_valid_and_differs_from_the_defaults(path: Path) -> None:
    result = invoke("check", str(path))
    assert result.exit_code == 0
    assert result.stdout.startswith(f"{path}: valid (")
    assert load_settings(path, {}) != Settings()


def test_Given_nothing_configured_When_checked_Then_the_summary_says_so() -> None:
    result = invoke("check", MUAI_QUEUE_KEY_PREFIX="x")
    assert result.exit_code == 0
    assert result.stdout.startswith("no file: valid (")
    assert "0 from the file, 1 from variables; 1 model)" in result.stdout


def test_Given_a_shared_file_When_checked_Then_what_is_left_alone_is_named(empty_folder: Path) -> None:
    (empty_folder / "system.yaml").write_text("web: {}\n")
    assert invoke("check", "system.yaml").stdout.endswith("; not ours, left alone: web\n")


def test_Given_a_wrong_file_When_checked_Then_its_lines_come_on_the_error_stream_and_the_status_is_2(
    empty_folder: Path,
) -> None:
    (empty_folder / "a.yaml").write_text("queue:\n  max_deliveries: 0\nmonitorin: {}\n")
    result = invoke("check", "a.yaml")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        "queue.max_deliveries: 0 is not allowed (allowed: an integer from 1 to 100) [from a.yaml:2]",
        "monitorin: there is no such key; did you mean monitoring? [from a.yaml:3]",
    ]


def test_Given_values_in_effect_When_shown_as_YAML_Then_that_file_means_the_same(empty_folder: Path) -> None:
    for path in SCENARIOS:
        (empty_folder / "shown.yaml").write_text(invoke("show", str(path), "--source").stdout)
        assert load_settings(empty_folder / "shown.yaml", {}) == load_settings(path, {}), path


def test_Given_file_variable_and_default_When_shown_Then_each_says_where_it_is_from(empty_folder: Path) -> None:
    (empty_folder / "a.yaml").write_text("queue:\n  max_deliveries: 5\n")
    shown = invoke("show", "a.yaml", "--source", MUAI_QUEUE_KEY_PREFIX="x").stdout
    assert "  max_deliveries: 5  # a.yaml:2\n" in shown
    assert "  key_prefix: x  # MUAI_QUEUE_KEY_PREFIX\n" in shown
    assert "  lease_ttl_s: 8.0  # default\n" in shown
    document = json.loads(invoke("show", "a.yaml", "--source", "--format", "json").stdout)
    assert document["queue"]["max_deliveries"] == {"value": 5, "source": "a.yaml:2"}
    assert json.loads(invoke("show", "--format", "json").stdout)["queue"]["max_deliveries"] == 3


@pytest.mark.parametrize("form", ["yaml", "json"])
def test_Given_passwords_in_addresses_When_shown_Then_they_are_masked(form: str) -> None:
    env = {
        "MUAI_BROKER_URL": "amqp://app:hunter2@rabbit//",
        "MUAI_REDIS_URL": "redis://:hunter2@redis/0?password=hunter2",
        "MUAI_MON_ANOMALY_WEBHOOK_URL": "https://u:hunter2@hooks/x?token=hunter2",
    }
    shown = invoke("show", "--format", form, **env).stdout
    assert "hunter2" not in shown
    assert "amqp://app:***@rabbit//" in shown


def test_Given_an_output_path_When_docs_and_example_are_asked_for_Then_they_lie_there(empty_folder: Path) -> None:
    for command, text in (("docs", render_reference()), ("example", render_example())):
        assert invoke(command).stdout == text
        path = empty_folder / "new" / command
        assert invoke(command, "--output", str(path)).stdout == f"wrote {path}\n"
        assert path.read_text() == text
        blocked = invoke(command, "--output", str(path / "inside"))
        assert blocked.exit_code == 1
        assert "cannot be written" in blocked.stderr


def test_Given_only_queue_names_are_wanted_When_imported_Then_pydantic_and_YAML_stay_out() -> None:
    code = (
        "import sys, muai_config.queues; print([m for m in ('pydantic', 'yaml', 'kombu', 'click') if m in sys.modules])"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT / "config")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"


def test_Given_a_name_that_the_package_does_not_have_Then_it_is_an_attribute_error() -> None:
    import muai_config

    assert {"Settings", "load_settings"} <= set(dir(muai_config))
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        _ = muai_config.nothing_of_this_name
