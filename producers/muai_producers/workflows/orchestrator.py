"""`Orchestrator`: the workflows of one configuration, run in this process, with the router before them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from muai_config import Settings
from muai_producers.errors import InvalidRequestError, RequestNotFoundError
from muai_producers.workflows.base import Resources, Workflow, WorkflowOutcome
from muai_producers.workflows.chat import ChatGenerateWorkflow
from muai_producers.workflows.inference import Inference, LocalInference
from muai_producers.workflows.rag import IngestWorkflow, RAGQAWorkflow
from muai_producers.workflows.router import CHAT, Route, Router
from muai_producers.workflows.search_qa import SearchQAWorkflow

WORKFLOWS: tuple[type[Workflow], ...] = (ChatGenerateWorkflow, RAGQAWorkflow, SearchQAWorkflow, IngestWorkflow)
AUTO = "auto"
"""Stands for whatever workflow the router chooses."""


class Orchestrator:
    """Holds the workflows, and runs them in this process.

    Args:
        model_manager: runs the models; None where runs go over the queue.
        opt_manager: runs them on the best engine instead.
    """

    def __init__(
        self,
        settings: Settings,
        model_manager: Any = None,
        opt_manager: Any = None,
        *,
        resources: Resources | None = None,
    ) -> None:
        self.settings = settings
        self.resources = resources or Resources.in_memory(settings)
        self.workflows: dict[str, Workflow] = {
            kind.name: kind(model_manager, opt_manager, resources=self.resources) for kind in WORKFLOWS
        }
        self._inference = LocalInference(model_manager, opt_manager)

    def workflow(self, name: str) -> Workflow:
        """The workflow of that name.

        Raises:
            RequestNotFoundError: there is none; the message names those there are.
        """
        try:
            return self.workflows[name]
        except KeyError:
            known = ", ".join((*self.workflows, AUTO))
            raise RequestNotFoundError(
                f"there is no workflow {name!r}; there are {known}", {"workflow": name}
            ) from None

    def route(self, question: str, inference: Inference | None = None) -> Route:
        """Which workflow a question is for; `inference` asks the embedding model, where there is one."""
        examples = {name: workflow.examples for name, workflow in self.workflows.items() if workflow.examples}
        threshold = self.settings.workflows.routing_threshold
        has_model = any(spec.task == "embedding" for spec in self.settings.models.values())
        if not has_model:
            return Router(examples, threshold=threshold).route(question)
        asking = inference or self._inference
        model = self.workflows[CHAT].model_for("embedding")

        def embed(texts: Sequence[str]) -> list[list[float]]:
            inputs = [{"text": text} for text in texts]
            step = f"route/{len(texts)}"
            asked = asking.infer(model, inputs, step=step, parameters={"truncate": True})
            return [one.outputs["embedding"] for one in asked]

        return Router(examples, embed, threshold=threshold).route(question)

    def execute_workflow(self, name: str, parameters: Mapping[str, Any], tenant: str = "default") -> WorkflowOutcome:
        """Run a workflow here, from its first step to its last.

        Raises:
            MuaiError: there is no such workflow, its parameters are wrong, or a step failed.
        """
        if name == AUTO:
            question = question_of(parameters)
            name, parameters = self.directed(question, parameters)
        return self.workflow(name).execute(parameters, tenant)

    def directed(
        self, question: str, parameters: Mapping[str, Any], inference: Inference | None = None
    ) -> tuple[str, dict[str, Any]]:
        """The workflow that a question goes to, and its parameters there."""
        route = self.route(question, inference)
        return route.workflow, _fitted(self.workflow(route.workflow), question, parameters)


def question_of(parameters: Mapping[str, Any]) -> str:
    """The question of a run that leaves the workflow open.

    Raises:
        InvalidRequestError: there is none.
    """
    question = parameters.get("question")
    if not isinstance(question, str) or not question.strip():
        raise InvalidRequestError("workflow auto: `question` must be a text that is not empty", {"field": "question"})
    return question


def _fitted(workflow: Workflow, question: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Of `parameters`, those that the workflow takes, with the question where it wants it."""
    takes = set(workflow.parameters.__struct_fields__)
    fitted = {key: value for key, value in parameters.items() if key in takes}
    fitted["question" if "question" in takes else "message"] = question
    return fitted
