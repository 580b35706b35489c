"""The OpenAPI document: what each path takes and gives, with examples, from the types that the code works with."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute

from muai_producers.gateway.answers import ManyReceipts, ModelList, Receipt
from muai_producers.gateway.failures import ErrorBody
from muai_producers.gateway.health import Health, Readiness
from muai_producers.gateway.openai_api.document import schemas as openai_schemas
from muai_producers.gateway.standing import Standing
from muai_producers.gateway.submission import MIN_DEADLINE_S, InferenceBody, ManyBody
from muai_producers.gateway.workflow_bodies import WorkflowBody, WorkflowList, WorkflowReceipt
from muai_producers.wire import InferenceResult

DESCRIPTION = """Inference as a queue. A request is accepted and kept (202); its result is fetched, or waited for, by
id. Every error has one shape, `{"error": {"code", "message", "details", "request_id"}}`: programs look at `code`.
429 and 503 carry `Retry-After`."""
JSON = "application/json"
SECURITY_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "An API key, as `muai keys create` prints it."},
    "apiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "The same key."},
}
OPEN = frozenset({"health", "readiness", "index"})
"""Operations that need no key."""
EXAMPLE_ID = "5f0c2a8e-6a2b-4c1d-9e3f-7b8a9c0d1e2f"
_RECEIPT = {
    "id": EXAMPLE_ID,
    "status_url": f"/v1/inference/{EXAMPLE_ID}",
    "state": "PENDING",
    "queue_position": 3,
    "estimated_wait_s": 0.4,
}
_REFUSED = {
    "code": "model_not_found",
    "message": "unknown model 'nop'; did you mean 'noop'?",
    "retryable": False,
    "details": {"field": "model", "model": "nop"},
}
_MANY = {
    "object": "list",
    "accepted": 1,
    "refused": 1,
    "data": [{"index": 0, "receipt": _RECEIPT, "error": None}, {"index": 1, "receipt": None, "error": _REFUSED}],
}
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
_MANY_BODIES = {
    "two": {
        "summary": "Two at once",
        "value": {
            "requests": [
                {"model": "all-minilm-l6-v2", "inputs": "How far is the moon?", "idempotency_key": "question-1"},
                {"model": "nop", "inputs": "hello"},
            ]
        },
    }
}
_ERRORS = {
    400: ("The request is wrong; `details.field` names the field.", "invalid_request", "priority: Expected `int` <= 9"),
    403: ("Not with this key.", "forbidden", "this needs an operator's key"),
    401: ("No API key, or none that is known.", "unauthorized", "an API key is needed: send Authorization: Bearer KEY"),
    404: ("There is no such thing.", "request_not_found", f"no request {EXAMPLE_ID!r} is known"),
    408: ("The body did not arrive in time.", "body_timeout", "the body did not arrive within 30 s"),
    409: ("It contradicts what is known.", "already_finished", "the request has finished and cannot be cancelled"),
    413: ("The body is too large.", "payload_too_large", "the body has more than 16000000 bytes"),
    415: ("The body is not JSON.", "unsupported_media_type", "the body must be application/json, got 'text/plain'"),
    422: (
        "The change would make the configuration wrong; `details.problems` has a line for each key.",
        "invalid_config",
        "optimization.batcher.max_batch_size: 9999 is not allowed (allowed: an integer from 1 to 4096)",
    ),
    424: (
        "The instance does not answer, or not as a vLLM server does.",
        "instance_unreachable",
        "localhost:8000 did not send its metrics within 2 s",
    ),
    507: ("The disk that files are kept on is full.", "disk_full", "the disk that files are kept on is full"),
    429: ("Full; nothing was enqueued. See `Retry-After`.", "queue_full", "full: 100 of 100 requests are in flight"),
    500: ("A fault of the gateway's.", "internal_error", "an internal error; the gateway's log has more"),
    503: (
        "Stopping, or the broker or the state store does not answer. See `Retry-After`.",
        "broker_unavailable",
        "the broker or the state store does not answer; try again shortly",
    ),
}
_RETRY_AFTER = {"Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer", "minimum": 1}}}
ID = {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}, "example": EXAMPLE_ID}
_WAIT = {
    "name": "wait",
    "in": "query",
    "description": "Seconds to wait for the result before answering.",
    "schema": {"type": "number", "minimum": 0, "maximum": 60},
}


def header(name: str, description: str, **schema: Any) -> dict[str, Any]:
    return {"name": name, "in": "header", "description": description, "schema": schema}


_REQUEST_ID = header(
    "X-Request-Id",
    "Comes back in the answer and in errors; made where it is left out.",
    type="string",
    pattern="^[!-~]{1,200}$",
)
_TRACEPARENT = header(
    "traceparent",
    "W3C trace context; it goes with the request to the workers, and comes back. `tracestate` goes with it.",
    type="string",
    example="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
)
_SUBMIT_HEADERS = [
    header(
        "Idempotency-Key",
        "A repeated request with the same key and content is the same request: it gets the first one's id.",
        type="string",
        pattern="^[!-~]{1,256}$",
    ),
    header("X-Muai-Priority", "As `priority` in the body.", type="integer", minimum=0, maximum=9),
    header("X-Muai-Deadline-S", "As `deadline_s` in the body.", type="number", minimum=MIN_DEADLINE_S),
    header("Prefer", "`wait=N` (RFC 7240): as the parameter `wait`, capped.", type="string"),
]


def content(schema: type, example: Any = None, examples: Any = None) -> dict[str, Any]:
    body: dict[str, Any] = {"schema": {"$ref": f"#/components/schemas/{schema.__name__}"}}
    body |= {"examples": examples} if examples else {"example": example}
    return {JSON: body}


def response(description: str, schema: type, example: Any) -> dict[str, Any]:
    return {"description": description, "content": content(schema, example)}


def _links(name: str) -> dict[str, Any]:
    """What can be done next with the id in an answer."""
    return {
        f"{verb}ById": {"operationId": operation, "parameters": {"id": f"$response.body#/{name}"}}
        for verb, operation in (("get", "getInference"), ("cancel", "cancelInference"))
    }


def _error(status: int) -> dict[str, Any]:
    description, code, message = _ERRORS[status]
    example = {"error": {"code": code, "message": message, "details": {}, "request_id": "9f1c0e7a52d84b6f"}}
    return response(description, ErrorBody, example) | ({"headers": _RETRY_AFTER} if status in (429, 503) else {})


def _always(name: str, errors: tuple[int, ...]) -> tuple[int, ...]:
    """The errors of an operation, with those that every one has."""
    return (*errors, 400, 500) if name in OPEN else (400, 401, *errors, 500, 503)


def operation(
    name: str, summary: str, responses: dict[int, Any], errors: tuple[int, ...], *parameters: Any, **extra: Any
) -> dict[str, Any]:
    """Keyword arguments of FastAPI's route decorators."""
    answers = {**responses, **{status: _error(status) for status in _always(name, errors)}}
    status, *_ = responses
    is_open = name in OPEN
    return {
        "operation_id": name,
        "summary": summary,
        "status_code": status,
        "response_description": responses[status]["description"],
        "responses": answers,
        "response_model": None,
        "openapi_extra": {
            "parameters": [*parameters, _REQUEST_ID, *(() if is_open else (_TRACEPARENT,))],
            **({"security": []} if is_open else {}),
            **extra,
        },
    }


