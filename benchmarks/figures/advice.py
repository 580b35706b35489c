"""Advice taken: what a plan says that larger batches bring, and what they bring once it is applied."""

from __future__ import annotations

import re
from statistics import median

import redis

from benchmarks.figures.base import Measured, Measurement
from benchmarks.figures.open_loop import CURVE, WORDS
from benchmarks.muai_side import served
from benchmarks.plan import Plan
from benchmarks.processes import Driver
from benchmarks.results import Goal, Row
from benchmarks.session import Session, bulk_rate, fitted_count, metric
from muai_config import load_settings
from muai_producers.advice.applying import apply_plan
from muai_producers.advice.engine import OptimizationEngine
from muai_producers.advice.records import ApplyRequest, OptimizationPlan, OptimizationRequest
from muai_producers.runtime_config.editing import ConfigEditor
from muai_producers.runtime_config.versions import ConfigVersions
from muai_producers.store import Store

START = 2
"""Requests in a batch, before the advice."""
ALONE = 5
"""Requests sent one at a time: beside full batches they tell what a batch costs apart from its requests."""
CLAIM = re.compile(r"(\d+)-(\d+)% throughput increase")


def measure(session: Session) -> Measured:
    """Each model before and after its plan."""
    rows: list[Row] = []
    goals: list[Goal] = []
    for model in session.plan.tuning_models:
        url = session.fresh()
        curve = CURVE if model == "noop" else None
        with (
            session.logs(f"advice {model}") as folder,
            served(folder, url, model, {"max_batch_size": START}, curve) as driver,
            redis.Redis.from_url(url) as client,
        ):
            settings = load_settings(folder / "muai.yaml")
            store = Store(client, prefix=settings.queue.key_prefix)
            before = _rates(session, driver, model, "before")
            plan = OptimizationEngine(lambda settings=settings: settings, store).generate_plan(  # type: ignore[misc]
                OptimizationRequest(instance_id=model, instance_type="muai")
            )
            claim = _claim(plan)
            if claim is None:
                said = f"the plan names no range for batches: {plan.estimated_total_improvement}"
                rows.append(Row(name=WORDS[model], settings=f"batches of {START}", skipped=said))
                continue
            versions = ConfigVersions(store)
            done = apply_plan(ApplyRequest(plan=plan), ConfigEditor(settings, versions), versions, by="benchmark")
            after = _rates(session, driver, model, "after")
        gains = [100 * (rate / median(before) - 1) for rate in after]
        applied = ", ".join(f"{key} = {value}" for key, value in done.applied.items())
        rows.append(
            Row(
                name=WORDS[model],
                settings=f"batches of {START}, then {applied}",
                versions=driver.versions,
                metrics={
                    "before": metric("requests/s", before),
                    "after": metric("requests/s", after),
                    "claimed, from": metric("%", [claim[0]]),
                    "claimed, to": metric("%", [claim[1]]),
                    "gain": metric("%", gains),
                },
            )
        )
        gain, about = median(gains), f"gain in %, {WORDS[model]}"
        goals += [
            Goal(text=about, value=gain, goal=claim[0]),
            Goal(text=about, value=gain, goal=claim[1], at_most=True),
        ]
    return Measured(rows, goals)


def _rates(session: Session, driver: Driver, model: str, when: str) -> list[float]:
    """Requests served each second while more wait than are run. The first bulk, which warms up, does not count."""
    driver.ask(limit_s=120.0, do="idle", model=model, count=ALONE, seed=0)
    count = fitted_count(driver, model, session.plan.model_s / 2, 20_000, 256)
    rates = []
    for repeat in range(session.plan.repeats):
        session.on_step(f"{model}, {when} the plan: {count} in bulk, {repeat + 1} of {session.plan.repeats}")
        rates.append(bulk_rate(driver, model, count, repeat))
    return rates


def _claim(plan: OptimizationPlan) -> tuple[float, float] | None:
    """The range that the plan names for its advice on batches, in percent."""
    for one in plan.optimizations:
        found = CLAIM.match(one.estimated_improvement)
        if one.type.value == "batching" and found:
            return float(found[1]), float(found[2])
    return None


def _steps(plan: Plan) -> int:
    return 2 * plan.repeats * len(plan.tuning_models)


MEASUREMENT = Measurement(
    title="Advice taken",
    how=f"From batches of {START}, with more waiting than can be served: the plan of the advice, and requests served "
    "per second before and after it is applied to the running installation, beside the range that the plan claimed.",
    steps=_steps,
    measure=measure,
)
