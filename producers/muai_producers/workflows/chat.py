"""`ChatGenerateWorkflow`: the next turn of a conversation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta

from muai_config import ModelSpec
from muai_producers.wire import Name
from muai_producers.workflows.base import RunContext, State, Step, Workflow, WorkflowParameters

Text = Annotated[str, Meta(min_length=1, max_length=100_000, pattern=r"\S")]


class ChatParameters(WorkflowParameters, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a chat is asked with."""

    message: Text
    conversation_id: Name | None = None
    """Turns of one conversation are remembered, and its keys and values kept by the engine."""
    system: str | None = None
    """How to answer; the first turn of what the model sees."""
    max_tokens: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    temperature: Annotated[float, Meta(ge=0.0, le=2.0)] = 0.0


class ChatGenerateWorkflow(Workflow):
    """Answers a message, knowing what was said before."""

    name = "chat"
    description = "Answers a message, knowing the earlier turns of its conversation."
    parameters = ChatParameters
    examples = ("Hello, how are you?", "Tell me a story", "Write a short poem about the sea", "Translate this sentence")

    def steps(self) -> tuple[Step, ...]:
        """Recall, generate, remember."""
        return Step("recall", self._recall), Step("generate", self._generate), Step("remember", self._remember)

    def _recall(self, parameters: ChatParameters, state: State, context: RunContext) -> State:
        if parameters.conversation_id is None:
            return {"history": []}
        limit = self.resources.settings.workflows.history_turns
        return {"history": self.resources.history.turns(context.tenant, parameters.conversation_id, limit)}

    def _generate(self, parameters: ChatParameters, state: State, context: RunContext) -> State:
        turns = [{"role": "system", "content": parameters.system}] if parameters.system else []
        turns += [*state["history"], {"role": "user", "content": parameters.message}]
        options: dict[str, Any] = {"temperature": parameters.temperature}
        if parameters.max_tokens is not None:
            options["max_tokens"] = parameters.max_tokens
        return answer_of(self, turns, options, context, parameters.conversation_id)

    def _remember(self, parameters: ChatParameters, state: State, context: RunContext) -> State:
        if parameters.conversation_id is not None:
            turns = [
                {"role": "user", "content": parameters.message},
                {"role": "assistant", "content": state["outputs"]["answer"]},
            ]
            self.resources.history.append(context.tenant, parameters.conversation_id, context.run_id, turns)
        return {"outputs": {**state["outputs"], "conversation_id": parameters.conversation_id}}


def answer_of(
    workflow: Workflow,
    turns: list[dict[str, str]],
    options: dict[str, Any],
    context: RunContext,
    conversation_id: str | None = None,
) -> State:
    """Have the chat model answer `turns`; models that do not chat are given them as plain text."""
    model = workflow.model_for("chat")
    spec = workflow.resources.settings.models[model]
    (asked,) = context.inference.infer(
        model, [_inputs(spec, turns)], step="generate", parameters=options, conversation_id=conversation_id
    )
    outputs = {"answer": asked.outputs["text"].strip(), "finish_reason": asked.outputs.get("finish_reason")}
    request = {"request_id": asked.request_id, "model": model, "engine": asked.engine, "usage": dict(asked.usage)}
    return {"outputs": outputs, "requests": [request]}


def _inputs(spec: ModelSpec, turns: list[dict[str, str]]) -> dict[str, Any]:
    task: Literal["chat"] | str = spec.task
    if task == "chat":
        return {"messages": turns}
    lines = [f"{turn['role'].capitalize()}: {turn['content']}" for turn in turns]
    return {"prompt": "\n".join([*lines, "Assistant:"])}
