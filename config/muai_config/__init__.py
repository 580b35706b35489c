"""Settings, the model catalog and the Celery application settings. Imports nothing of the other packages.

Names are loaded when first used: `import muai_config.queues` must not cost an import of pydantic.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from muai_config.catalog import ModelFilesNotFoundError, ModelSource, ModelSpec
    from muai_config.celery_conf import celery_settings
    from muai_config.errors import ConfigError, Problem, UnknownModelError
    from muai_config.loading import build_settings, load_settings
    from muai_config.settings import Settings

__all__ = [
    "ConfigError",
    "ModelFilesNotFoundError",
    "ModelSource",
    "ModelSpec",
    "Problem",
    "Settings",
    "UnknownModelError",
    "build_settings",
    "celery_settings",
    "load_settings",
]

_MODULES = {
    "ConfigError": "errors",
    "ModelFilesNotFoundError": "catalog",
    "ModelSource": "catalog",
    "ModelSpec": "catalog",
    "Problem": "errors",
    "Settings": "settings",
    "UnknownModelError": "errors",
    "build_settings": "loading",
    "celery_settings": "celery_conf",
    "load_settings": "loading",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
