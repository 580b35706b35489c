"""ONNX Runtime against PyTorch: the same model, the same sentences, batch by batch, without any queue."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml

from benchmarks.figures.base import Measured, Measurement
from benchmarks.muai_side import cores, script_driver, write_configuration
from benchmarks.plan import Plan
from benchmarks.processes import Driver
from benchmarks.results import Goal, Row, ratios
from benchmarks.session import Session, bulk_rate, fitted_count, metric

MODEL = "minilm"
PYTORCH, ONNX, QUANTIZED = "PyTorch", "ONNX Runtime", "ONNX Runtime with 8-bit weights"
ENGINES = {PYTORCH: "pytorch", ONNX: "onnx", QUANTIZED: "onnx"}
BATCHES = (1, 8, 32)
GOAL = 1.5
LEAST = 64


def measure(session: Session) -> Measured:
    """All engines loaded, in processes of their own; they take turns, so that no other one takes a core."""
    rows: list[Row] = []
    goals: list[Goal] = []
    with session.logs("onnx") as folder:
        whole = write_configuration(folder, session.redis_url)
        configs = {PYTORCH: whole, ONNX: whole, QUANTIZED: _quantizing(whole)}
        for batch in BATCHES:
            with ExitStack() as exits:
                drivers = {
                    name: exits.enter_context(_driver(folder / f"{name}-{batch}", config, ENGINES[name], batch))
                    for name, config in configs.items()
                }
                measured = _turns(session, drivers, batch)
            rows += measured
            for row, name in zip(measured[1:], (ONNX, QUANTIZED), strict=True):
                ratio = row.metrics["ratio to PyTorch"].median
                goals.append(Goal(text=f"{name} over PyTorch, batches of {batch}", value=ratio, goal=GOAL))
    return Measured(rows, goals)


def _quantizing(whole: Path) -> Path:
    """The same configuration with 8-bit weights, written beside it."""
    document: dict[str, Any] = yaml.safe_load(whole.read_text())
    document["optimization"]["onnx"] = {"enable_quantization": True}
    path = whole.with_name("quantizing.yaml")
    path.write_text(yaml.safe_dump(document))
    return path


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


def _turns(session: Session, drivers: Mapping[str, Driver], batch: int) -> list[Row]:
    plan = session.plan
    count = fitted_count(drivers[PYTORCH], MODEL, plan.onnx_s, 20_000, LEAST)
    for driver in drivers.values():
        bulk_rate(driver, MODEL, LEAST, 0)
    rates: dict[str, list[float]] = {name: [] for name in drivers}
    for turn in range(plan.onnx_pairs):
        session.on_step(f"batches of {batch}: {count} sentences, round {turn + 1} of {plan.onnx_pairs}")
        for name, driver in drivers.items():
            rates[name].append(bulk_rate(driver, MODEL, count, turn))
    settings = f"batches of {batch}, sorted by length, {cores()} threads; {count} sentences"
    rows = []
    for name, driver in drivers.items():
        metrics = {"throughput": metric("sentences/s", rates[name])}
        if name != PYTORCH:
            metrics["ratio to PyTorch"] = metric("", list(ratios(rates[name], rates[PYTORCH])))
        rows.append(Row(name=f"{name}, {batch}", settings=settings, versions=driver.versions, metrics=metrics))
    return rows


def _steps(plan: Plan) -> int:
    return len(BATCHES) * plan.onnx_pairs


MEASUREMENT = Measurement(
    title="ONNX Runtime against PyTorch: MiniLM on the CPU",
    how="MuAI's own engines without any queue, texts in and embeddings out, tokenizer included: sentences of 5 to 60 "
    "words, every length equally likely, sorted by length. PyTorch runs in fp32, ONNX Runtime in fp32 and with weights "
    "quantized to 8 bits (`optimization.onnx.enable_quantization`). They take turns on the same cores, and the ratio "
    "is taken round by round. In fp32 both are bound by the same multiplications "
    "([measured](../adr/0030-what-bounds-onnx-in-fp32.md)).",
    steps=_steps,
    measure=measure,
)
