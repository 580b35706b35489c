"""The OpenAPI document: batches of requests from files."""

from __future__ import annotations

from typing import Any

from muai_producers.batches.records import BatchBody, BatchList, BatchObject
from muai_producers.gateway.openapi import content, header, operation, response
from muai_producers.gateway.openapi_files import FILE_ID, PAGE_PARAMETERS

TYPES = (BatchBody, BatchObject, BatchList)
BATCH_ID = "batch_8c1b5d0e9a532f1f6b0f7d1107a3c9e2"
_BATCH: dict[str, Any] = {
    "id": BATCH_ID,
    "object": "batch",
    "endpoint": "/v1/embeddings",
    "errors": None,
    "input_file_id": FILE_ID,
    "completion_window": "24h",
    "status": "in_progress",
    "output_file_id": None,
    "error_file_id": None,
    "created_at": 1_790_000_000,
    "in_progress_at": 1_790_000_001,
    "expires_at": 1_790_086_400,
    "finalizing_at": None,
    "completed_at": None,
    "failed_at": None,
    "expired_at": None,
    "cancelling_at": None,
    "cancelled_at": None,
    "request_counts": {"total": 1000, "completed": 250, "failed": 1},
    "metadata": {"night": "monday"},
}
_PAGE = {"object": "list", "data": [_BATCH], "first_id": BATCH_ID, "last_id": BATCH_ID, "has_more": False}
_BODY = {
    "embeddings": {
        "summary": "Embed every line of a file",
        "value": {
            "input_file_id": FILE_ID,
            "endpoint": "/v1/embeddings",
            "completion_window": "24h",
            "metadata": {"night": "monday"},
        },
    }
}
_BATCH_PARAMETER = {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}, "example": BATCH_ID}


def _links() -> dict[str, Any]:
    verbs = (("get", "getBatch"), ("cancel", "cancelBatch"))
    return {f"{verb}ById": {"operationId": name, "parameters": {"id": "$response.body#/id"}} for verb, name in verbs}


CREATE = operation(
    "createBatch",
    "Run every line of a file",
    {200: response("Accepted; it goes on whatever is restarted.", BatchObject, _BATCH) | {"links": _links()}},
    (404, 408, 409, 413, 415, 429),
    header(
        "Idempotency-Key",
        "A repeated call with the same key is the same batch.",
        type="string",
        pattern="^[!-~]{1,256}$",
    ),
    requestBody={"required": True, "content": content(BatchBody, examples=_BODY)},
)
LIST = operation(
    "listBatches",
    "The batches that there are, newest first",
    {200: response("A page.", BatchList, _PAGE)},
    (),
    *PAGE_PARAMETERS,
)
GET = operation(
    "getBatch", "How far a batch is", {200: response("Known.", BatchObject, _BATCH)}, (404,), _BATCH_PARAMETER
)
CANCEL = operation(
    "cancelBatch",
    "Cancel a batch",
    {
        200: response(
            "Being cancelled; what is done by then can be read.", BatchObject, {**_BATCH, "status": "cancelling"}
        )
    },
    (404, 409),
    _BATCH_PARAMETER,
)
