"""Runs of workflows over the queue: a Celery chain with a task for each step, whose result is fetched by the run's id.

A step that is delivered twice, after a crash, asks its models nothing twice (its requests have idempotency keys), and
the run's result is written once. So a chain that forked in a crash does no harm.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec
import redis
from celery import Celery, chain
from kombu.exceptions import OperationalError

from muai_config.queues import WORKFLOW
from muai_producers.errors import (
    BrokerError,
    DeadlineExceededError,
    MuaiError,
    QueueFullError,
    RequestCancelledError,
)
from muai_producers.store import (
    RECEIVED,
    REVOKED,
    STARTED,
    TERMINAL,
    Store,
    failure_answer,
    success_answer,
)
from muai_producers.tracing import NO_TRACER, Tracer
from muai_producers.tracing.context import Trace, current_trace
from muai_producers.wire import InferenceRequest, InferenceResult, Name
from muai_producers.workflows.base import Resources, RunContext, State
from muai_producers.workflows.history import RedisHistory
from muai_producers.workflows.inference import QueueInference
from muai_producers.workflows.orchestrator import AUTO, Orchestrator, question_of
from muai_producers.workflows.passages import RedisPassages
from muai_producers.workflows.search import search_provider
from muai_producers.workflows.tracing import run_ended, run_step

if TYPE_CHECKING:
    from muai_config import Settings
    from muai_producers.client import InferenceClient

STEP_TASK = "muai.workflow.step"
ROUTE_STEP = "route"
GRACE_S = 60.0
"""How long after its deadline a run still counts, if nobody has ended it."""

# KEYS: zset of runs by deadline. ARGV: now, most runs, run, deadline. Returns -1, or how many there are.
_COUNT_IN = """
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', ARGV[1])
local running = redis.call('ZCARD', KEYS[1])
if running >= tonumber(ARGV[2]) then return running end
redis.call('ZADD', KEYS[1], ARGV[4], ARGV[3])
return -1
"""


class Run(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One run, as its steps' messages carry it."""

    id: str
    workflow: str
    parameters: dict[str, Any]
    tenant: Name
    deadline: float
    """Wall-clock seconds since the epoch."""
    submitted_at: float
    reply_to: str | None = None
    trace: Trace = {}
    """As `InferenceRequest.trace`."""


def queue_resources(settings: Settings, store: Store) -> Resources:
    """What outlives a run, in the state store."""
    prefix = store.keys.prefix
    passages = RedisPassages(store.client, prefix)
    history = RedisHistory(store.client, prefix, settings.workflows.history_ttl_s)
    return Resources(settings, history, passages, search_provider(settings.workflows, passages))


