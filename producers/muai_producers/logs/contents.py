"""What clients sent and were answered, logged where `monitoring.logs.contents` asks for it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import msgspec

from muai_producers.logs.context import about_request
from muai_producers.wire import InferenceRequest

MAX_CHARS = 2_000


def tell_contents(log: logging.Logger, request: InferenceRequest, outputs: Mapping[str, Any]) -> None:
    """Write one line with both, each cut off where it is long."""
    with about_request(request):
        log.info("answered request %s: %s -> %s", request.id, _short(request.inputs), _short(outputs))


def _short(value: Mapping[str, Any]) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= MAX_CHARS else text[:MAX_CHARS] + " …"
