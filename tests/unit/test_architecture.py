"""The contracts between the packages, as pyproject.toml states them: import-linter finds them kept."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CONFIG: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
PACKAGES = ("config", "producers", "batching", "workers")


def lint(config: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / package) for package in PACKAGES)}
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"]
    command += ["--config", str(config), "--no-cache"]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, check=False, timeout=110)


def test_given_the_sources_then_every_contract_is_kept() -> None:
    done = lint(ROOT / "pyproject.toml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(CONFIG['contracts'])} kept, 0 broken" in done.stdout


def test_given_a_contract_that_the_sources_break_then_the_linter_says_so(tmp_path: Path) -> None:
    broken = tmp_path / "importlinter.toml"
    broken.write_text(
        "[tool.importlinter]\n"
        'root_packages = ["muai_config", "muai_producers"]\n'
        "[[tool.importlinter.contracts]]\n"
        'name = "the wrong way round"\n'
        'type = "layers"\n'
        'layers = ["muai_config", "muai_producers"]\n',
        encoding="utf-8",
    )
    done = lint(broken)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "0 kept, 1 broken" in done.stdout


def test_given_a_contract_then_the_modules_of_ours_that_it_names_exist() -> None:
    named = {module for contract in CONFIG["contracts"] for module in contract.get("source_modules", [])}
    named |= {module for contract in CONFIG["contracts"] for module in contract.get("layers", [])}
    assert named
    for module in named:
        assert importlib.util.find_spec(module) is not None, module
