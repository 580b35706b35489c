"""ONNX Runtime against PyTorch: the same model, the same sentences, batch by batch, without any queue."""

from __future__ import annotations

from pathlib import Path

from benchmarks.figures.base import Measured, Measurement
from benchmarks.muai_side import cores, script_driver, write_configuration
from benchmarks.plan import Plan
from benchmarks.processes import Driver
from benchmarks.results import Goal, Row, ratios
from benchmarks.session import Session, bulk_rate, fitted_count, metric

MODEL = "minilm"
BATCHES = (1, 8, 32)
GOAL = 1.5
LEAST = 64


def measure(session: Session) -> Measured:
    """Both engines loaded, in processes of their own; they take turns, so that the other one takes no core."""
    rows: list[Row] = []
    goals: list[Goal] = []
    with session.logs("onnx") as folder:
        config = write_configuration(folder, session.redis_url)
        for batch in BATCHES:
            with (
                _driver(folder / f"pytorch-{batch}", config, "pytorch", batch) as pytorch,
                _driver(folder / f"onnx-{batch}", config, "onnx", batch) as onnx,
            ):
                pair, ratio = _pairs(session, pytorch, onnx, batch)
            rows += pair
            goals.append(Goal(text=f"ONNX Runtime over PyTorch, batches of {batch}", value=ratio, goal=GOAL))
    return Measured(rows, goals)


def _driver(folder: Path, config: Path, engine: str, batch: int) -> Driver:
    folder.mkdir()
    return script_driver(
        "muai_direct.py",
        folder,
        BENCH_CONFIG=str(config),
        BENCH_MODEL=MODEL,
        BENCH_ENGINE=engine,
        BENCH_BATCH=str(batch),
    )


def _pairs(session: Session, pytorch: Driver, onnx: Driver, batch: int) -> tuple[list[Row], float]:
    plan = session.plan
    count = fitted_count(pytorch, MODEL, plan.onnx_s, 20_000, LEAST)
    bulk_rate(onnx, MODEL, LEAST, 0)
    rates: dict[str, list[float]] = {"pytorch": [], "onnx": []}
    for pair in range(plan.onnx_pairs):
        session.on_step(f"batches of {batch}: {count} sentences, pair {pair + 1} of {plan.onnx_pairs}")
        rates["pytorch"].append(bulk_rate(pytorch, MODEL, count, pair))
        rates["onnx"].append(bulk_rate(onnx, MODEL, count, pair))
    ratio = metric("", list(ratios(rates["onnx"], rates["pytorch"])))
    settings = f"batches of {batch}, sorted by length, fp32, {cores()} threads; {count} sentences"
    throughput = {engine: metric("sentences/s", values) for engine, values in rates.items()}
    return [
        Row(
            name=f"PyTorch, {batch}",
            settings=settings,
            versions=pytorch.versions,
            metrics={"throughput": throughput["pytorch"]},
        ),
        Row(
            name=f"ONNX Runtime, {batch}",
            settings=settings,
            versions=onnx.versions,
            metrics={"throughput": throughput["onnx"], "ratio to PyTorch": ratio},
        ),
    ], ratio.median


def _steps(plan: Plan) -> int:
    return len(BATCHES) * plan.onnx_pairs


MEASUREMENT = Measurement(
    title="ONNX Runtime against PyTorch: MiniLM, fp32, on the CPU",
    how="MuAI's own engines without any queue, texts in and embeddings out, tokenizer included: sentences of 5 to 60 "
    "words, every length equally likely, sorted by length. The two take turns on the same cores, and the ratio is "
    "taken pair by pair.",
    steps=_steps,
    measure=measure,
)
