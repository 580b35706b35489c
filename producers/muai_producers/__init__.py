"""What a web app touches: the client, requests and results, errors. Names load when first used."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from muai_producers.aio import AsyncInferenceClient
    from muai_producers.client import InferenceClient, RequestStatus
    from muai_producers.streams.text import StreamEvent
    from muai_producers.wire import InferenceRequest, InferenceResult, Parameters

__all__ = [
    "AsyncInferenceClient",
    "InferenceClient",
    "InferenceRequest",
    "InferenceResult",
    "Parameters",
    "RequestStatus",
    "StreamEvent",
]

_MODULES = {
    "AsyncInferenceClient": "aio",
    "InferenceClient": "client",
    "RequestStatus": "client",
    "StreamEvent": "streams.text",
    "InferenceRequest": "wire",
    "InferenceResult": "wire",
    "Parameters": "wire",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
