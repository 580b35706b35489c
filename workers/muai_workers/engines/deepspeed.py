"""`DeepSpeedEngine`: a model over several devices, each layer shared out among the processes that compute it."""

from __future__ import annotations

import importlib.metadata
import logging
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from muai_config import ModelSpec, Settings
from muai_config.slots import batches_continuously
from muai_producers.errors import ModelLoadError
from muai_producers.wire import InferenceRequest
from muai_workers.engines.base import Availability, CacheStatistics, Capabilities, Completion, Piece
from muai_workers.engines.decoding import DecodingModel
from muai_workers.engines.deepspeed_decoder import RankDecoder
from muai_workers.engines.deepspeed_messages import Forward, Start
from muai_workers.engines.deepspeed_plan import DTYPE_BYTES, GENERATES, DeviceFacts, plan_ranks, refusal
from muai_workers.engines.deepspeed_ranks import RankGroup, compiler_missing
from muai_workers.engines.encoder import Encoder
from muai_workers.engines.failures import raising_engine_errors, raising_load_errors
from muai_workers.engines.loading import LoadedModel, LoadedModels, refuse_task
from muai_workers.engines.padding import PaddedRows
from muai_workers.engines.pytorch import CALL_OVERHEAD_TOKENS, loop_limits
from muai_workers.engines.tokens import TextTokenizer, context_tokens, input_limit
from muai_workers.engines.torch_causal import end_ids_of
from muai_workers.engines.torch_encoder import class_labels
from muai_workers.engines.torch_loading import read_config
from muai_workers.kv_cache import KVCacheManager, ModelCache
from muai_workers.models.source import resolve_source
from muai_workers.models.weights import count_parameters

log = logging.getLogger(__name__)
TASKS = GENERATES | {"embedding", "text-classification"}


