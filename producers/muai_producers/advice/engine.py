"""`OptimizationEngine`: looks at an instance, says what holds it up, and makes the plan of what would help."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from muai_config.errors import UnknownModelError
from muai_producers.advice.batching import BatchingOptimizer
from muai_producers.advice.bottlenecks import bottlenecks
from muai_producers.advice.estimates import total
from muai_producers.advice.installation import InstallationLook, read_architecture
from muai_producers.advice.kv_cache import KVCacheOptimizer
from muai_producers.advice.proposals import Optimizer, Proposal
from muai_producers.advice.quantization import QuantizationOptimizer
from muai_producers.advice.records import (
    Analysis,
    AnalysisRequest,
    BatchingOptimization,
    Bottleneck,
    KVCacheOptimization,
    OptimizationPlan,
    OptimizationRequest,
    QuantizationOptimization,
)
from muai_producers.advice.scraping import HostNotAllowedError, scrape, target_of
from muai_producers.advice.situation import Situation
from muai_producers.advice.vllm_metrics import ScrapeError, read_metrics, with_scrape
from muai_producers.alerts.records import iso
from muai_producers.errors import ModelNotFoundError

if TYPE_CHECKING:
    from muai_config import Settings
    from muai_producers.store import Store

OPTIMIZERS: tuple[Optimizer, ...] = (KVCacheOptimizer(), QuantizationOptimizer(), BatchingOptimizer())


class OptimizationEngine:
    """Thread-safe; every method blocks while it looks.

    Args:
        settings: gives the settings as they hold now.
        wall_s: wall-clock seconds.
    Raises:
        ModelNotFoundError: from every method: the instance is none of ours, and no server that could be asked.
        InvalidRequestError: its server may not be asked.
        redis.exceptions.RedisError: the state store does not answer.
    """

    def __init__(self, settings: Callable[[], Settings], store: Store, wall_s: Callable[[], float] = time.time) -> None:
        self._settings = settings
        self._look = InstallationLook(store, settings().monitoring.performance.retention_s)
        self._wall_s = wall_s

    def analyze(self, request: AnalysisRequest) -> Analysis:
        """What holds an instance up.

        Raises:
            ScrapeError: its server does not answer: without figures there is nothing to say.
        """
        situation = self.observe(request)
        return Analysis(
            instance_id=request.instance_id,
            instance_type=request.instance_type,
            timestamp=iso(self._wall_s()),
            source=situation.source or f"nothing was measured: {situation.unmeasured}",
            bottlenecks=bottlenecks(situation),
            figures=situation.figures(),
        )

    def generate_plan(self, request: OptimizationRequest) -> OptimizationPlan:
        """What would help an instance.

        A server that does not answer, or may not be asked, is judged by what the request says of its configuration, and
        the plan says so.
        """
        try:
            situation = self.observe(request)
        except (ScrapeError, HostNotAllowedError) as error:
            situation = _with_model(_external(request, unmeasured=error.message), self._settings())
        return plan_of(situation, iso(self._wall_s()))

    def observe(self, request: OptimizationRequest | AnalysisRequest) -> Situation:
        """How an instance stands.

        Raises:
            ScrapeError: as `analyze`.
        """
        settings = self._settings()
        advice = settings.gateway.advice
        if is_ours(request, settings):
            window_s = min(advice.window_s, settings.monitoring.performance.retention_s)
            return self._look.take(request.instance_id, request.instance_type, settings, window_s)
        base = _external(request)
        target = target_of(request.instance_id, advice)
        told = read_metrics(scrape(target, advice.timeout_s), str(request.current_config.get("model", "")))
        return _with_model(with_scrape(base, told, self._wall_s()), settings)


def is_ours(request: OptimizationRequest | AnalysisRequest, settings: Settings) -> bool:
    """Whether an instance is a model of the catalog; else it is a vLLM server.

    Raises:
        ModelNotFoundError: it is neither.
    """
    if request.instance_id in settings.models:
        return True
    if _is_address(request):
        return False
    error = UnknownModelError(request.instance_id, settings.models)
    raise ModelNotFoundError(
        f"{error.message}; an instance is a model of this installation, or a vLLM server as HOST:PORT with "
        'instance_type "vllm"',
        {"field": "instance_id", "model": request.instance_id},
    )


def _is_address(request: OptimizationRequest | AnalysisRequest) -> bool:
    return request.instance_type == "vllm" and ":" in request.instance_id


def _external(request: OptimizationRequest | AnalysisRequest, unmeasured: str = "") -> Situation:
    return Situation(
        instance_id=request.instance_id,
        instance_type=request.instance_type,
        is_ours=False,
        engine="vllm",
        model=str(request.current_config.get("model", "")),
        config=request.current_config,
        unmeasured=unmeasured,
    )


def _with_model(situation: Situation, settings: Settings) -> Situation:
    """With the sizes of its model, where the catalog has one of the name that the request or the server gives it."""
    names = (str(situation.config.get("model", "")), situation.model)
    spec = next((settings.models[name] for name in names if name in settings.models), None)
    return situation if spec is None else dataclasses.replace(situation, architecture=read_architecture(spec))


def plan_of(situation: Situation, timestamp: str, optimizers: Sequence[Optimizer] = OPTIMIZERS) -> OptimizationPlan:
    """The plan for a situation, most urgent first. Pure."""
    found = bottlenecks(situation)
    proposals = [made for optimizer in optimizers for made in optimizer.propose(situation, found)]
    proposals.sort(key=lambda one: one.rank(found))
    configs: dict[str, Any] = {}
    for made in proposals:
        configs.setdefault(_field_of(made), made.config)
    return OptimizationPlan(
        instance_id=situation.instance_id,
        instance_type=situation.instance_type,  # type: ignore[arg-type]
        timestamp=timestamp,
        optimizations=[made.optimization(found) for made in proposals],
        **configs,
        priority_order=[f"{made.type.value}_{index}" for index, made in enumerate(proposals)],
        estimated_total_improvement=_outlook(situation, found, proposals),
    )


def _field_of(made: Proposal) -> str:
    fields = {
        KVCacheOptimization: "kv_cache_config",
        QuantizationOptimization: "quantization_config",
        BatchingOptimization: "batching_config",
    }
    return fields[type(made.config)]


def _outlook(now: Situation, found: Sequence[Bottleneck], proposals: Sequence[Proposal]) -> str:
    unmeasured = "" if now.is_measured else f"; nothing was measured: {now.unmeasured}"
    if proposals:
        return total([one for made in proposals for one in made.estimates]) + unmeasured
    if not now.is_measured:
        return f"none can be claimed{unmeasured}"
    if not found:
        return "none: nothing holds the instance up"
    kinds = ", ".join(one.kind for one in found)
    return f"none that a setting would bring, by what was measured ({kinds})"
