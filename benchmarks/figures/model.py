"""A real model: served throughput over the same engine driven directly."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import msgspec

from benchmarks.contestants import MODEL_QUEUES, SERVERS, HttpPeer, QueuePeer, http_driver
from benchmarks.environments import PEERS, pinned, python_of
from benchmarks.figures.base import Measured, Measurement
from benchmarks.muai_side import cores, script_driver, served, write_configuration
from benchmarks.plan import Plan
from benchmarks.processes import Driver
from benchmarks.results import Goal, Row, ratios
from benchmarks.session import Session, bulk_rate, fitted_count, metric

MODEL = "minilm"
OURS = "MuAI"
DIRECT = "engine, direct"
PLAIN = "transformers, direct"
SERVER_BATCH = 32
SERVED_BATCH = 256
"""Requests in a batch of ours: as the queue's own cost is shared by them, and the engine cuts them by length itself."""
SLOTS = 2
"""Batches at once: while the passes of one end, those of the next take the lanes that are free."""
MAX_WAIT_MS = 30_000
"""How long ours may pass a sentence over for others of a better length; the deeper it is to look, the longer."""
CONNECTIONS = 256
"""Requests that the client of a model server keeps under way: deep enough to fill every batch."""
LEAST = 256
"""Sentences in one measurement, at least: fewer fill no batch of like lengths."""


def measure(session: Session) -> Measured:
    """Ours in pairs with the engine driven directly; then each peer, against the median of those direct runs."""
    with session.logs("model direct") as folder:
        config = write_configuration(folder, session.redis_url)
        batch = _best_batch(session, folder, config)
        with _direct(folder, config, batch) as direct:
            rows = _pairs(session, direct, batch)
    baseline = rows[0].metrics["throughput"].median
    rows.append(session.attempt(PLAIN, "", lambda: _plain(session, batch, baseline)))
    for peer in MODEL_QUEUES:
        rows.append(session.attempt(peer.name, peer.settings, partial(_queue_peer, session, peer, baseline)))
    for server in SERVERS:
        rows.append(
            session.attempt(server.name, server.settings(SERVER_BATCH), partial(_server, session, server, baseline))
        )
    goals = [Goal(text="served over direct", value=rows[1].metrics["ratio to direct"].median, goal=0.97)]
    return Measured(rows, goals)


def _direct(folder: Path, config: Path, batch: int) -> Driver:
    return script_driver("muai_direct.py", folder, BENCH_CONFIG=str(config), BENCH_MODEL=MODEL, BENCH_BATCH=str(batch))


def _best_batch(session: Session, folder: Path, config: Path) -> int:
    """The batch size at which the engine, driven directly, is fastest."""
    rates = {}
    for batch in session.plan.sweep:
        session.on_step(f"{DIRECT}: trying batches of {batch}")
        with _direct(folder, config, batch) as driver:
            count = fitted_count(driver, MODEL, session.plan.model_s / 2, 10_000, LEAST)
            rates[batch] = max(bulk_rate(driver, MODEL, count, seed) for seed in (1, 2))
    return max(rates, key=lambda batch: rates[batch])


