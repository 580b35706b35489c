"""`PyTorchEngine`: every task, on CPU or GPU; the last of every chain."""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from muai_config import ModelSpec, Settings
from muai_config.catalog import DECODING_TASKS
from muai_config.slots import batches_continuously
from muai_producers.errors import OutOfMemoryError
from muai_producers.wire import INPUT_FIELD, InferenceRequest
from muai_workers.engines.base import Availability, CacheStatistics, Capabilities, Completion, Piece
from muai_workers.engines.decode_loop import LoopLimits
from muai_workers.engines.encoder import Encoder
from muai_workers.engines.failures import raising_engine_errors, raising_load_errors
from muai_workers.engines.lanes import lanes_for
from muai_workers.engines.loading import LoadedModel, LoadedModels, refuse_task
from muai_workers.engines.tokens import TextTokenizer, input_limit
from muai_workers.engines.torch_causal import load_causal
from muai_workers.engines.torch_encoder import load_encoder, torch_forward
from muai_workers.engines.torch_loading import TorchPlan, plan_loading
from muai_workers.engines.torch_seq2seq import load_seq2seq
from muai_workers.kv_cache import KVCacheManager, ModelCache
from muai_workers.models.source import resolve_source
from muai_workers.models.weights import count_parameters

# A forward pass of a small encoder costs some 5 ms beside its tokens on a CPU, and as much again while results of the
# one before are written: the time of some 60 tokens. A GPU is launched in the time of hundreds.
CALL_OVERHEAD_TOKENS = {"cpu": 64, "cuda": 2048}
CAUSAL_TASKS: frozenset[str] = frozenset(DECODING_TASKS)


class PyTorchEngine:
    """Runs models as transformers gives them. Unloaded models are loaded by the first request for them."""

    name = "pytorch"

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._models: LoadedModels[LoadedModel] = LoadedModels()
        self._kv_cache = KVCacheManager(settings.optimization.cache)
        self.capabilities = Capabilities(
            tasks=frozenset(INPUT_FIELD),
            dtypes=frozenset({"auto", "fp16", "fp32", "bf16"}),
            continuous_batching=batches_continuously(settings, "pytorch"),
            streaming=True,
            abort=True,
            kv_reuse=self._kv_cache.enabled,
        )
        threads = settings.optimization.pytorch.num_threads
        if threads is not None:
            torch.set_num_threads(threads)
        self._lanes = lanes_for(is_compiled=settings.optimization.pytorch.compile)

    def availability(self) -> Availability:
        if torch.cuda.is_available():
            return Availability(True, f"torch {torch.__version__} on {torch.cuda.get_device_name()}")
        return Availability(True, f"torch {torch.__version__} on the CPU, {torch.get_num_threads()} threads")

    def is_available(self) -> bool:
        """The specification's short form of `availability`."""
        return self.availability().available

    def refusal(self, spec: ModelSpec) -> str | None:
        return None

    def load(self, spec: ModelSpec) -> None:
        self._model(spec)

    def unload(self, model: str) -> None:
        if self._models.drop(model):
            _release_memory()

    def loaded(self) -> tuple[str, ...]:
        return self._models.names()

    def estimate_memory_bytes(self, spec: ModelSpec) -> int:
        folder = self._folder(spec)
        with raising_load_errors(spec.name, self.name):
            plan = plan_loading(spec, folder, self._settings.optimization.pytorch)
            return count_parameters(folder) * plan.dtype.itemsize

    def run(self, spec: ModelSpec, task: str, requests: Sequence[InferenceRequest]) -> Iterator[Completion | Piece]:
        model = self._model(spec)
        if not model.serves(task):
            yield from refuse_task(spec, task, requests)
            return
        try:
            with raising_engine_errors():
                yield from model.run(task, requests)
        except OutOfMemoryError:
            _release_memory()
            raise

    def abort(self, request_ids: Collection[str]) -> None:
        self._models.abort(request_ids)

    def cache_statistics(self) -> Mapping[str, CacheStatistics]:
        return self._kv_cache.get_stats(self._models.names())

    def end_conversation(self, tenant: str, conversation_id: str) -> None:
        self._models.end_conversation(tenant, conversation_id)
        self._kv_cache.end_conversation(tenant, conversation_id)

    def reconfigure(self, settings: Settings) -> None:
        self._settings = settings
        self._kv_cache.reconfigure(settings.optimization.cache)
        limits = loop_limits(settings, 0)
        self._models.relimit(limits.max_rows, limits.max_tokens)

    def relieve(self) -> None:
        """Free what is kept of conversations: memory has run out."""
        self._kv_cache.evict_all()
        _release_memory()

    def close(self) -> None:
        self._models.drop_all()
        self._lanes.close()
        _release_memory()

    def _model(self, spec: ModelSpec) -> LoadedModel:
        return self._models.get_or_load(spec.name, lambda: self._load(spec))

    def _folder(self, spec: ModelSpec) -> Path:
        return resolve_source(spec, self._settings.model_cache.cache_dir)

    def _load(self, spec: ModelSpec) -> LoadedModel:
        folder = self._folder(spec)
        with raising_load_errors(spec.name, self.name):
            plan = plan_loading(spec, folder, self._settings.optimization.pytorch)
            extra: dict[str, Any] = {"device": plan.device.type, "dtype": plan.dtype_name}
            if plan.attention != "auto":
                extra["attention"] = plan.attention
            if plan.compile:
                extra["compiled"] = True
            limits = loop_limits(self._settings, CALL_OVERHEAD_TOKENS[plan.device.type])
            if spec.task in CAUSAL_TASKS:
                cache = ModelCache(self._kv_cache, spec.name)
                return load_causal(plan, extra, limits=limits, cache=cache, relieve=self.relieve)
            if spec.task == "summarization":
                return load_seq2seq(plan, extra, limits=limits, relieve=self.relieve)
            return self._encoder(plan, extra)

    def _encoder(self, plan: TorchPlan, extra: dict[str, Any]) -> Encoder:
        module, labels = load_encoder(plan)
        tokenizer = TextTokenizer(plan.folder, trust_remote_code=plan.spec.trust_remote_code)
        return Encoder(
            plan.spec,
            tokenizer,
            torch_forward(module, plan),
            labels=labels,
            limit_tokens=input_limit(plan.spec, plan.folder, plan.config, tokenizer),
            max_padded_tokens=self._settings.optimization.batcher.max_batch_tokens,
            call_overhead_tokens=CALL_OVERHEAD_TOKENS[plan.device.type],
            extra=extra,
            lanes=self._lanes,
        )


def loop_limits(settings: Settings, call_overhead_tokens: int) -> LoopLimits:
    """What of a model's requests runs at once: as much as may be in one batch."""
    batcher = settings.optimization.batcher
    return LoopLimits(
        max_rows=batcher.max_batch_size if batcher.enabled else 1,
        max_tokens=batcher.max_batch_tokens,
        call_overhead_tokens=call_overhead_tokens,
    )


def create(settings: Settings) -> PyTorchEngine:
    """For the registry."""
    return PyTorchEngine(settings)


def _release_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
