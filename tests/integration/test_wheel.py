"""The distribution as others install it: the wheel and the editable install, beside an application's own packages."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PACKAGES = ("muai_config", "muai_producers", "muai_batching", "muai_workers")
HEAVY = (
    "torch",
    "transformers",
    "onnxruntime",
    "numpy",
    "fastapi",
    "starlette",
    "uvicorn",
    "flower",
    "pydantic",
    "celery",
    "jinja2",
)

IMPORT_CLIENT = f"""
import json, sys
from muai_producers import AsyncInferenceClient, InferenceClient
import config, workers
import muai_producers
print(json.dumps({{
    "heavy": [name for name in {HEAVY!r} if name in sys.modules],
    "muai": muai_producers.__file__,
    "others": [config.__file__, workers.__file__],
    "whose": [config.WHOSE, workers.WHOSE],
}}))
"""


class Environment:
    """A virtual environment that sees the packages of the one that runs the tests, and an application of its own."""

    def __init__(self, folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=60)
        self.python = folder / "bin" / "python"
        [self.site_packages] = folder.glob("lib/python*/site-packages")
        for name in ("config", "workers"):
            package = self.site_packages / name
            package.mkdir()
            (package / "__init__.py").write_text("WHOSE = 'the application'\n", encoding="utf-8")
        # `addsitedir`, and last in the path: what is installed here comes first, and no .pth file of there is read.
        (self.site_packages / "zz_outer.pth").write_text(f"{sysconfig.get_path('purelib')}\n", encoding="utf-8")

    def install(self, wheel: Path) -> None:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(self.site_packages)

    def run(self, *arguments: str) -> str:
        done = subprocess.run(
            [str(self.python), *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            cwd=self.site_packages,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def import_client(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.run("-I", "-c", IMPORT_CLIENT))
        return found


def build(target: str, folder: Path) -> Path:
    """Build with the project's own build backend, in a process of its own: it changes the current folder."""
    source = (
        "import sys, hatchling.build as backend\n"
        f"print(backend.build_{target}(sys.argv[1]), file=open(sys.argv[1] + '/name', 'w'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", source, str(folder)], capture_output=True, text=True, cwd=ROOT, check=False, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return folder / (folder / "name").read_text(encoding="utf-8").strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    environment = Environment(tmp_path_factory.mktemp("installed") / "venv")
    environment.install(wheel)
    return environment


def test_given_an_application_with_packages_config_and_workers_when_muai_is_installed_then_all_import(
    installed: Environment,
) -> None:
    found = installed.import_client()
    assert found["whose"] == ["the application", "the application"]
    assert Path(found["muai"]).is_relative_to(installed.site_packages)


def test_given_the_client_when_it_is_imported_then_it_brings_nothing_heavy(installed: Environment) -> None:
    assert installed.import_client()["heavy"] == []


def test_given_the_wheel_then_it_holds_the_four_packages_and_no_other(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.partition("/")[0] for name in names}
    assert tops == {*PACKAGES, f"muai-{PROJECT['version']}.dist-info"}
    for package in PACKAGES:
        assert f"{package}/py.typed" in names
    in_tree = {
        f"{path.relative_to(ROOT / folder)}"
        for folder in ("config", "producers", "batching", "workers")
        for path in (ROOT / folder).glob("muai_*/**/*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc"
    }
    assert {name for name in names if not name.startswith("muai-")} == in_tree


def test_given_the_installed_wheel_then_every_command_is_found(installed: Environment) -> None:
    names = json.loads(
        installed.run(
            "-I",
            "-c",
            "import json; from muai_producers.cli import registry; print(json.dumps(dict(registry.command_targets())))",
        )
    )
    assert names == PROJECT["entry-points"]["muai.commands"]
    assert installed.run("-I", "-m", "muai_producers", "--version").strip() == f"muai {PROJECT['version']}"


def test_given_an_editable_install_then_the_client_comes_from_the_sources_and_the_application_keeps_its_packages(
    tmp_path: Path,
) -> None:
    if importlib.util.find_spec("editables") is None:
        pytest.fail("editables is missing, which '.[dev]' installs")
    environment = Environment(tmp_path / "venv")
    folder = tmp_path / "wheel"
    folder.mkdir()
    environment.install(build("editable", folder))
    found = environment.import_client()
    assert Path(found["muai"]).is_relative_to(ROOT / "producers")
    assert found["whose"] == ["the application", "the application"]
    assert found["heavy"] == []


def test_given_the_base_installation_then_it_asks_for_the_light_packages_alone() -> None:
    wanted = {Requirement(line).name for line in PROJECT["dependencies"]}
    assert wanted == {"celery", "hiredis", "msgspec", "pydantic", "pyyaml", "click", "rich"}


def test_given_the_constraints_then_every_direct_dependency_is_pinned_within_its_range() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    extras = PROJECT["optional-dependencies"]
    reached, todo = set(), ["dev"]
    while todo:
        extra = todo.pop()
        reached.add(extra)
        own = [Requirement(line) for line in extras[extra] if Requirement(line).name == "muai"]
        todo += [name for requirement in own for name in requirement.extras if name not in reached]
    wanted = [Requirement(line) for line in PROJECT["dependencies"]]
    wanted += [Requirement(line) for extra in reached for line in extras[extra]]
    for requirement in wanted:
        if requirement.name != "muai":
            pinned = pins[requirement.name.lower().replace("_", "-")]
            assert requirement.specifier.contains(pinned), f"{requirement}: {pinned}"
