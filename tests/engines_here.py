"""The engines that this test run is about: their libraries do not all fit in one environment."""

from __future__ import annotations

import os
from typing import Any

import pytest

from muai_config.engines import TASKS_BY_ENGINE, TaskName

ENGINES_VARIABLE = "MUAI_TEST_ENGINES"
"""Names of real engines, separated by commas. `make test-engines` sets it in each engine's own environment."""
REAL: tuple[str, ...] = tuple(os.environ.get(ENGINES_VARIABLE, "pytorch,onnx").split(","))


def real_engines(task: TaskName = "text-generation") -> list[Any]:
    """Parameters for a test: the real engines of this run that serve `task`."""
    return [pytest.param(name, marks=pytest.mark.engine) for name in REAL if task in TASKS_BY_ENGINE[name]]  # type: ignore[index]


def engines(task: TaskName = "text-generation") -> list[Any]:
    """The same, and the fake engine."""
    return ["fake", *real_engines(task)]