class DeepSpeedEngine:
    """Runs each model in processes of its own, one for each rank.

    Tokens are chosen here; the ranks compute. So requests join and leave the running batch, stream, are aborted and
    keep their conversations as on PyTorch, whose decoding loop it is.
    """

    name = "deepspeed"

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._options = settings.optimization.deepspeed
        self._models: LoadedModels[LoadedModel] = LoadedModels()
        self._ranks: dict[str, RankGroup] = {}
        self._kv_cache = KVCacheManager(settings.optimization.cache)
        self._lock = threading.Lock()
        self.capabilities = Capabilities(
            tasks=TASKS,
            dtypes=frozenset({"auto", "fp16", "fp32", "bf16"}),
            continuous_batching=batches_continuously(settings, "deepspeed"),
            streaming=True,
            abort=True,
            kv_reuse=self._kv_cache.enabled,
            tensor_parallel=True,
        )
        threads = settings.optimization.pytorch.num_threads
        if threads is not None:
            torch.set_num_threads(threads)  # here tokens are chosen; the ranks are told of it too

    def availability(self) -> Availability:
        version = importlib.metadata.version("deepspeed")
        size = self._options.tensor_parallel
        if _device() == "cpu":
            absent = compiler_missing() if size > 1 else ()
            slow = f"; without {' and '.join(absent)} they add up their parts over gloo" if absent else ""
            return Availability(True, f"deepspeed {version} on the CPU, {_processes(size)} for each model{slow}")
        visible = torch.cuda.device_count()
        if visible < size:
            return Availability(
                False,
                f"optimization.deepspeed.tensor_parallel is {size}, and {visible} GPUs are visible here (--gpus says "
                "which a worker gets)",
            )
        return Availability(True, f"deepspeed {version} on {size} of {visible} {torch.cuda.get_device_name()}")

    def is_available(self) -> bool:
        """The specification's short form of `availability`."""
        return self.availability().available

    def refusal(self, spec: ModelSpec) -> str | None:
        return refusal(spec, self._options, TASKS)

    def load(self, spec: ModelSpec) -> None:
        self._model(spec)

    def unload(self, model: str) -> None:
        self._models.drop(model)
        with self._lock:
            ranks = self._ranks.pop(model, None)
        if ranks is not None:
            ranks.close()

    def loaded(self) -> tuple[str, ...]:
        self._drop_the_dead()
        return self._models.names()

    def rank_pids(self, model: str) -> tuple[int, ...]:
        """The processes that hold the model; none where it is not loaded."""
        ranks = self._ranks.get(model)
        return () if ranks is None else ranks.pids

    def estimate_memory_bytes(self, spec: ModelSpec) -> int:
        """Of all ranks together."""
        folder = self._folder(spec)
        with raising_load_errors(spec.name, self.name):
            num_parameters = count_parameters(folder)
            facts = [DeviceFacts(_device(), 0)] * self._options.tensor_parallel
            return num_parameters * DTYPE_BYTES[plan_ranks(spec, self._options, facts, num_parameters).dtype]

    def run(self, spec: ModelSpec, task: str, requests: Sequence[InferenceRequest]) -> Iterator[Completion | Piece]:
        model = self._model(spec)
        if not model.serves(task):
            yield from refuse_task(spec, task, requests)
            return
        with raising_engine_errors():
            yield from model.run(task, requests)

    def abort(self, request_ids: Collection[str]) -> None:
        self._models.abort(request_ids)

    def cache_statistics(self) -> Mapping[str, CacheStatistics]:
        return self._kv_cache.get_stats(self._models.names())

    def end_conversation(self, tenant: str, conversation_id: str) -> None:
        self._models.end_conversation(tenant, conversation_id)
        self._kv_cache.end_conversation(tenant, conversation_id)

    def relieve(self) -> None:
        """Free what is kept of conversations: memory has run out."""
        self._kv_cache.evict_all()

    def reconfigure(self, settings: Settings) -> None:
        self._settings = settings
        self._kv_cache.reconfigure(settings.optimization.cache)
        limits = loop_limits(settings, 0)
        self._models.relimit(limits.max_rows, limits.max_tokens)

    def close(self) -> None:
        for name in self._models.names():
            self.unload(name)

    def _model(self, spec: ModelSpec) -> LoadedModel:
        self._drop_the_dead()
        return self._models.get_or_load(spec.name, lambda: self._load(spec))

    def _drop_the_dead(self) -> None:
        """Forget models whose ranks have died; the next load starts new ones."""
        with self._lock:
            dead = [name for name, ranks in self._ranks.items() if not ranks.alive]
        for name in dead:
            self.unload(name)

    def _folder(self, spec: ModelSpec) -> Path:
        return resolve_source(spec, self._settings.model_cache.cache_dir)

    def _load(self, spec: ModelSpec) -> LoadedModel:
        reason = self.refusal(spec)
        if reason is not None:
            raise ModelLoadError(reason, {"model": spec.name, "engine": self.name})
        folder = self._folder(spec)
        with raising_load_errors(spec.name, self.name):
            config = read_config(spec, folder)
            tokenizer = TextTokenizer(folder, trust_remote_code=spec.trust_remote_code)
            pytorch = self._settings.optimization.pytorch
            start = Start(spec, folder, self._options, pytorch.attention, pytorch.num_threads)
            ranks = RankGroup(start, self._options.tensor_parallel, _device())
            with self._lock:
                self._ranks[spec.name] = ranks
            limit = input_limit(spec, folder, config, tokenizer)
            if spec.task in GENERATES:
                return self._decoding_model(spec, folder, config, tokenizer, ranks, limit)
            return self._encoder(spec, config, tokenizer, ranks, limit)

    def _decoding_model(
        self, spec: ModelSpec, folder: Path, config: Any, tokenizer: TextTokenizer, ranks: RankGroup, limit: int | None
    ) -> DecodingModel:
        return DecodingModel(
            spec,
            tokenizer,
            lambda: RankDecoder(ranks),
            end_ids=end_ids_of(folder, config, tokenizer),
            context_tokens=context_tokens(config),
            limit_tokens=limit,
            padding_side="left",
            extra=told_of(ranks),
            limits=loop_limits(self._settings, CALL_OVERHEAD_TOKENS[ranks.ready[0].device]),
            cache=ModelCache(self._kv_cache, spec.name),
            relieve=self.relieve,
        )

    def _encoder(
        self, spec: ModelSpec, config: Any, tokenizer: TextTokenizer, ranks: RankGroup, limit: int | None
    ) -> Encoder:
        def forward(rows: PaddedRows) -> NDArray[np.float32]:
            values: NDArray[np.float32] = ranks.call(Forward(rows))[0]
            return values

        return Encoder(
            spec,
            tokenizer,
            forward,
            labels=class_labels(config) if spec.task == "text-classification" else (),
            limit_tokens=limit,
            max_padded_tokens=self._settings.optimization.batcher.max_batch_tokens,
            call_overhead_tokens=CALL_OVERHEAD_TOKENS[ranks.ready[0].device],
            extra=told_of(ranks),
        )


def told_of(ranks: RankGroup) -> dict[str, Any]:
    """What results say of how they were computed."""
    plan = ranks.ready[0].plan
    told: dict[str, Any] = {
        "device": ranks.ready[0].device,
        "dtype": plan.dtype,
        "tensor_parallel": 1 if plan.zero else plan.world_size,
        "kernel_inject": plan.kernel_inject,
        "zero_inference": plan.zero,
    }
    if plan.degradations:
        told["degradations"] = list(plan.degradations)
        for reason in plan.degradations:
            log.warning("deepspeed: %s", reason)
    return told


def _device() -> Any:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _processes(size: int) -> str:
    return "one process" if size == 1 else f"{size} processes"


def create(settings: Settings) -> DeepSpeedEngine:
    """For the registry."""
    return DeepSpeedEngine(settings)