def _pairs(session: Session, direct: Driver, batch: int) -> list[Row]:
    """Direct, served, direct, served: the engine that is not being measured holds its memory and no core."""
    plan = session.plan
    direct_rates, served_rates = [], []
    count = fitted_count(direct, MODEL, plan.model_pair_s / 4, 100_000, LEAST)
    # Many sentences are faster each than a few, which have fewer of their own length beside them.
    count = max(LEAST, 100 * round(bulk_rate(direct, MODEL, count, 0) * plan.model_pair_s / 100))
    batcher = {"max_batch_size": SERVED_BATCH, "max_wait_ms": MAX_WAIT_MS}
    with session.logs("model MuAI") as folder, served(folder, session.fresh(), MODEL, batcher, slots=SLOTS) as driver:
        bulk_rate(driver, MODEL, count // 4, 0)
        for pair in range(plan.model_pairs):
            session.on_step(f"{DIRECT} and {OURS}: {count} sentences, pair {pair + 1} of {plan.model_pairs}")
            turns = [(direct, direct_rates), (driver, served_rates)]
            for one, rates in turns if pair % 2 else reversed(turns):
                rates.append(bulk_rate(one, MODEL, count, pair))
    return [
        Row(
            name=DIRECT,
            settings=f"sorted by length, batches of {batch}, fp32, {cores()} threads",
            versions=direct.versions,
            metrics={"throughput": metric("sentences/s", direct_rates)},
        ),
        Row(
            name=OURS,
            settings=f"batches of {SERVED_BATCH}, {SLOTS} at once, cut by length in the engine; passed over for at "
            f"most {MAX_WAIT_MS // 1000} s; else defaults; {count} sentences at once, in random order",
            versions=driver.versions,
            metrics={
                "throughput": metric("sentences/s", served_rates),
                "ratio to direct": metric("", list(ratios(served_rates, direct_rates))),
            },
        ),
    ]


def _plain(session: Session, batch: int, baseline: float) -> Row:
    env = {"PYTHONPATH": str(PEERS), "BENCH_MODEL": MODEL, "BENCH_BATCH": str(batch), "OMP_NUM_THREADS": str(cores())}
    argv = [str(python_of("servers")), str(PEERS / "plain_direct.py")]
    settings = f"what the peers run: sorted by length, batches of {batch}"
    with session.logs("model plain") as folder, Driver(argv, folder / "driver.log", env, PEERS) as driver:
        return _repeats(session, driver, Row(name=PLAIN, settings=settings, versions=driver.versions), baseline)


def _queue_peer(session: Session, peer: QueuePeer, baseline: float) -> Row:
    with session.logs(f"model {peer.name}") as folder, peer.served(folder, session.fresh(), MODEL) as driver:
        row = Row(name=peer.name, settings=peer.settings, versions=driver.versions)
        return _repeats(session, driver, row, baseline)


def _server(session: Session, server: HttpPeer, baseline: float) -> Row:
    settings = f"{server.settings(SERVER_BATCH)}; {CONNECTIONS} connections"
    with (
        session.logs(f"model {server.name}") as folder,
        server.served(folder, MODEL, SERVER_BATCH) as url,
        http_driver(folder, url, server.body, CONNECTIONS) as driver,
    ):
        row = Row(name=server.name, settings=settings, versions=pinned(server.environment, server.packages))
        return _repeats(session, driver, row, baseline)


def _repeats(session: Session, driver: Driver, row: Row, baseline: float) -> Row:
    """`row` with its metrics; `baseline` is the direct engine's median."""
    repeats = session.plan.model_peer_repeats
    count = fitted_count(driver, MODEL, session.plan.model_s, 100_000, LEAST)
    rates = []
    for repeat in range(repeats):
        session.on_step(f"{row.name}: {count} sentences, {repeat + 1} of {repeats}")
        rates.append(bulk_rate(driver, MODEL, count, repeat))
    metrics = {
        "throughput": metric("sentences/s", rates),
        "ratio to direct": metric("", [rate / baseline for rate in rates]),
    }
    return msgspec.structs.replace(row, metrics=metrics)


def _steps(plan: Plan) -> int:
    peers = 1 + len(MODEL_QUEUES) + len(SERVERS)
    return len(plan.sweep) + plan.model_pairs + peers * plan.model_peer_repeats


MEASUREMENT = Measurement(
    title="A real model: MiniLM, PyTorch fp32, on the CPU",
    how="Sentences of 5 to 60 words, every length equally likely, submitted in random order. Direct is MuAI's own "
    "PyTorch engine without any queue, the same sentences sorted by length, in batches of the size that a sweep found "
    "fastest; direct and served take turns, and the ratio is taken pair by pair. Peers run the same weights through "
    "transformers; their ratio is to the median of the direct runs.",
    steps=_steps,
    measure=measure,
)
