"""What the steps of a workflow ask their models through: the queue, or managers in this process."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from muai_producers.client import InferenceClient
from muai_producers.errors import DeadlineExceededError, IdempotencyConflictError, MuaiError, ResultTimeoutError
from muai_producers.wire import Parameters


@dataclass(frozen=True)
class Asked:
    """One request of a step, answered."""

    outputs: dict[str, Any]
    engine: str = ""
    request_id: str = ""
    usage: Mapping[str, int] = field(default_factory=dict)


class Inference(Protocol):
    """Runs the requests of one step together."""

    def infer(
        self,
        model: str,
        inputs: Sequence[Mapping[str, Any]],
        *,
        step: str,
        parameters: Mapping[str, Any] | None = None,
        conversation_id: str | None = None,
    ) -> list[Asked]:
        """One answer for each of `inputs`, in order.

        Args:
            step: name of the step that asks, once per run: what makes a repeated step ask nothing twice.
        Raises:
            MuaiError: what the first request that failed ended with.
        """
        ...


class QueueInference:
    """Each request goes through the queue, like any other.

    Its idempotency key names the run and the step, so a step that is run again after a crash gets the answers of the
    requests that it made the first time.

    Args:
        deadline_s: wall-clock seconds by which the whole run must be over.
    """

    def __init__(self, client: InferenceClient, run_id: str, tenant: str, deadline_s: float) -> None:
        self._client = client
        self._run_id = run_id
        self._tenant = tenant
        self._deadline_s = deadline_s

    def infer(
        self,
        model: str,
        inputs: Sequence[Mapping[str, Any]],
        *,
        step: str,
        parameters: Mapping[str, Any] | None = None,
        conversation_id: str | None = None,
    ) -> list[Asked]:
        """See `Inference.infer`."""
        left_s = self._deadline_s - time.time()
        if left_s <= 0:
            raise self._too_late(step)
        ids = [
            self._submit(
                {
                    "model": model,
                    "inputs": one,
                    "parameters": dict(parameters or {}),
                    "tenant": self._tenant,
                    "conversation_id": conversation_id,
                    "deadline": self._deadline_s,
                    "idempotency_key": f"workflow/{self._run_id}/{step}/{number}",
                }
            )
            for number, one in enumerate(inputs)
        ]
        try:
            outcomes = dict(self._client.results(ids, timeout_s=left_s))
        except ResultTimeoutError as error:
            raise self._too_late(step) from error
        return [_asked(request_id, outcomes[request_id]) for request_id in ids]

    def _submit(self, fields: Mapping[str, Any]) -> str:
        """The id of the request, or of the one that this step of this run made before.

        After a crash a step may run again from another state: what a conversation remembers has grown meanwhile. The
        key is the run's own, so what was asked first is what the run asked.
        """
        try:
            (request_id,) = self._client.submit_many([fields])
        except IdempotencyConflictError as error:
            return str(error.details["request_id"])
        return request_id

    def _too_late(self, step: str) -> DeadlineExceededError:
        return DeadlineExceededError(
            f"workflow run {self._run_id} did not end in time; it was at the step {step!r}",
            {"deadline": self._deadline_s, "step": step},
        )


def _asked(request_id: str, outcome: Any) -> Asked:
    if isinstance(outcome, MuaiError):
        raise outcome
    usage = outcome.metadata.get("usage") or {}
    return Asked(outcome.outputs, outcome.engine_used, request_id, usage)


class LocalInference:
    """In this process: through an `OptimizationManager` where there is one, else through a `ModelManager`."""

    def __init__(self, model_manager: Any, opt_manager: Any = None) -> None:
        self._model_manager = model_manager
        self._opt_manager = opt_manager

    def infer(
        self,
        model: str,
        inputs: Sequence[Mapping[str, Any]],
        *,
        step: str,
        parameters: Mapping[str, Any] | None = None,
        conversation_id: str | None = None,
    ) -> list[Asked]:
        """See `Inference.infer`."""
        told = msgspec.convert(dict(parameters or {}), Parameters)
        if self._opt_manager is not None:
            return [_asked("", one) for one in self._opt_manager.infer_many(model, inputs, parameters=told)]
        answers = [self._model_manager.infer(model, one, told) for one in inputs]
        return [
            Asked(one.outputs, "pytorch", "", {"input_tokens": one.input_tokens, "output_tokens": one.output_tokens})
            for one in answers
        ]
