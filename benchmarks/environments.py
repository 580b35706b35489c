"""Environments of the peers' own, made from `peers/requirements/NAME.txt` when first needed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from benchmarks.machine import ROOT
from benchmarks.processes import BenchmarkError

PEERS = Path(__file__).parent / "peers"
FOLDER = ROOT / ".venvs"
STAMP = "requirements.installed"


@cache
def python_of(name: str) -> Path:
    """The Python of environment `name`, installed if it is missing or if its requirements have changed.

    Raises:
        BenchmarkError: it cannot be installed; says why.
    """
    folder = FOLDER / f"bench-{name}"
    requirements = PEERS / "requirements" / f"{name}.txt"
    stamp = folder / STAMP
    if not stamp.exists() or stamp.read_text() != requirements.read_text():
        _install(folder, requirements)
        stamp.write_text(requirements.read_text())
    return folder / "bin" / "python"


def pinned(name: str, packages: Sequence[str]) -> dict[str, str]:
    """The versions that environment `name` has of `packages`, as its requirements pin them."""
    lines = (PEERS / "requirements" / f"{name}.txt").read_text().split()
    pins = dict(line.split("==") for line in lines)
    return {package: pins[package] for package in packages}


def _install(folder: Path, requirements: Path) -> None:
    python = folder / "bin" / "python"
    try:
        if not python.exists():
            shutil.rmtree(folder, ignore_errors=True)
            _run([sys.executable, "-m", "venv", str(folder)])
        _run([str(python), "-m", "pip", "install", "--quiet", "--requirement", str(requirements)])
    except subprocess.CalledProcessError as error:
        reason = (error.stderr or error.stdout or "").strip().splitlines()[-1:]
        raise BenchmarkError(f"{requirements.name} could not be installed: {' '.join(reason)}") from error


def _run(argv: list[str]) -> None:
    subprocess.run(argv, check=True, capture_output=True, text=True)
