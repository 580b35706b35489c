"""The OpenAPI document: what each path takes and gives, with examples, from the types that the code works with."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute

from muai_producers.gateway.answers import ModelList, Receipt
from muai_producers.gateway.failures import ErrorBody
from muai_producers.gateway.health import Health, Readiness
from muai_producers.gateway.openai_api.document import schemas as openai_schemas
from muai_producers.gateway.standing import Standing
from muai_producers.gateway.submission import InferenceBody
from muai_producers.gateway.workflow_bodies import WorkflowBody, WorkflowList, WorkflowReceipt
from muai_producers.wire import InferenceResult

DESCRIPTION = """Inference as a queue. A request is accepted and kept (202); its result is fetched, or waited for, by
id. Every error has one shape, `{"error": {"code", "message", "details", "request_id"}}`: programs look at `code`.
429 and 503 carry `Retry-After`."""
JSON = "application/json"
EXAMPLE_ID = "5f0c2a8e-6a2b-4c1d-9e3f-7b8a9c0d1e2f"
_RECEIPT = {"id": EXAMPLE_ID, "status_url": f"/v1/inference/{EXAMPLE_ID}", "state": "PENDING", "queue_position": 3}
_RESULT = {
    "outputs": {"embedding": [0.12, -0.03, 0.98]},
    "engine_used": "onnx",
    "latency_ms": 18.4,
    "batch_size": 16,
    "cache_hit": False,
    "metadata": {"request_id": EXAMPLE_ID, "model": "all-minilm-l6-v2", "task": "embedding", "attempts": []},
}
_DONE = {
    "id": EXAMPLE_ID,
    "state": "SUCCESS",
    "status_url": f"/v1/inference/{EXAMPLE_ID}",
    "result": _RESULT,
    "error": None,
    "progress": None,
}
_STARTED = {**_DONE, "state": "STARTED", "result": None, "progress": {"engine": "onnx", "batch_size": 16}}
_REVOKED = {
    **_DONE,
    "state": "REVOKED",
    "result": None,
    "error": {
        "type": "RequestCancelledError",
        "code": "cancelled",
        "message": f"request {EXAMPLE_ID} was cancelled",
        "retryable": False,
        "details": {"request_id": EXAMPLE_ID},
    },
}
_MODELS = {
    "object": "list",
    "data": [
        {
            "id": "all-minilm-l6-v2",
            "object": "model",
            "created": 0,
            "owned_by": "muai",
            "task": "embedding",
            "engines": ["onnx", "pytorch"],
            "max_input_tokens": 256,
        }
    ],
}
_HEALTH = {
    "status": "healthy",
    "uptime_seconds": 3600.0,
    "models_loaded": ["all-minilm-l6-v2"],
    "engines_available": ["onnx", "pytorch"],
    "queue_size": 5,
    "queue_capacity": 100,
    "reasons": [],
}
_READY = {
    "ready": True,
    "checks": {"serving": True, "state_store": True, "broker": True, "collector": True},
    "reasons": [],
}
_BODIES = {
    "embedding": {
        "summary": "Embed a sentence",
        "value": {"model": "all-minilm-l6-v2", "inputs": "How far is the moon?"},
    },
    "chat": {
        "summary": "Chat, urgently",
        "value": {
            "model": "qwen-chat",
            "inputs": [{"role": "user", "content": "How far is the moon?"}],
            "parameters": {"max_tokens": 64, "temperature": 0.7},
            "stream": True,
            "priority": 8,
            "deadline_s": 30,
        },
    },
}
_ERRORS = {
    400: ("The request is wrong; `details.field` names the field.", "invalid_request", "priority: Expected `int` <= 9"),
    404: ("There is no such thing.", "request_not_found", f"no request {EXAMPLE_ID!r} is known"),
    408: ("The body did not arrive in time.", "body_timeout", "the body did not arrive within 30 s"),
    409: ("It contradicts what is known.", "already_finished", "the request has finished and cannot be cancelled"),
    413: ("The body is too large.", "payload_too_large", "the body has more than 16000000 bytes"),
    415: ("The body is not JSON.", "unsupported_media_type", "the body must be application/json, got 'text/plain'"),
    429: ("Full; nothing was enqueued. See `Retry-After`.", "queue_full", "full: 100 of 100 requests are in flight"),
    500: ("A fault of the gateway's.", "internal_error", "an internal error; the gateway's log has more"),
    503: (
        "Stopping, or the broker or the state store does not answer. See `Retry-After`.",
        "broker_unavailable",
        "the broker or the state store does not answer; try again shortly",
    ),
}
_RETRY_AFTER = {"Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer", "minimum": 1}}}
_ID = {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}, "example": EXAMPLE_ID}
_WAIT = {
    "name": "wait",
    "in": "query",
    "description": "Seconds to wait for the result before answering.",
    "schema": {"type": "number", "minimum": 0, "maximum": 60},
}


def _header(name: str, description: str, **schema: Any) -> dict[str, Any]:
    return {"name": name, "in": "header", "description": description, "schema": schema}


_REQUEST_ID = _header(
    "X-Request-Id", "Comes back in the answer and in errors; made where it is left out.", type="string", maxLength=200
)
_SUBMIT_HEADERS = [
    _header(
        "Idempotency-Key",
        "A repeated request with the same key and content is the same request: it gets the first one's id.",
        type="string",
        pattern="^[!-~]{1,256}$",
    ),
    _header("X-Muai-Priority", "As `priority` in the body.", type="integer", minimum=0, maximum=9),
    _header("X-Muai-Deadline-S", "As `deadline_s` in the body.", type="number", exclusiveMinimum=0),
    _header("Prefer", "`wait=N` (RFC 7240): as the parameter `wait`, capped.", type="string"),
]


def _content(schema: type, example: Any = None, examples: Any = None) -> dict[str, Any]:
    body: dict[str, Any] = {"schema": {"$ref": f"#/components/schemas/{schema.__name__}"}}
    body |= {"examples": examples} if examples else {"example": example}
    return {JSON: body}


def _response(description: str, schema: type, example: Any) -> dict[str, Any]:
    return {"description": description, "content": _content(schema, example)}


def _error(status: int) -> dict[str, Any]:
    description, code, message = _ERRORS[status]
    example = {"error": {"code": code, "message": message, "details": {}, "request_id": "9f1c0e7a52d84b6f"}}
    return _response(description, ErrorBody, example) | ({"headers": _RETRY_AFTER} if status in (429, 503) else {})


def _operation(
    name: str, summary: str, responses: dict[int, Any], errors: tuple[int, ...], *parameters: Any, **extra: Any
) -> dict[str, Any]:
    """Keyword arguments of FastAPI's route decorators."""
    answers = {**responses, **{status: _error(status) for status in (*errors, 500)}}
    status, *_ = responses
    return {
        "operation_id": name,
        "summary": summary,
        "status_code": status,
        "response_description": responses[status]["description"],
        "responses": answers,
        "response_model": None,
        "openapi_extra": {"parameters": [*parameters, _REQUEST_ID], **extra},
    }


