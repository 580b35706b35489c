"""Builds the environments of engines that cannot share the main one: their pins of torch and transformers differ.

    python workers/environments/build.py vllm deepspeed

Prints where the Python of each lies. Each is a virtual environment `.venvs/engine-NAME` with exactly the versions of
`NAME.txt`, this project as it lies here, and nothing to do when it is there already. torch is installed by pip, with
what it depends on: pip knows from its own configuration where builds for this machine's processor or GPU lie. The rest
is installed by uv, which is quicker, at the versions that are written down and without looking at what the packages ask
for: `NAME.in` and the overrides beside it say what `NAME.txt` was made of (see CONTRIBUTING.md).

Where a variable such as MUAI_TEST_PYTHONS=vllm=/opt/vllm/bin/python names another Python, that one is taken and nothing
is built: so a machine with a GPU tries a vLLM for it, installed by whoever runs the machine.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
FOLDER = ROOT / ".venvs"
STAMP = "installed.sha256"
PYTHONS_VARIABLE = "MUAI_TEST_PYTHONS"
"""`NAME=PATH` of Pythons to take instead of ours, separated by commas."""


def names() -> list[str]:
    """The environments that there are files for."""
    return sorted(path.stem for path in HERE.glob("*.in"))


def given_python(name: str) -> Path | None:
    """The Python that is to be used for engine `name` instead of one of ours; None: there is none."""
    pairs = (pair.partition("=") for pair in os.environ.get(PYTHONS_VARIABLE, "").split(",") if pair)
    return {engine: Path(python) for engine, _, python in pairs}.get(name)


def python_of(name: str) -> Path:
    """Where the Python of environment `name` is, or will be."""
    given = given_python(name)
    if given is not None:
        return given
    return FOLDER / f"engine-{name}" / "bin" / "python"


def fingerprint(name: str) -> str:
    """Changes with whatever the environment is made of."""
    sources = (HERE / f"{name}.txt", ROOT / "pyproject.toml")
    version = ".".join(map(str, sys.version_info[:3]))
    return hashlib.sha256(b"\0".join([version.encode(), *(path.read_bytes() for path in sources)])).hexdigest()


def is_built(name: str) -> bool:
    """Whether environment `name` is there, and as its files want it."""
    stamp = python_of(name).parent.parent / STAMP
    return stamp.is_file() and stamp.read_text(encoding="utf-8") == fingerprint(name)


def build(name: str) -> Path:
    """Make environment `name` if it is missing, half made, or made of other versions; returns its Python.

    Raises:
        subprocess.CalledProcessError: an installer failed; it has said why.
    """
    python, pins = python_of(name), HERE / f"{name}.txt"
    if given_python(name) is not None:
        return python
    folder = python.parent.parent
    FOLDER.mkdir(exist_ok=True)
    with (FOLDER / f"engine-{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if is_built(name):
            return python
        began_s = time.monotonic()
        shutil.rmtree(folder, ignore_errors=True)
        _run([sys.executable, "-m", "venv", str(folder)])
        _run([str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check", "-c", str(pins), "torch"])
        uv = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", str(python), "--no-deps"]
        _run([*uv, "--requirement", str(pins)])
        # What builds this project is among the pins.
        _run([*uv, "--no-build-isolation", "--editable", str(ROOT)])
        (folder / STAMP).write_text(fingerprint(name), encoding="utf-8")
        sys.stderr.write(f"{folder.name} made in {time.monotonic() - began_s:.0f} s\n")
    return python


def _run(command: Sequence[str]) -> None:
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the environments of engines that need their own.")
    parser.add_argument("names", nargs="*", choices=names(), metavar="NAME", help=", ".join(names()))
    for name in parser.parse_args().names:
        try:
            sys.stdout.write(f"{build(name)}\n")
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"environment {name} could not be made: {' '.join(error.cmd)} failed") from error


if __name__ == "__main__":
    main()
