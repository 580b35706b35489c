"""Workflows over HTTP: what there is, and a run of one. A run's status and result are those of any request."""

from __future__ import annotations

import asyncio
import functools
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any

import msgspec
from celery import Celery
from fastapi import FastAPI, Request, Response

from muai_config import celery_settings
from muai_producers.errors import InvalidRequestError
from muai_producers.gateway import openapi
from muai_producers.gateway.callers import Doorkeeper, caller_of
from muai_producers.gateway.failures import JSON_TYPE
from muai_producers.gateway.reading import headers_of, read_json, trace_of
from muai_producers.gateway.standing import status_url
from muai_producers.gateway.workflow_bodies import WorkflowBody, WorkflowEntry, WorkflowList, WorkflowReceipt
from muai_producers.tracing import NO_TRACER, Tracer
from muai_producers.workflows.orchestrator import AUTO
from muai_producers.workflows.runs import WorkflowRuns

if TYPE_CHECKING:
    from collections.abc import Callable

    from muai_config import Settings
    from muai_producers.client import InferenceClient
    from muai_producers.gateway.results import ResultHub


class WorkflowRoutes:
    """The endpoints. Publishing a run blocks, and happens on `executor`."""

    def __init__(
        self,
        settings: Settings,
        client: InferenceClient,
        hub: ResultHub,
        doorkeeper: Doorkeeper,
        executor: Executor,
        tracer: Tracer = NO_TRACER,
    ) -> None:
        app = Celery("muai.gateway", set_as_current=False)
        app.conf.update(celery_settings(settings, "producer"))
        self._runs = WorkflowRuns(settings, client, app, tracer)
        self._hub = hub
        self._doorkeeper = doorkeeper
        self._executor = executor
        self._list = msgspec.json.encode(WorkflowList(data=self._entries()))

    def register(self, app: FastAPI, check_size: Callable[[int], None]) -> None:
        """Give the application the paths.

        Args:
            check_size: raises when a body may not have so many bytes.
        """
        self._check_size = check_size
        app.router.get("/v1/workflows", **openapi.WORKFLOWS)(self.list)
        app.router.post("/v1/workflows/{name}", **openapi.START_WORKFLOW)(self.start)

    def _entries(self) -> list[WorkflowEntry]:
        entries = [
            WorkflowEntry(name=name, description=workflow.description, parameters=_schema(workflow.parameters))
            for name, workflow in self._runs.orchestrator.workflows.items()
        ]
        schema = {"type": "object", "required": ["question"], "properties": {"question": {"type": "string"}}}
        chosen = "Whichever of chat, rag and search fits the question; the result's metadata says which, and why."
        return [*entries, WorkflowEntry(name=AUTO, description=chosen, parameters=schema)]

    async def list(self, request: Request) -> Response:
        """The workflows, with what each takes."""
        return Response(self._list, media_type=JSON_TYPE)

    async def start(self, request: Request) -> Response:
        """Start a run."""
        raw = await read_json(request, headers_of(request), self._check_size)
        try:
            body = msgspec.json.decode(raw, type=WorkflowBody)
        except msgspec.DecodeError as error:
            raise InvalidRequestError(f"the body: {error}", {"field": "body"}) from error
        caller = caller_of(request)
        await self._doorkeeper.charge(caller)
        submit = functools.partial(
            self._runs.submit,
            request.path_params["name"],
            body.parameters,
            tenant=caller.tenant,
            timeout_s=body.timeout_s,
            run_id=self._hub.new_id(),
            reply_to=self._hub.reply_channel,
            trace=trace_of(request),
        )
        run_id = await asyncio.get_running_loop().run_in_executor(self._executor, submit)
        receipt = WorkflowReceipt(id=run_id, status_url=status_url(run_id))
        return Response(msgspec.json.encode(receipt), 202, {"location": receipt.status_url}, JSON_TYPE)


def _schema(parameters: type[msgspec.Struct]) -> dict[str, Any]:
    """The parameters' JSON schema, whole in itself."""
    (schema,), components = msgspec.json.schema_components([parameters], ref_template="#/$defs/{name}")
    name = schema["$ref"].rsplit("/", 1)[-1]
    own = components.pop(name)
    return {**own, "$defs": components} if components else own
