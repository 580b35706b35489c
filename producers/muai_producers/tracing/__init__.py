"""Traces: what they are made of, and the tracer of a process. OpenTelemetry is imported only where one is made."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from muai_producers.tracing.base import NO_TRACER, Finished, NoTracer, Tracer, TracingState

if TYPE_CHECKING:
    from muai_config import Settings

log = logging.getLogger(__name__)


def create_tracer(settings: Settings, role: str) -> Tracer:
    """The tracer that the configuration asks for; one that traces nothing where OpenTelemetry is not installed."""
    config = settings.monitoring.tracing
    if not (settings.monitoring.enabled and config.enabled):
        return NO_TRACER
    try:
        from muai_producers.tracing.tracer import OTelTracer
    except ImportError as error:
        log.info("nothing is traced: OpenTelemetry is not installed (%s); pip install 'muai[monitoring]'", error)
        return NO_TRACER
    from muai_producers.logs.setup import redactor_of

    return OTelTracer(config, role, redactor=redactor_of(settings))


__all__ = ["NO_TRACER", "Finished", "NoTracer", "Tracer", "TracingState", "create_tracer"]
