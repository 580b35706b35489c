"""The OpenAPI document: files."""

from __future__ import annotations

from typing import Any

from muai_producers.files.records import FileDeleted, FileList, FileObject
from muai_producers.gateway.openapi import operation, response

TYPES = (FileObject, FileList, FileDeleted)
FILE_ID = "file-4f5ae7d0c0b94d0e8d3e5b7a1c2d3e4f"
_FILE = {
    "id": FILE_ID,
    "object": "file",
    "bytes": 2048,
    "created_at": 1_790_000_000,
    "expires_at": 1_792_592_000,
    "filename": "questions.jsonl",
    "purpose": "batch",
    "status": "processed",
}
_PAGE = {"object": "list", "data": [_FILE], "first_id": FILE_ID, "last_id": FILE_ID, "has_more": False}
FILE_PARAMETER = {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}, "example": FILE_ID}
PAGE_PARAMETERS: tuple[dict[str, Any], ...] = (
    {"name": "limit", "in": "query", "schema": {"type": "integer", "minimum": 1, "maximum": 10_000}},
    {
        "name": "after",
        "in": "query",
        "description": "The page after the one that ends here.",
        "schema": {"type": "string"},
    },
    {"name": "order", "in": "query", "schema": {"type": "string", "enum": ["asc", "desc"]}},
)
_FORM = {
    "type": "object",
    "required": ["purpose", "file"],
    "properties": {
        "purpose": {"type": "string", "enum": ["batch", "user_data"]},
        "file": {"type": "string", "format": "binary"},
        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
        "expires_after[seconds]": {"type": "integer", "minimum": 3600},
    },
}


def _links() -> dict[str, Any]:
    verbs = (("get", "getFile"), ("content", "getFileContent"), ("delete", "deleteFile"))
    return {f"{verb}ById": {"operationId": name, "parameters": {"id": "$response.body#/id"}} for verb, name in verbs}


UPLOAD = operation(
    "uploadFile",
    "Upload a file",
    {200: response("Kept.", FileObject, _FILE) | {"links": _links()}},
    (408, 413, 415, 507),
    requestBody={"required": True, "content": {"multipart/form-data": {"schema": _FORM}}},
)
LIST = operation(
    "listFiles",
    "The files that there are, newest first",
    {200: response("A page.", FileList, _PAGE)},
    (),
    {
        "name": "purpose",
        "in": "query",
        "schema": {"type": "string", "enum": ["batch", "batch_output", "user_data"]},
    },
    *PAGE_PARAMETERS,
)
GET = operation(
    "getFile", "What is known of a file", {200: response("Known.", FileObject, _FILE)}, (404,), FILE_PARAMETER
)
CONTENT = operation(
    "getFileContent",
    "A file's content",
    {
        200: {
            "description": "All of it.",
            "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
        },
        206: {"description": "The part that the header Range asks for."},
    },
    (404,),
    FILE_PARAMETER,
)
DELETE = operation(
    "deleteFile",
    "Delete a file",
    {200: response("Gone.", FileDeleted, {"id": FILE_ID, "object": "file", "deleted": True})},
    (404, 409),
    FILE_PARAMETER,
)