SUBMIT = operation(
    "submitInference",
    "Submit a request",
    {
        202: response("Accepted, and not finished.", Receipt, _RECEIPT) | {"links": _links("id")},
        200: response("Waited for, and finished.", Standing, _DONE),
    },
    (400, 404, 408, 409, 413, 415, 429, 503),
    _WAIT,
    *_SUBMIT_HEADERS,
    requestBody={"required": True, "content": content(InferenceBody, examples=_BODIES)},
)
SUBMIT_MANY = operation(
    "submitMany",
    "Submit many requests, each accepted or refused by itself",
    {202: response("At least one was accepted.", ManyReceipts, _MANY)},
    (404, 408, 413, 415, 429),
    requestBody={"required": True, "content": content(ManyBody, examples=_MANY_BODIES)},
)
GET = operation(
    "getInference",
    "Where a request stands, and its result",
    {200: response("Known.", Standing, _STARTED)},
    (400, 404, 503),
    ID,
    _WAIT,
)
_EVENTS = (
    'id: 3-2f1c9a0b7d44\nevent: text\ndata: {"text":"The"}\n\n'
    ": still there\n\n"
    f'id: 3-2f1c9a0b7d44.end\nevent: end\ndata: {{"id":"{EXAMPLE_ID}","state":"SUCCESS", …}}\n\n'
)
_AFTER = "The id of the last event that was read; what follows it is sent, by whichever gateway."
STREAM = operation(
    "streamInference",
    "The text of a request as it is generated",
    {
        200: {
            "description": "Server-sent events. `text`: some more text. `restart`: what was told is void, and the text "
            "begins anew. `end`: the last, with what GET /v1/inference/{id} answers. Lines that begin with a colon "
            "keep the connection. A request without `stream`, or a finished one, tells its text at once.",
            "content": {"text/event-stream": {"schema": {}, "example": _EVENTS}},
        },
        204: {"description": "The last event was read already."},
    },
    (400, 404, 503),
    ID,
    header("Last-Event-ID", _AFTER, type="string"),
    {"name": "after", "in": "query", "description": _AFTER, "schema": {"type": "string"}},
)
CANCEL = operation(
    "cancelInference",
    "Cancel a request",
    {200: response("Cancelled; no result will replace that.", Standing, _REVOKED)},
    (404, 409, 503),
    ID,
)
MODELS = operation("listModels", "The models that there are", {200: response("All.", ModelList, _MODELS)}, (503,))
HEALTH = operation(
    "health",
    "How the installation does",
    {
        200: response("healthy or degraded.", Health, _HEALTH),
        503: response("unhealthy.", Health, {**_HEALTH, "status": "unhealthy", "queue_size": None}),
    },
    (),
)
READY = operation(
    "readiness",
    "Whether to send requests here",
    {
        200: response("Ready.", Readiness, _READY),
        503: response("Not ready.", Readiness, {**_READY, "ready": False, "reasons": ["no collector is running"]}),
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
WORKFLOWS = operation(
    "listWorkflows",
    "The workflows that there are, and what each takes",
    {200: response("All.", WorkflowList, {"data": [_WORKFLOW]})},
    (503,),
)
START_WORKFLOW = operation(
    "startWorkflow",
    "Start a run of a workflow; its result is fetched like that of a request",
    {
        202: response(
            "Started.",
            WorkflowReceipt,
            {"id": EXAMPLE_ID, "status_url": f"/v1/inference/{EXAMPLE_ID}", "state": "RECEIVED"},
        )
    },
    (400, 404, 408, 413, 415, 429, 503),
    _WORKFLOW_NAME,
    requestBody={"required": True, "content": content(WorkflowBody, examples={"rag": _RUN})},
)
_TYPES = (
    InferenceBody,
    ManyBody,
    Receipt,
    ManyReceipts,
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


def _complete(schemas: dict[str, Any]) -> None:
    """Say of what passes through undecoded what it is: its type does not show in the type of what carries it."""
    schemas["Standing"]["properties"]["result"] = {
        "anyOf": [{"$ref": "#/components/schemas/InferenceResult"}, {"type": "null"}]
    }
    # So do the requests of a POST of many: each is checked by itself.
    schemas["ManyBody"]["properties"]["requests"]["items"] = {"$ref": "#/components/schemas/InferenceBody"}


def _any_json(_: type) -> dict[str, Any]:
    """The schema of what passes through undecoded."""
    return {}


def document(app: FastAPI, more_types: tuple[type, ...] = (), *, is_gateway: bool = True) -> dict[str, Any]:
    """The document; made once, then kept by the application.

    Args:
        more_types: bodies and answers that are documented in other modules.
        is_gateway: whether the application has requests, results and OpenAI's paths at all.
    """
    if app.openapi_schema is None:
        made = get_openapi(title=app.title, version=app.version, description=DESCRIPTION, routes=app.routes)
        _, schemas = msgspec.json.schema_components(
            (*(_TYPES if is_gateway else ()), *more_types),
            ref_template="#/components/schemas/{name}",
            schema_hook=_any_json,
        )
        if is_gateway:
            _complete(schemas)
        for route in app.routes:
            if isinstance(route, APIRoute) and route.methods and route.include_in_schema:
                operation = made["paths"][route.path_format][min(route.methods).lower()]
                # As they were given: FastAPI leaves out what is null, in the examples too.
                operation["responses"] = {str(status): answer for status, answer in route.responses.items()}
        components = made.setdefault("components", {})
        components["schemas"] = {**schemas, **(openai_schemas() if is_gateway else {})}
        components["securitySchemes"] = SECURITY_SCHEMES
        made["security"] = [{name: []} for name in SECURITY_SCHEMES]
        app.openapi_schema = made
    return app.openapi_schema
