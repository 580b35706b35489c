"""What the other parts of monitoring tell the metrics: a call each."""

from __future__ import annotations

from muai_producers.monitoring import instruments
from muai_producers.monitoring.recorder import Recorder, recorder


def alert_raised(kind: str, severity: str, to: Recorder = recorder) -> None:
    """An alert went out, once for the whole installation.

    Args:
        kind: the alert's type, such as `LatencyAlert`; one of a fixed few.
    """
    to.count(instruments.ALERTS, kind, severity)


def tuning_decided(parameter: str, outcome: str, to: Recorder = recorder) -> None:
    """The tuner decided something.

    Args:
        parameter: the setting's path, such as `optimization.batcher.max_batch_size`.
        outcome: one of a fixed few, such as `raised`, `lowered`, `kept`, `rolled_back`.
    """
    to.count(instruments.TUNING, parameter, outcome)


def model_loaded(model: str, engine: str, took_s: float, to: Recorder = recorder) -> None:
    """A model is in memory now."""
    to.count(instruments.MODEL_EVENTS, model, engine, "load")
    to.observe(instruments.MODEL_LOAD, model, engine, values=(took_s,))


def model_load_failed(model: str, engine: str, to: Recorder = recorder) -> None:
    """A model could not be loaded."""
    to.count(instruments.MODEL_EVENTS, model, engine, "load_failed")


def model_unloaded(model: str, engine: str, to: Recorder = recorder) -> None:
    """A model is in memory no more."""
    to.count(instruments.MODEL_EVENTS, model, engine, "unload")
