"""`VLLMEngine`: generation with continuous batching, on GPUs or with vLLM's CPU build."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# Read when vLLM is imported: nothing is reported to its makers unless someone says so, and what a Celery worker's
# threads start must not be forked from it.
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")

import vllm
from transformers import AutoConfig
from vllm.config import StructuredOutputsConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.v1.engine.async_llm import AsyncLLM

from muai_config import ModelSpec, Settings
from muai_config.catalog import DECODING_TASKS
from muai_producers.errors import EngineError, EngineUnavailableError, ModelLoadError
from muai_producers.wire import InferenceRequest, Parameters, new_request_id
from muai_workers.engines.base import Availability, CacheStatistics, Capabilities, Completion, Piece
from muai_workers.engines.cache_salts import CacheSalts
from muai_workers.engines.failures import raising_engine_errors, raising_load_errors
from muai_workers.engines.loading import LoadedModels, refuse_task
from muai_workers.engines.tokens import TextTokenizer, input_limit
from muai_workers.engines.vllm_model import VLLMModel
from muai_workers.engines.vllm_plan import (
    DTYPES,
    Device,
    VLLMPlan,
    plan_vllm,
    thread_binding,
    tool_parser_of,
    vllm_dtype,
    weight_item_bytes,
)
from muai_workers.engines.vllm_tools import ToolReader
from muai_workers.models.source import resolve_source
from muai_workers.models.weights import count_parameters, weight_files

log = logging.getLogger(__name__)


class VLLMEngine:
    """Admits the requests of all batches to vLLM's running engine, one for each model."""

    name = "vllm"

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._models: LoadedModels[VLLMModel] = LoadedModels()
        self._salts = CacheSalts()
        self._caches = settings.optimization.cache.enabled
        self.capabilities = Capabilities(
            tasks=frozenset(DECODING_TASKS),
            dtypes=frozenset({"auto", *DTYPES}),
            continuous_batching=True,
            streaming=True,
            abort=True,
            kv_reuse=self._caches,
            structured_output=True,
            tensor_parallel=True,
            pipeline_parallel=True,
        )

    def availability(self) -> Availability:
        if current_platform.is_unspecified():
            return Availability(False, f"vllm {vllm.__version__} finds no device that it was built for")
        device = "the CPU" if self._device == "cpu" else current_platform.get_device_name()
        return Availability(True, f"vllm {vllm.__version__} on {device}")

    def is_available(self) -> bool:
        """The specification's short form of `availability`."""
        return self.availability().available

    def refusal(self, spec: ModelSpec) -> str | None:
        if spec.task not in DECODING_TASKS:
            return f"the vllm engine has no {spec.task}: it generates text"
        return None

    def load(self, spec: ModelSpec) -> None:
        self._model(spec)

    def load_model(self, model_name: str, tensor_parallel_size: int | None = None, dtype: str | None = None) -> bool:
        """The specification's form of `load`: a model of the catalog, with other settings than the configured ones
        where they are given.

        Returns:
            whether it is loaded; the log says why not.
        """
        spec = self._settings.model(model_name)
        if dtype is not None:
            spec = spec.model_copy(update={"dtype": dtype})
        settings = self._settings
        if tensor_parallel_size is not None:
            changed = settings.optimization.vllm.model_copy(update={"tensor_parallel_size": tensor_parallel_size})
            optimization = settings.optimization.model_copy(update={"vllm": changed})
            settings = settings.model_copy(update={"optimization": optimization})
        try:
            self._models.get_or_load(spec.name, lambda: self._load(spec, settings))
        except EngineError as error:
            log.warning("vllm could not load %s: %s", model_name, error)
            return False
        return True

    def generate(
        self, model_name: str, prompts: Sequence[str], parameters: Parameters | None = None
    ) -> list[dict[str, Any]]:
        """The specification's form of `run`: the outputs of each prompt, in their order.

        Raises:
            MuaiError: a prompt could not be served; the first of them.
        """
        requests = [
            InferenceRequest(
                id=new_request_id(), model=model_name, inputs={"prompt": prompt}, parameters=parameters or Parameters()
            )
            for prompt in prompts
        ]
        events = self.run(self._settings.model(model_name), "text-generation", requests)
        done = {event.request_id: event for event in events if isinstance(event, Completion)}
        answers: list[dict[str, Any]] = []
        for request in requests:
            completion = done[request.id]
            if completion.error is not None:
                raise completion.error
            assert completion.output is not None
            answers.append(completion.output.outputs)
        return answers

    def unload(self, model: str) -> None:
        self._models.drop(model)

    def loaded(self) -> tuple[str, ...]:
        return self._models.names()

    def estimate_memory_bytes(self, spec: ModelSpec) -> int:
        with raising_load_errors(spec.name, self.name):
            dtype = vllm_dtype(spec, self._settings.optimization.vllm, self._device)
            return count_parameters(self._folder(spec)) * weight_item_bytes(dtype)

    def run(self, spec: ModelSpec, task: str, requests: Sequence[InferenceRequest]) -> Iterator[Completion | Piece]:
        model = self._model(spec)
        if not model.serves(task):
            yield from refuse_task(spec, task, requests)
            return
        try:
            with raising_engine_errors():
                yield from model.run(task, requests)
        except EngineUnavailableError:
            # The next request for the model starts another.
            self._models.drop_this(spec.name, model)
            raise

    def abort(self, request_ids: Collection[str]) -> None:
        self._models.abort(request_ids)

    def cache_statistics(self) -> Mapping[str, CacheStatistics]:
        return {name: model.cache_statistics() for name, model in self._models.items()} if self._caches else {}

    def end_conversation(self, tenant: str, conversation_id: str) -> None:
        self._salts.forget(tenant, conversation_id)

    def reconfigure(self, settings: Settings) -> None:
        self._settings = settings

    def close(self) -> None:
        self._models.drop_all()

    @property
    def _device(self) -> Device:
        return "cpu" if current_platform.is_cpu() else "cuda"

    def _model(self, spec: ModelSpec) -> VLLMModel:
        return self._models.get_or_load(spec.name, lambda: self._load(spec))

    def _folder(self, spec: ModelSpec) -> Path:
        return resolve_source(spec, self._settings.model_cache.cache_dir)

    def _load(self, spec: ModelSpec, settings: Settings | None = None) -> VLLMModel:
        reason = self.refusal(spec)
        if reason is not None:
            raise ModelLoadError(reason, {"model": spec.name, "engine": self.name})
        folder = self._folder(spec)
        with raising_load_errors(spec.name, self.name):
            if not weight_files(folder):
                raise ModelLoadError(f"{spec.name}: {folder} holds no .safetensors weights", {"model": spec.name})
            plan = plan_vllm(spec, folder, settings or self._settings, self._device)
            for one in plan.degraded:
                log.warning("%s on vllm: %s", spec.name, one)
            self._bind_threads(plan.num_ranks)
            tokenizer = TextTokenizer(folder, trust_remote_code=spec.trust_remote_code)
            config = AutoConfig.from_pretrained(folder, trust_remote_code=spec.trust_remote_code, local_files_only=True)
            parser = tool_parser_of(spec, tokenizer.chat_template)
            return VLLMModel(
                spec,
                tokenizer,
                lambda: AsyncLLM.from_engine_args(_engine_args(plan)),
                limit_tokens=input_limit(spec, folder, config, tokenizer),
                salts=self._salts,
                reader=None if parser is None else ToolReader(parser, tokenizer.transformers_tokenizer),
                caches=self._caches,
                extra={"device": self._device, "dtype": plan.arguments["dtype"]},
            )

    def _bind_threads(self, ranks: int) -> None:
        binding = thread_binding(sorted(os.sched_getaffinity(0)), ranks) if self._device == "cpu" else None
        if binding is not None:
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", binding)


def _engine_args(plan: VLLMPlan) -> AsyncEngineArgs:
    shapes = StructuredOutputsConfig(**plan.shapes)
    return AsyncEngineArgs(**plan.arguments, structured_outputs_config=shapes, disable_log_stats=True)


def create(settings: Settings) -> VLLMEngine:
    """For the registry."""
    return VLLMEngine(settings)
