"""docker-compose.yml, the images, and what they mount: everything in them exists and is accepted."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from tests.command_lines import parse_celery, parse_muai

from muai_config.loading import resolve_file
from muai_config.variables import OTHER_VARIABLES, settings_by_variable

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if "build" in service}
DOCKERFILES = ("producers/Dockerfile", "workers/Dockerfile")
EXAMPLE_ENV = ROOT / "deploy/example.env"
WITHOUT_A_SHELL = {"otel-collector"}


def example_env() -> dict[str, str]:
    lines = EXAMPLE_ENV.read_text(encoding="utf-8").splitlines()
    pairs = [line.partition("=") for line in lines if line and not line.startswith("#")]
    return {name: value for name, _, value in pairs}


def health_command(service: dict[str, Any]) -> list[str]:
    kind, *words = service["healthcheck"]["test"]
    return shlex.split(words[0].replace("$$", "$")) if kind == "CMD-SHELL" else words


@pytest.mark.parametrize("name", OURS)
def test_given_a_service_of_ours_then_its_command_line_is_one_that_muai_accepts(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parse_muai(monkeypatch, OURS[name]["command"])


def test_given_a_command_line_that_muai_does_not_know_then_the_check_above_refuses_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(click.UsageError):
        parse_muai(monkeypatch, ["collector", "--shards", "2"])
    with pytest.raises(click.UsageError):
        parse_muai(monkeypatch, ["colector"])


@pytest.mark.parametrize("name", [name for name in OURS if "celery" in str(OURS[name].get("healthcheck"))])
def test_given_a_worker_then_its_health_check_asks_the_worker_that_its_command_starts(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, *arguments = health_command(OURS[name])
    asked = parse_celery(monkeypatch, arguments)
    started = parse_muai(monkeypatch, OURS[name]["command"])
    assert program == "celery"
    assert asked["command"] == "ping"
    assert asked["destination"] == [f"{started['name']}@$HOSTNAME"]


def test_given_the_services_then_each_says_how_it_is_restarted_checked_and_limited() -> None:
    for name, service in SERVICES.items():
        assert service["restart"] == "unless-stopped", name
        assert "memory" in service["deploy"]["resources"]["limits"], name
        assert ("healthcheck" in service) != (name in WITHOUT_A_SHELL), name


def test_given_the_services_of_ours_then_they_have_longer_to_stop_than_they_take() -> None:
    timeout_s = resolve_file(ROOT / "config/optimization.yaml", {}).settings.monitoring.server.graceful_shutdown_timeout
    for name, service in OURS.items():
        assert int(service["stop_grace_period"].removesuffix("s")) > timeout_s, name


def test_given_a_mounted_file_then_it_exists() -> None:
    mounted = [
        volume.split(":")[0]
        for service in SERVICES.values()
        for volume in service.get("volumes", ())
        if volume.startswith(".")
    ]
    assert mounted
    for path in mounted:
        assert (ROOT / path).exists(), path


def test_given_a_named_volume_then_it_is_declared_and_used() -> None:
    used = {
        volume.split(":")[0]
        for service in SERVICES.values()
        for volume in service.get("volumes", ())
        if not volume.startswith(".")
    }
    assert used == set(COMPOSE["volumes"])


def test_given_a_variable_of_ours_then_the_configuration_knows_it() -> None:
    named = set(example_env())
    for service in SERVICES.values():
        named |= set(service.get("environment", {}))
    for dockerfile in DOCKERFILES:
        named |= set(re.findall(r"\b(MUAI_\w+)=", (ROOT / dockerfile).read_text(encoding="utf-8")))
    ours = {name for name in named if name.startswith("MUAI_")}
    assert ours
    assert ours <= {*settings_by_variable(), *OTHER_VARIABLES}


@pytest.mark.parametrize("name", OURS)
def test_given_the_environment_of_a_service_then_the_configuration_accepts_its_values(name: str) -> None:
    env = {**example_env(), **OURS[name]["environment"]}
    settings = resolve_file(ROOT / "config/optimization.yaml", env).settings
    assert settings.queue.state_url.startswith("redis://")


def test_given_the_example_secrets_then_the_addresses_carry_the_password_that_redis_asks_for() -> None:
    env = example_env()
    for variable in ("MUAI_BROKER_URL", "MUAI_REDIS_URL"):
        assert env[variable] == f"redis://:{env['REDIS_PASSWORD']}@redis:6379/0"


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_given_an_image_then_it_runs_as_another_user_than_root_and_its_command_is_accepted(
    dockerfile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    last_stage = (ROOT / dockerfile).read_text(encoding="utf-8").rpartition("\nFROM ")[2]
    assert re.search(r"^USER 10001:10001$", last_stage, re.MULTILINE)
    assert 'ENTRYPOINT ["muai"]' in last_stage
    command = re.search(r"^CMD (.*)$", last_stage, re.MULTILINE)
    assert command is not None
    parse_muai(monkeypatch, json.loads(command[1]))


def test_given_a_build_then_its_extras_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for name, service in OURS.items():
        assert (ROOT / service["build"]["dockerfile"]).is_file(), name
        extras = service["build"].get("args", {}).get("EXTRAS", "gateway")
        assert set(extras.split(",")) <= set(project["optional-dependencies"]), name


def test_given_the_build_context_then_it_holds_what_the_wheel_is_made_of() -> None:
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]["targets"]
    needed = {*wheel["wheel"]["packages"], "pyproject.toml", "README.md", "LICENSE", "constraints.txt"}
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line[:1] == "!"}
    assert let_in == needed
    assert all((ROOT / path).exists() for path in needed)


def test_given_the_engines_of_this_release_then_each_has_one_worker_with_a_gpu_and_no_other_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workers = {name: service["command"] for name, service in OURS.items() if service["command"][0] == "worker"}
    engines = {parse_muai(monkeypatch, command)["engine"]: name for name, command in workers.items()}
    existing = {path.stem for path in (ROOT / "workers/muai_workers/engines").glob("*.py")}
    assert set(engines) == {"vllm", "deepspeed", "onnx", "pytorch"} & existing
    for service in engines.values():
        [device] = SERVICES[service]["deploy"]["resources"]["reservations"]["devices"]
        assert device["capabilities"] == ["gpu"]


def test_given_a_target_of_prometheus_then_it_is_a_service() -> None:
    config = yaml.safe_load((ROOT / "config/prometheus/prometheus.yml").read_text(encoding="utf-8"))
    targets = [
        target for job in config["scrape_configs"] for static in job["static_configs"] for target in static["targets"]
    ]
    assert {target.split(":")[0] for target in targets} == {"exporter", "flower", "rabbitmq"}
    assert {target.split(":")[0] for target in targets} <= set(SERVICES)
    for path in config["rule_files"]:
        assert (ROOT / "config/prometheus" / Path(path).name).is_file()


def test_given_compose_then_it_accepts_the_file() -> None:
    command = _compose()
    if command is None:
        pytest.skip("neither `docker compose` nor docker-compose is installed")
    config = [*command, "--profile", "rabbitmq", "--file", str(ROOT / "docker-compose.yml"), "config", "--quiet"]
    done = subprocess.run(config, capture_output=True, text=True, cwd=ROOT, env=_environment(), check=False, timeout=60)
    assert done.returncode == 0, done.stderr


def _compose() -> list[str] | None:
    if shutil.which("docker"):
        asked = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False, timeout=60)
        if asked.returncode == 0:
            return ["docker", "compose"]
    return ["docker-compose"] if shutil.which("docker-compose") else None


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "ENV_FILE" and not name.startswith("COMPOSE_")}
