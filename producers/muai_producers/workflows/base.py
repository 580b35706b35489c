"""What a workflow is: named steps, each of which takes what is known so far and adds to it."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import msgspec

from muai_config import Settings
from muai_producers.errors import InvalidRequestError
from muai_producers.tracing import NO_TRACER, Tracer
from muai_producers.workflows.history import History, MemoryHistory
from muai_producers.workflows.inference import Inference, LocalInference
from muai_producers.workflows.passages import MemoryPassages, Passages
from muai_producers.workflows.search import SearchProvider, search_provider

State = dict[str, Any]
"""What is known in a run; plain JSON types, for it travels from step to step in messages."""


@dataclass(frozen=True)
class RunContext:
    """Who runs, and what may be used."""

    run_id: str
    tenant: str
    inference: Inference


@dataclass(frozen=True)
class Step:
    """One step. It may be run twice, after a crash, and must then change nothing more."""

    name: str
    run: Callable[[Any, State, RunContext], State]
    """Gets the parameters, what is known and the context; returns what it adds."""


@dataclass(frozen=True)
class Resources:
    """What outlives a run."""

    settings: Settings
    history: History
    passages: Passages
    search: SearchProvider
    tracer: Tracer = NO_TRACER
    """Of runs in this process."""

    @classmethod
    def in_memory(cls, settings: Settings) -> Resources:
        """Of this process alone."""
        passages = MemoryPassages()
        return cls(settings, MemoryHistory(), passages, search_provider(settings.workflows, passages))


class WorkflowParameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of what workflows are asked with."""


@dataclass(frozen=True)
class StepReport:
    """How one step went."""

    name: str
    took_ms: float


@dataclass(frozen=True)
class WorkflowOutcome:
    """What a run in process gives."""

    outputs: dict[str, Any]
    steps: tuple[StepReport, ...] = field(default=())


class Workflow:
    """A workflow, on the models of the configuration.

    Args:
        model_manager: runs the models in this process; None where the queue does.
        opt_manager: runs them on the best engine instead, where there is one.
        resources: conversations, documents and search; None: of this process alone.
    """

    name: ClassVar[str]
    description: ClassVar[str]
    parameters: ClassVar[type[WorkflowParameters]]
    examples: ClassVar[tuple[str, ...]] = ()
    """Questions that the router should send here."""

    def __init__(
        self,
        model_manager: Any = None,
        opt_manager: Any = None,
        *,
        settings: Settings | None = None,
        resources: Resources | None = None,
    ) -> None:
        self.resources = resources or Resources.in_memory(settings or Settings())
        self._inference = LocalInference(model_manager, opt_manager)

    def steps(self) -> tuple[Step, ...]:
        """The steps, in order; the last one adds `outputs`."""
        raise NotImplementedError

    def read(self, parameters: Mapping[str, Any]) -> Any:
        """The parameters, checked.

        Raises:
            InvalidRequestError: names the field and what is expected.
        """
        try:
            return msgspec.convert(dict(parameters), self.parameters)
        except msgspec.ValidationError as error:
            raise InvalidRequestError(f"workflow {self.name}: {error}", {"workflow": self.name}) from error

    def run_step(self, name: str, parameters: Mapping[str, Any], state: State, context: RunContext) -> State:
        """Run one step; returns all that is known afterwards."""
        step = next(step for step in self.steps() if step.name == name)
        return {**state, **step.run(self.read(parameters), state, context)}

    def execute(self, parameters: Mapping[str, Any], tenant: str = "default") -> WorkflowOutcome:
        """Run every step in this process.

        Raises:
            MuaiError: the parameters are wrong, or a step failed.
        """
        self.read(parameters)
        context = RunContext(str(uuid.uuid4()), tenant, self._inference)
        state: State = {}
        reports: list[StepReport] = []
        tracer = self.resources.tracer
        with tracer.trace_request(context.run_id), tracer.trace_workflow(self.name):
            for step in self.steps():
                started_s = time.perf_counter()
                with tracer.trace_workflow(step.name):
                    state = self.run_step(step.name, parameters, state, context)
                reports.append(StepReport(step.name, round((time.perf_counter() - started_s) * 1000, 3)))
        return WorkflowOutcome(state["outputs"], tuple(reports))

    def model_for(self, purpose: str) -> str:
        """The configured model for `chat` or `embedding`, else the catalog's first that serves it.

        Raises:
            InvalidRequestError: the catalog has none.
        """
        settings = self.resources.settings
        configured = settings.workflows.chat_model if purpose == "chat" else settings.workflows.embedding_model
        if configured is not None:
            return configured
        tasks = ("chat", "text-generation") if purpose == "chat" else ("embedding",)
        for task in tasks:
            for name, spec in settings.models.items():
                if spec.task == task:
                    return name
        raise InvalidRequestError(
            f"workflow {self.name} needs a model for {purpose}, and the catalog has none: add one under models, or "
            f"name it in workflows.{purpose}_model",
            {"workflow": self.name, "needs": purpose},
        )
