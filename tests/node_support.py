"""OpenAI's JavaScript client, installed where it can be."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.transport_support import ROOT

CLIENTS = ROOT / "tests" / "clients"
OLDEST_NODE = 18
INSTALL_LIMIT_S = 120
_installed: dict[str, Path] = {}


def node_script(factory: pytest.TempPathFactory, name: str) -> Path:
    """A script of `tests/clients` beside an installed client; skips where that cannot be had."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not there (Debian: apt install nodejs npm)")
    version = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    if int(version.lstrip("v").partition(".")[0]) < OLDEST_NODE:
        pytest.skip(f"node is {version}, the client wants {OLDEST_NODE}")
    if (CLIENTS / "node_modules" / "openai").is_dir():
        return CLIENTS / name
    if "folder" not in _installed:
        _installed["folder"] = _install(factory.mktemp("clients"))
    return _installed["folder"] / name


def _install(folder: Path) -> Path:
    for path in (CLIENTS / "package.json", CLIENTS / "package-lock.json", *CLIENTS.glob("*.mjs")):
        shutil.copy(path, folder)
    command = ["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts", "--fetch-retries=1"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=INSTALL_LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip(f"npm did not install the client within {INSTALL_LIMIT_S} s")
    if done.returncode:
        pytest.skip(f"npm cannot install the client: {done.stderr.strip()[-300:]}")
    return folder
