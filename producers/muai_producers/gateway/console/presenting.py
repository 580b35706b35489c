"""The console's templates and assets, from inside the package, and how values are written for people."""

from __future__ import annotations

import hashlib
import importlib.resources
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

ASSET_TYPES = {
    "console.css": "text/css; charset=utf-8",
    "console.js": "text/javascript; charset=utf-8",
    "tryit.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
STEP_NAMES = {
    "queue": "in the queue",
    "batching": "waiting for its batch",
    "dispatch": "on its way to the worker",
    "inference": "in the engine",
    "answer": "answering",
}
_FOLDER = importlib.resources.files(__package__)


@dataclass(frozen=True)
class Asset:
    """A file that pages name."""

    content: bytes
    media_type: str
    version: str
    """Changes with the content, so that browsers may keep what they have."""


def read_assets() -> dict[str, Asset]:
    """Every asset, by name."""
    assets = {}
    for name, media_type in ASSET_TYPES.items():
        content = (_FOLDER / "assets" / name).read_bytes()
        assets[name] = Asset(content, media_type, hashlib.sha256(content).hexdigest()[:16])
    return assets


def _source(name: str) -> str | None:
    file = _FOLDER / "templates" / name
    return file.read_text(encoding="utf-8") if file.is_file() else None


def environment(assets: dict[str, Asset]) -> Environment:
    """Templates in which everything is escaped that is not a template's own."""
    made = Environment(
        loader=FunctionLoader(_source), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    made.filters |= {
        "duration": duration,
        "seconds": seconds,
        "count": count,
        "clock": clock,
        "short": short,
        "gigabytes": gigabytes,
    }
    made.globals["asset"] = lambda name: f"/console/assets/{name}?v={assets[name].version}"
    made.globals["step_names"] = STEP_NAMES
    return made


def duration(value_ms: float | None) -> str:
    """Milliseconds, in the unit that suits them."""
    if value_ms is None:
        return "—"
    if value_ms < 1000:
        return f"{value_ms:.1f} ms" if value_ms < 10 else f"{value_ms:.0f} ms"
    total_s = value_ms / 1000
    if total_s < 60:
        return f"{total_s:.1f} s" if total_s < 10 else f"{total_s:.0f} s"
    minutes, rest_s = divmod(int(total_s), 60)
    if minutes < 60:
        return f"{minutes} min {rest_s} s"
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if days else f"{hours} h {minutes} min"


def seconds(value_s: float | None) -> str:
    """Seconds, in the unit that suits them."""
    return duration(None if value_s is None else value_s * 1000)


def count(value: int | None) -> str:
    """A number with its thousands apart."""
    return "—" if value is None else f"{value:,}"


def gigabytes(num_bytes: int | None) -> str:
    """Bytes, in gigabytes."""
    return "—" if num_bytes is None else f"{num_bytes / 1e9:.1f}"


def clock(wall_s: float | None) -> Any:
    """A time of day in UTC; the page's script writes it in the reader's own time zone."""
    if wall_s is None:
        return "—"
    moment = datetime.fromtimestamp(wall_s, UTC)
    return Markup('<time datetime="{}" data-clock>{} UTC</time>').format(
        moment.isoformat(timespec="milliseconds"), moment.strftime("%H:%M:%S")
    )


def short(text: str, length: int = 8) -> str:
    """The beginning of an id."""
    return text if len(text) <= length else f"{text[:length]}…"
