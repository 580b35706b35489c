"""How much is measured: everything with repeats, or a look in three minutes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """Numbers of one mode."""

    mode: str
    repeats: int
    bulk_s: float
    """About how long one bulk measurement lasts; the number of requests is fitted to it."""
    max_bulk: int
    turns: int
    """Rounds of contestants that take turns."""
    turn_s: float
    idle_count: int
    model_pairs: int
    model_pair_s: float
    """Of each contestant in a pair. The first batches leave before there is anything to choose from, which a short
    measurement counts for more than it is."""
    model_peer_repeats: int
    model_s: float
    sweep: tuple[int, ...]
    """Batch sizes tried for the engine driven directly."""
    http_s: float
    fixed_sizes: tuple[int, ...]
    fixed_timeouts_ms: tuple[int, ...]
    open_s: float
    open_pairs: int
    open_models: tuple[str, ...]
    arrivals: tuple[str, ...]
    flood: int
    """Requests of the tenant that floods."""
    queued: int
    """Requests queued for the figure on memory."""
    onnx_pairs: int
    onnx_s: float
    chats: int
    """Conversations whose later turns are timed."""
    tuning_intervals: tuple[int, int, int]
    """Intervals of the tuner under a low load, ten times that, and the low one again."""
    tuning_sizes: tuple[int, ...]
    """Batch sizes tried by hand beside it; the largest is its bound."""
    tuning_models: tuple[str, ...]


FULL = Plan(
    mode="full",
    repeats=5,
    bulk_s=4.0,
    max_bulk=50_000,
    turns=31,
    turn_s=1.5,
    idle_count=400,
    model_pairs=15,
    model_pair_s=30.0,
    model_peer_repeats=3,
    model_s=15.0,
    sweep=(8, 16, 32, 64),
    http_s=5.0,
    fixed_sizes=(8, 16, 32),
    fixed_timeouts_ms=(5, 20, 50),
    open_s=10.0,
    open_pairs=5,
    open_models=("noop", "minilm"),
    arrivals=("poisson", "gamma"),
    flood=10_000,
    queued=1_000_000,
    onnx_pairs=7,
    onnx_s=6.0,
    chats=5,
    tuning_intervals=(6, 15, 6),
    tuning_sizes=(2, 4, 8, 16, 32, 64),
    tuning_models=("noop", "minilm"),
)

QUICK = Plan(
    mode="quick",
    repeats=2,
    bulk_s=1.0,
    max_bulk=20_000,
    turns=5,
    turn_s=0.5,
    idle_count=50,
    model_pairs=2,
    model_pair_s=1.0,
    model_peer_repeats=1,
    model_s=1.0,
    sweep=(32,),
    http_s=2.0,
    fixed_sizes=(32,),
    fixed_timeouts_ms=(20, 50),
    open_s=3.0,
    open_pairs=1,
    open_models=("noop",),
    arrivals=("poisson",),
    flood=2_000,
    queued=50_000,
    onnx_pairs=2,
    onnx_s=1.0,
    chats=1,
    tuning_intervals=(1, 6, 1),
    tuning_sizes=(2, 32),
    tuning_models=("noop",),
)
