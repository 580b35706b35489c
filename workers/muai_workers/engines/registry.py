"""The engines by name, and whether each can run here. A library is imported only when its engine is asked for."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass

from muai_config import Settings
from muai_config.engines import ENGINES
from muai_producers.errors import EngineUnavailableError
from muai_workers.engines.base import Availability, Engine

FAKE = "fake"


@dataclass(frozen=True)
class _Entry:
    """Where an engine is found and what it needs."""

    libraries: tuple[str, ...]
    """Import names."""
    install: str
    module: str
    """Holds `create(settings) -> Engine`."""


_ENTRIES: Mapping[str, _Entry] = {
    "vllm": _Entry(("vllm",), "pip install 'muai[vllm]'", "muai_workers.engines.vllm"),
    "deepspeed": _Entry(
        ("deepspeed", "torch", "transformers"), "pip install 'muai[deepspeed]'", "muai_workers.engines.deepspeed"
    ),
    "onnx": _Entry(
        ("onnxruntime", "onnx", "onnxscript", "torch", "transformers"),
        "pip install 'muai[onnx]'",
        "muai_workers.engines.onnx",
    ),
    "pytorch": _Entry(("torch", "transformers"), "pip install 'muai[torch]'", "muai_workers.engines.pytorch"),
}
ENGINE_NAMES: tuple[str, ...] = tuple(ENGINES)


def detect(name: str, settings: Settings) -> Availability:
    """Whether engine `name` can be made here, judged without importing its library.

    Raises:
        EngineUnavailableError: there is no engine of that name.
    """
    if name == FAKE:
        return Availability(True, "the fake engine runs everywhere")
    entry = _ENTRIES.get(name)
    if entry is None:
        raise EngineUnavailableError(f"there is no engine {name!r}; there are {', '.join(ENGINE_NAMES)}")
    if not settings.optimization.enabled and name != "pytorch":
        return Availability(False, "switched off by optimization.enabled: false")
    if not getattr(settings.optimization, name).enabled:
        return Availability(False, f"switched off by optimization.{name}.enabled: false")
    missing = [library for library in entry.libraries if not _installed(library)]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        return Availability(False, f"{', '.join(missing)} {verb} not installed here ({entry.install})")
    return Availability(True, f"{', '.join(entry.libraries)} found")


def create_engine(name: str, settings: Settings) -> Engine:
    """Make engine `name`; its library is imported now, its models are loaded later.

    Raises:
        EngineUnavailableError: with the reason, when it cannot run here.
    """
    availability = detect(name, settings)
    if not availability.available:
        raise EngineUnavailableError(availability.reason, {"engine": name})
    module_name = "muai_workers.engines.fake" if name == FAKE else _ENTRIES[name].module
    try:
        engine: Engine = importlib.import_module(module_name).create(settings)
    except ImportError as error:
        raise EngineUnavailableError(f"{name} cannot be imported: {error}", {"engine": name}) from error
    return engine


def availability_report(settings: Settings) -> dict[str, Availability]:
    """What each engine says of itself here; imports the libraries that are installed and switched on."""
    return {name: _inspect(name, settings) for name in ENGINE_NAMES}


def _inspect(name: str, settings: Settings) -> Availability:
    try:
        engine = create_engine(name, settings)
    except EngineUnavailableError as error:
        return Availability(False, error.message)
    try:
        return engine.availability()
    finally:
        engine.close()


def _installed(library: str) -> bool:
    # A module set to None in sys.modules, as tests do to hide a library, raises ValueError here.
    try:
        return importlib.util.find_spec(library) is not None
    except ValueError:
        return False
