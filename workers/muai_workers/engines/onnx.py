"""`ONNXEngine`: encoders, classifiers and causal models, converted from PyTorch and checked against it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnxruntime
import torch

from muai_config import ModelSpec, Settings
from muai_config.slots import batches_continuously
from muai_producers.errors import EngineUnavailableError, ModelLoadError
from muai_producers.wire import InferenceRequest
from muai_workers.engines.base import Availability, CacheStatistics, Capabilities, Completion, Piece
from muai_workers.engines.decoding import DecodingModel
from muai_workers.engines.encoder import Encoder, Forward
from muai_workers.engines.failures import raising_engine_errors, raising_load_errors
from muai_workers.engines.lanes import Lanes, OneLane, ThreadLanes
from muai_workers.engines.loading import LoadedModel, LoadedModels, refuse_task
from muai_workers.engines.onnx_convert import GRAPH, QUANTIZED_GRAPH, convert_causal, convert_encoder
from muai_workers.engines.onnx_session import (
    OnnxDecoder,
    absent_providers,
    onnx_forward,
    open_session,
    usable_providers,
)
from muai_workers.engines.onnx_store import Conversion, ConversionStore, hash_file
from muai_workers.engines.pytorch import (
    CALL_OVERHEAD_TOKENS,
    CAUSAL_TASKS,
    loop_limits,
)
from muai_workers.engines.tokens import TextTokenizer, context_tokens, input_limit
from muai_workers.engines.torch_causal import configured_end_ids
from muai_workers.engines.torch_encoder import class_labels
from muai_workers.engines.torch_loading import TorchPlan, plan_loading
from muai_workers.kv_cache import KVCacheManager, ModelCache
from muai_workers.models.source import resolve_source
from muai_workers.models.weights import count_parameters, weight_files

log = logging.getLogger(__name__)
TASKS = CAUSAL_TASKS | {"embedding", "text-classification"}
FORMAT = 1
"""Raised when conversions of older releases can no longer be used."""
CPU = "CPUExecutionProvider"
LEAST_TOKENS = 64
"""In a lane; see `lanes`. Measured with MiniLM on two cores, 2 x 80 tokens: 16.2 ms, not 17.4, in fp32, 6.7, not 9.3,
with 8-bit weights; 2 x 20 tokens by 5 % and 17 % faster."""
_LIBRARIES = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class _Graph:
    """The graph that is to be run."""

    path: Path
    dtype: str
    told: Mapping[str, Any] = field(default_factory=dict)
    """What results say of it."""


class ONNXEngine:
    """Runs models as ONNX graphs in fp32, or with 8-bit weights where that is configured."""

    name = "onnx"

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._options = settings.optimization.onnx
        self._models: LoadedModels[LoadedModel] = LoadedModels()
        self._kv_cache = KVCacheManager(settings.optimization.cache)
        self.capabilities = Capabilities(
            tasks=TASKS,
            dtypes=frozenset({"auto", "fp32"}),
            continuous_batching=batches_continuously(settings, "onnx"),
            streaming=True,
            abort=True,
            kv_reuse=self._kv_cache.enabled,
        )
        self._store = ConversionStore(self._options.conversions_folder)
        num_threads = torch.get_num_threads()
        self._lanes: Lanes = ThreadLanes(num_threads, LEAST_TOKENS) if num_threads > 1 else OneLane()

    def availability(self) -> Availability:
        try:
            providers = usable_providers(self._options)
        except EngineUnavailableError as error:
            return Availability(False, error.message)
        absent = absent_providers(self._options)
        without = f"; {', '.join(absent)} {'is' if len(absent) == 1 else 'are'} not in this build" if absent else ""
        return Availability(True, f"onnxruntime {onnxruntime.__version__} with {', '.join(providers)}{without}")

    def is_available(self) -> bool:
        """The specification's short form of `availability`."""
        return self.availability().available

    def refusal(self, spec: ModelSpec) -> str | None:
        if spec.task not in TASKS:
            return f"the onnx engine has no {spec.task}: it does not convert encoder-decoder models"
        if spec.dtype not in self.capabilities.dtypes:
            return f"the onnx engine computes in fp32, and {spec.name} asks for {spec.dtype}"
        return None

    def load(self, spec: ModelSpec) -> None:
        self._model(spec)

    def unload(self, model: str) -> None:
        self._models.drop(model)

    def loaded(self) -> tuple[str, ...]:
        return self._models.names()

    def estimate_memory_bytes(self, spec: ModelSpec) -> int:
        with raising_load_errors(spec.name, self.name):
            own = count_parameters(self._folder(spec)) * (1 if self._options.enable_quantization else 4)
            return own * (2 if self._lanes_of(spec, usable_providers(self._options)[0]).width > 1 else 1)

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

    def reconfigure(self, settings: Settings) -> None:
        self._settings = settings
        self._kv_cache.reconfigure(settings.optimization.cache)
        limits = loop_limits(settings, 0)
        self._models.relimit(limits.max_rows, limits.max_tokens)

    def relieve(self) -> None:
        """Free what is kept of conversations: memory has run out."""
        self._kv_cache.evict_all()

    def close(self) -> None:
        self._models.drop_all()
        self._lanes.close()

    def convert_model(self, spec: ModelSpec) -> Path:
        """Convert the model, unless that was done before; returns the graph that passed its checks.

        Raises:
            ModelLoadError: it cannot be converted, or the graph answers otherwise than the model.
        """
        self._refuse(spec)
        folder = self._folder(spec)
        with raising_load_errors(spec.name, self.name):
            return self._convert(self._plan(spec, folder)).path

    def _refuse(self, spec: ModelSpec) -> None:
        reason = self.refusal(spec)
        if reason is not None:
            raise ModelLoadError(reason, {"model": spec.name, "engine": self.name})

    def _model(self, spec: ModelSpec) -> LoadedModel:
        return self._models.get_or_load(spec.name, lambda: self._load(spec))

    def _folder(self, spec: ModelSpec) -> Path:
        return resolve_source(spec, self._settings.model_cache.cache_dir)

    def _plan(self, spec: ModelSpec, folder: Path) -> TorchPlan:
        """How the original is loaded, to be converted: where and as what its graph will be compared."""
        plan = plan_loading(spec, folder, self._settings.optimization.pytorch)
        return replace(plan, device=torch.device("cpu"), dtype=torch.float32, attention="auto", compile=False)

    def _convert(self, plan: TorchPlan) -> _Graph:
        convert = convert_causal if plan.spec.task in CAUSAL_TASKS else convert_encoder
        conversion = self._store.open_or_build(self._key(plan), lambda scratch: convert(plan, scratch, self._options))
        self._check(plan.spec, conversion)
        if not self._options.enable_quantization:
            return _Graph(conversion.folder / GRAPH, "fp32")
        cosine, least = float(conversion.facts["quantized_cosine"]), self._options.quantized_min_cosine
        if cosine >= least:
            return _Graph(conversion.folder / QUANTIZED_GRAPH, "int8", {"quantized_cosine": round(cosine, 6)})
        reason = (
            f"whole weights instead of 8-bit ones: the quantized {plan.spec.name} answers with a cosine of "
            f"{cosine:.4f} to the original, less than optimization.onnx.quantized_min_cosine {least}"
        )
        log.warning("%s", reason)
        return _Graph(
            conversion.folder / GRAPH, "fp32", {"quantized_cosine": round(cosine, 6), "degradations": [reason]}
        )

    def _key(self, plan: TorchPlan) -> str:
        """Names a conversion by everything that it depends on."""
        spec = plan.spec
        facts = {
            "format": FORMAT,
            "files": [hash_file(path) for path in (plan.folder / "config.json", *weight_files(plan.folder))],
            "libraries": [importlib.metadata.version(library) for library in _LIBRARIES],
            "graph": [spec.task in CAUSAL_TASKS or spec.task, spec.pooling, spec.normalize],
            "quantized": self._options.enable_quantization,
        }
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
        return f"{spec.name.replace('/', '--')}-{digest}"

    def _check(self, spec: ModelSpec, conversion: Conversion) -> None:
        difference = float(conversion.facts["max_difference"])
        if difference > self._options.tolerance:
            raise ModelLoadError(
                f"the ONNX conversion of {spec.name} differs from the original by up to {difference:.3g}, more than "
                f"optimization.onnx.tolerance {self._options.tolerance:.3g}",
                {"model": spec.name, "max_difference": difference, "tolerance": self._options.tolerance},
            )

    def _load(self, spec: ModelSpec) -> LoadedModel:
        self._refuse(spec)
        folder = self._folder(spec)
        with raising_load_errors(spec.name, self.name):
            plan = self._plan(spec, folder)
            graph = self._convert(plan)
            session = open_session(graph.path, self._options)
            tokenizer = TextTokenizer(plan.folder, trust_remote_code=spec.trust_remote_code)
            absent = absent_providers(self._options, session)
            extra = {
                "execution_provider": session.get_providers()[0],
                "absent_providers": absent,
                "dtype": graph.dtype,
                **graph.told,
            }
            if absent:
                log.info("%s runs on %s, without %s", spec.name, extra["execution_provider"], ", ".join(absent))
            if spec.task in CAUSAL_TASKS:
                return self._decoding_model(plan, session, tokenizer, extra)
            lanes = self._lanes_of(spec, extra["execution_provider"])
            # Threads may have become fewer since the lanes were made.
            share = max(1, torch.get_num_threads() - lanes.width + 1)
            beside = open_session(graph.path, self._options, share) if lanes.width > 1 else None
            return self._encoder(plan, onnx_forward(session, beside), tokenizer, extra, lanes)

    def _lanes_of(self, spec: ModelSpec, provider: str) -> Lanes:
        """Where its passes run: side by side on a CPU, through a second session, which has the weights once more."""
        return self._lanes if provider == CPU and spec.task not in CAUSAL_TASKS else OneLane()

    def _encoder(
        self, plan: TorchPlan, forward: Forward, tokenizer: TextTokenizer, extra: dict[str, Any], lanes: Lanes
    ) -> Encoder:
        return Encoder(
            plan.spec,
            tokenizer,
            forward,
            labels=class_labels(plan.config) if plan.spec.task == "text-classification" else (),
            limit_tokens=input_limit(plan.spec, plan.folder, plan.config, tokenizer),
            max_padded_tokens=self._settings.optimization.batcher.max_batch_tokens,
            call_overhead_tokens=overhead_tokens(extra),
            extra=extra,
            lanes=lanes,
        )

    def _decoding_model(
        self, plan: TorchPlan, session: Any, tokenizer: TextTokenizer, extra: dict[str, Any]
    ) -> DecodingModel:
        return DecodingModel(
            plan.spec,
            tokenizer,
            lambda: OnnxDecoder(session),
            end_ids=configured_end_ids(plan, tokenizer),
            context_tokens=context_tokens(plan.config),
            limit_tokens=input_limit(plan.spec, plan.folder, plan.config, tokenizer),
            padding_side="left",
            extra=extra,
            limits=loop_limits(self._settings, overhead_tokens(extra)),
            cache=ModelCache(self._kv_cache, plan.spec.name),
            relieve=self.relieve,
        )


def overhead_tokens(extra: Mapping[str, Any]) -> int:
    """See `group_by_length`, for what the outputs say of where they were computed."""
    return CALL_OVERHEAD_TOKENS["cpu" if extra["execution_provider"] == CPU else "cuda"]


def create(settings: Settings) -> ONNXEngine:
    """For the registry."""
    return ONNXEngine(settings)
