"""The Kubernetes manifests: what they name exists, and what they run is accepted."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.command_lines import parse_celery, parse_muai

from muai_config.loading import resolve_file
from muai_config.variables import OTHER_VARIABLES, settings_by_variable

FOLDER = Path(__file__).parents[2] / "deploy/kubernetes"
KUSTOMIZATION: dict[str, Any] = yaml.safe_load((FOLDER / "kustomization.yaml").read_text(encoding="utf-8"))
OBJECTS: list[dict[str, Any]] = [
    manifest
    for file in KUSTOMIZATION["resources"]
    for manifest in yaml.safe_load_all((FOLDER / file).read_text(encoding="utf-8"))
]
WORKLOADS = {thing["metadata"]["name"]: thing for thing in OBJECTS if thing["kind"] in {"Deployment", "StatefulSet"}}
OURS = {name: workload for name, workload in WORKLOADS.items() if name != "muai-redis"}


def pod(workload: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = workload["spec"]["template"]["spec"]
    return spec


def container(workload: dict[str, Any]) -> dict[str, Any]:
    [only] = pod(workload)["containers"]
    found: dict[str, Any] = only
    return found


def test_given_the_folder_then_every_manifest_in_it_is_applied() -> None:
    assert {path.name for path in FOLDER.glob("*.yaml")} == {*KUSTOMIZATION["resources"], "kustomization.yaml"}


@pytest.mark.parametrize("name", OURS)
def test_given_a_workload_then_muai_accepts_its_command_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parse_muai(monkeypatch, container(OURS[name])["args"])


@pytest.mark.parametrize("name", [name for name in OURS if "exec" in container(OURS[name])["readinessProbe"]])
def test_given_a_worker_then_its_probe_asks_the_worker_that_its_command_starts(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell, option, line = container(OURS[name])["readinessProbe"]["exec"]["command"]
    program, *arguments = shlex.split(line)
    asked = parse_celery(monkeypatch, arguments)
    started = parse_muai(monkeypatch, container(OURS[name])["args"])["name"]
    by_variable = "MUAI_WORKER_NAME" in {entry["name"] for entry in container(OURS[name])["env"]}
    assert (shell, option, program) == ("sh", "-c", "celery")
    assert asked["destination"] == [f"{'$MUAI_WORKER_NAME' if by_variable else started}@$HOSTNAME"]


@pytest.mark.parametrize("name", OURS)
def test_given_a_workload_then_its_variables_are_ours_and_kubernetes_adds_none(name: str) -> None:
    named = {entry["name"] for entry in container(OURS[name])["env"]}
    assert named <= {*settings_by_variable(), *OTHER_VARIABLES}
    # MUAI_REDIS_PORT, which Kubernetes makes of the service muai-redis, would be refused as a misspelt setting.
    assert pod(OURS[name])["enableServiceLinks"] is False


@pytest.mark.parametrize("name", OURS)
def test_given_a_workload_then_it_is_no_root_has_limits_and_time_to_stop(name: str) -> None:
    assert pod(OURS[name])["securityContext"]["runAsNonRoot"] is True
    assert "memory" in container(OURS[name])["resources"]["limits"]
    assert pod(OURS[name])["terminationGracePeriodSeconds"] > 30


def test_given_the_workloads_then_each_is_probed() -> None:
    for name, workload in WORKLOADS.items():
        assert "readinessProbe" in container(workload), name


def test_given_an_engine_worker_then_it_asks_for_a_gpu() -> None:
    workers = [name for name in OURS if container(OURS[name])["args"][0] == "worker"]
    assert workers
    for name in workers:
        assert container(OURS[name])["resources"]["limits"]["nvidia.com/gpu"] >= 1


def test_given_what_is_mounted_then_it_is_there() -> None:
    config_maps = {thing["metadata"]["name"] for thing in OBJECTS if thing["kind"] == "ConfigMap"}
    for name, workload in OURS.items():
        volumes = {volume["name"]: volume for volume in pod(workload)["volumes"]}
        assert {mount["name"] for mount in container(workload)["volumeMounts"]} == set(volumes), name
        assert volumes["settings"]["configMap"]["name"] in config_maps, name


def test_given_a_service_then_it_leads_to_pods() -> None:
    services = [thing for thing in OBJECTS if thing["kind"] == "Service"]
    assert services
    labels = [workload["spec"]["template"]["metadata"]["labels"] for workload in WORKLOADS.values()]
    for service in services:
        assert service["spec"]["selector"] in labels


def test_given_the_settings_then_the_configuration_accepts_them(tmp_path: Path) -> None:
    [config_map] = [thing for thing in OBJECTS if thing["kind"] == "ConfigMap"]
    for file_name, text in config_map["data"].items():
        (tmp_path / file_name).write_text(text, encoding="utf-8")
        assert resolve_file(tmp_path / file_name, {}).settings.monitoring.server.queue_capacity == 10_000