SUBMIT = _operation(
    "submitInference",
    "Submit a request",
    {
        202: _response("Accepted, and not finished.", Receipt, _RECEIPT),
        200: _response("Waited for, and finished.", Standing, _DONE),
    },
    (400, 404, 408, 409, 413, 415, 429, 503),
    _WAIT,
    *_SUBMIT_HEADERS,
    requestBody={"required": True, "content": _content(InferenceBody, examples=_BODIES)},
)
GET = _operation(
    "getInference",
    "Where a request stands, and its result",
    {200: _response("Known.", Standing, _STARTED)},
    (400, 404, 503),
    _ID,
    _WAIT,
)
_EVENTS = (
    'id: 3-2f1c9a0b7d44\nevent: text\ndata: {"text":"The"}\n\n'
    ": still there\n\n"
    f'id: 3-2f1c9a0b7d44.end\nevent: end\ndata: {{"id":"{EXAMPLE_ID}","state":"SUCCESS", …}}\n\n'
)
_AFTER = "The id of the last event that was read; what follows it is sent, by whichever gateway."
STREAM = _operation(
    "streamInference",
    "The text of a request as it is generated",
    {
        200: {
            "description": "Server-sent events. `text`: some more text. `restart`: what was told is void, and the text "
            "begins anew. `end`: the last, with what GET /v1/inference/{id} answers. Lines that begin with a colon "
            "keep the connection. A request without `stream`, or a finished one, tells its text at once.",
            "content": {"text/event-stream": {"schema": {"type": "string"}, "example": _EVENTS}},
        },
        204: {"description": "The last event was read already."},
    },
    (400, 404, 503),
    _ID,
    _header("Last-Event-ID", _AFTER, type="string"),
    {"name": "after", "in": "query", "description": _AFTER, "schema": {"type": "string"}},
)
CANCEL = _operation(
    "cancelInference",
    "Cancel a request",
    {200: _response("Cancelled; no result will replace that.", Standing, _REVOKED)},
    (404, 409, 503),
    _ID,
)
MODELS = _operation("listModels", "The models that there are", {200: _response("All.", ModelList, _MODELS)}, (503,))
HEALTH = _operation(
    "health",
    "How the installation does",
    {
        200: _response("healthy or degraded.", Health, _HEALTH),
        503: _response("unhealthy.", Health, {**_HEALTH, "status": "unhealthy", "queue_size": None}),
    },
    (),
)
READY = _operation(
    "readiness",
    "Whether to send requests here",
    {
        200: _response("Ready.", Readiness, _READY),
        503: _response("Not ready.", Readiness, {**_READY, "ready": False, "reasons": ["no collector is running"]}),
    },
    (),
)
_WORKFLOW_NAME = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}, "example": "rag"}
_WORKFLOW = {
    "name": "rag",
    "description": "Answers a question from the documents that were ingested, and cites them.",
    "parameters": {"type": "object", "required": ["question"], "properties": {"question": {"type": "string"}}},
}
_RUN = {"summary": "Ask documents", "value": {"parameters": {"question": "When does the office open?"}}}
WORKFLOWS = _operation(
    "listWorkflows",
    "The workflows that there are, and what each takes",
    {200: _response("All.", WorkflowList, {"data": [_WORKFLOW]})},
    (503,),
)
START_WORKFLOW = _operation(
    "startWorkflow",
    "Start a run of a workflow; its result is fetched like that of a request",
    {
        202: _response(
            "Started.",
            WorkflowReceipt,
            {"id": EXAMPLE_ID, "status_url": f"/v1/inference/{EXAMPLE_ID}", "state": "RECEIVED"},
        )
    },
    (400, 404, 408, 413, 415, 429, 503),
    _WORKFLOW_NAME,
    requestBody={"required": True, "content": _content(WorkflowBody, examples={"rag": _RUN})},
)
_TYPES = (
    InferenceBody,
    Receipt,
    Standing,
    InferenceResult,
    ModelList,
    Health,
    Readiness,
    ErrorBody,
    WorkflowBody,
    WorkflowList,
    WorkflowReceipt,
)


def _any_json(_: type) -> dict[str, Any]:
    """The schema of what passes through undecoded."""
    return {}


def document(app: FastAPI) -> dict[str, Any]:
    """The document; made once, then kept by the application."""
    if app.openapi_schema is None:
        made = get_openapi(title=app.title, version=app.version, description=DESCRIPTION, routes=app.routes)
        _, schemas = msgspec.json.schema_components(
            _TYPES, ref_template="#/components/schemas/{name}", schema_hook=_any_json
        )
        # A result passes through undecoded, so its type does not show in the type of what carries it.
        schemas["Standing"]["properties"]["result"] = {
            "anyOf": [{"$ref": "#/components/schemas/InferenceResult"}, {"type": "null"}]
        }
        for route in app.routes:
            if isinstance(route, APIRoute) and route.methods:
                operation = made["paths"][route.path_format][min(route.methods).lower()]
                # As they were given: FastAPI leaves out what is null, in the examples too.
                operation["responses"] = {str(status): answer for status, answer in route.responses.items()}
        made.setdefault("components", {})["schemas"] = {**schemas, **openai_schemas()}
        app.openapi_schema = made
    return app.openapi_schema