class WorkflowRuns:
    """Submits runs, and runs their steps.

    Args:
        app: publishes the chain; its configuration is that of `celery_settings`.
        tracer: told how the runs that are traced fare.
    """

    def __init__(self, settings: Settings, client: InferenceClient, app: Celery, tracer: Tracer = NO_TRACER) -> None:
        self._settings = settings
        self._tracer = tracer
        self._client = client
        self._store = client.store
        self._app = app
        self._runs_key = f"{self._store.keys.prefix}:workflows"
        self.orchestrator = Orchestrator(settings, resources=queue_resources(settings, self._store))

    def submit(
        self,
        workflow: str,
        parameters: Mapping[str, Any],
        *,
        tenant: str = "default",
        timeout_s: float | None = None,
        run_id: str | None = None,
        reply_to: str | None = None,
        trace: Trace | None = None,
    ) -> str:
        """Start a run; returns its id, by which status and result are asked for like those of any request.

        Args:
            workflow: its name, or `auto` for what the router chooses.
            timeout_s: longest that the run may take; None, and at most: `workflows.timeout_s`.
            trace: of the caller's; None: of the code that calls.
        Raises:
            RequestNotFoundError: there is no such workflow.
            InvalidRequestError: the parameters are wrong.
            QueueFullError: as many runs as `monitoring.server.queue_capacity` allows are under way.
            BrokerError: broker or state store do not answer; nothing was started.
        """
        if workflow == AUTO:
            question_of(parameters)
        else:
            self.orchestrator.workflow(workflow).read(parameters)
        now_s = time.time()
        limit_s = self._settings.workflows.timeout_s
        run_id = run_id or str(uuid.uuid4())
        run = Run(
            id=run_id,
            workflow=workflow,
            parameters=dict(parameters),
            tenant=tenant,
            deadline=now_s + min(limit_s, timeout_s or limit_s),
            submitted_at=now_s,
            reply_to=reply_to,
            trace=trace or current_trace() or self._tracer.head(run_id),
        )
        try:
            self._count_in(run, now_s)
            self._store.mark(RECEIVED, [run.id], {"workflow": workflow}, tenant=run.tenant)
            self._publish(run, {})
        except (redis.RedisError, OperationalError) as error:
            raise BrokerError(f"the run was not started: {error}") from error
        return run.id

    def _count_in(self, run: Run, now_s: float) -> None:
        allowed = self._client.settings.monitoring.server.queue_capacity
        client: Any = self._store.client
        running = int(client.eval(_COUNT_IN, 1, self._runs_key, now_s - GRACE_S, allowed, run.id, run.deadline))
        if running >= 0:
            raise QueueFullError(
                f"full: {running} of {allowed} workflow runs are under way; try again later",
                {"limit": "queue_capacity", "allowed": allowed, "in_flight": running, "retry_after_s": 1.0},
            )

    def _publish(self, run: Run, state: State) -> None:
        names = [ROUTE_STEP] if run.workflow == AUTO else self._step_names(run.workflow)
        plain = msgspec.to_builtins(run)
        signatures = [
            self._app.signature(
                STEP_TASK,
                args=(state,) if number == 0 else (),
                kwargs={"run": plain, "step": name},
                queue=WORKFLOW,
                task_id=f"{run.id}/{run.workflow}/{name}",
            )
            for number, name in enumerate(names)
        ]
        chain(*signatures).apply_async()

    def _step_names(self, workflow: str) -> list[str]:
        return [step.name for step in self.orchestrator.workflow(workflow).steps()]

    def take_step(self, run: Run, step: str, state: State) -> State | None:
        """Run one step; returns what the next one is given, or None when the run is over.

        Raises:
            redis.exceptions.RedisError, kombu.exceptions.OperationalError, BrokerError: run it again later.
        """
        try:
            self._check(run)
            with run_step(self._tracer, run, step):
                if step != ROUTE_STEP:
                    return self._take(run, step, state)
                self._take_route(run, state)
                return None  # the chain of the chosen workflow goes on
        except BrokerError:
            raise
        except MuaiError as error:
            ending = REVOKED if isinstance(error, RequestCancelledError) else None
            state_of_end = {"state": ending} if ending else {}
            self._end(run, failure_answer(run.id, error, run.reply_to, tenant=run.tenant, **state_of_end), error)
            return None

    def _check(self, run: Run) -> None:
        (stored,) = self._store.states([run.id])
        if stored is not None and stored.status in TERMINAL:
            raise RequestCancelledError(f"workflow run {run.id} has ended already", {"request_id": run.id})
        if time.time() >= run.deadline:
            raise DeadlineExceededError(f"workflow run {run.id} did not end in time", {"deadline": run.deadline})

    def _take_route(self, run: Run, state: State) -> None:
        question = question_of(run.parameters)
        route = self.orchestrator.route(question, self._inference(run))
        name, parameters = self.orchestrator.directed(question, run.parameters, self._inference(run))
        told = {"workflow": name, "confidence": route.confidence, "reason": route.reason}
        directed = msgspec.structs.replace(run, workflow=name, parameters=parameters)
        self.orchestrator.workflow(name).read(parameters)
        self._publish(directed, {**state, "route": told})

    def _take(self, run: Run, step: str, state: State) -> State | None:
        workflow = self.orchestrator.workflow(run.workflow)
        names = self._step_names(run.workflow)
        number = names.index(step)
        reports = state.get("steps", [])
        progress = {"workflow": run.workflow, "step": step, "number": number + 1, "of": len(names), "steps": reports}
        self._store.mark(STARTED, [run.id], progress, tenant=run.tenant)
        started_s = time.monotonic()
        context = RunContext(run.id, run.tenant, self._inference(run))
        known = workflow.run_step(step, run.parameters, state, context)
        took_ms = round((time.monotonic() - started_s) * 1000, 3)
        known["steps"] = [*reports, {"name": step, "took_ms": took_ms}]
        if number + 1 < len(names):
            return known
        self._end(run, success_answer(_as_request(run), _result(run, known)))
        return None

    def _inference(self, run: Run) -> QueueInference:
        return QueueInference(self._client, run.id, run.tenant, run.deadline)

    def _end(self, run: Run, answer: Any, error: MuaiError | None = None) -> None:
        (is_first,) = self._store.answer([answer])
        if is_first:
            run_ended(self._tracer, run, error)
        client: Any = self._store.client
        client.zrem(self._runs_key, run.id)


def _as_request(run: Run) -> InferenceRequest:
    return InferenceRequest(
        id=run.id, model=f"workflow/{run.workflow}", inputs={}, tenant=run.tenant, reply_to=run.reply_to
    )


def _result(run: Run, known: State) -> InferenceResult:
    requests = known.get("requests", [])
    metadata = {
        "request_id": run.id,
        "workflow": run.workflow,
        "steps": known["steps"],
        "requests": requests,
        "attempts": [],
    }
    if "route" in known:
        metadata["route"] = known["route"]
    return InferenceResult(
        outputs=known["outputs"],
        engine_used=requests[-1]["engine"] if requests else "",
        latency_ms=round((time.time() - run.submitted_at) * 1000, 3),
        batch_size=1,
        cache_hit=False,
        metadata=metadata,
    )
