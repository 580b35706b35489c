"""Sweeps: which settings are measured, what is kept of each measurement, and which of them is best. Pure, but for the
file of measurements at the end."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

ADAPTIVE = "adaptive"
"""In place of a timeout: batches leave by the load."""
BATCHER, VLLM = "optimization.batcher", "optimization.vllm"
VLLM_SIZES = (8, 16, 32, 64, 128)
VLLM_TOKENS = (2048, 4096, 8192)
SIZES = (4, 8, 16, 32, 64)
TIMEOUTS = (ADAPTIVE, "5", "20", "50")
LOADS = (0.5, 0.7, 0.85, 0.95)


class SweepError(Exception):
    """The sweep cannot go on; the message says why, and what to do."""


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """Settings to be measured."""

    name: str
    row: str
    """Its place in the picture: the batch size, ..."""
    column: str
    """... and the timeout."""
    settings: dict[str, Any]
    """By dotted key."""
    needs_restart: bool = False
    """Some of them are read by engines at their start."""


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """One candidate under one load."""

    candidate: str
    load: float
    """Arrivals, as a share of saturation."""
    arrival_rps: float
    seconds: float
    requests: int
    in_time: int
    failed: int
    p50_ms: float
    p95_ms: float
    p99_ms: float

    @property
    def goodput_rps(self) -> float:
        """Requests answered within the target per second."""
        return self.in_time / self.seconds


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """What the measurements of a file have in common; others cannot be compared with them."""

    model: str
    engine: str
    target_p95_ms: float
    seconds: float
    seed: int
    machine: str
    inputs: str
    """A digest of the requests."""
    configuration: str
    """A digest of the settings that are not swept."""


class Saturation(msgspec.Struct, frozen=True, kw_only=True):
    """What is served with everything waiting from the start."""

    rate_rps: float


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What a candidate comes to."""

    candidate: str
    goodput_rps: float
    """At the highest load under which 95 % of its answers met the target; at its best load where they never did."""
    p95_ms: float
    load: float
    meets_target: bool


# -- what is measured ------------------------------------------------------------------------------------------------


def candidates(engine: str, sizes: Sequence[int], columns: Sequence[str]) -> list[Candidate]:
    """Every combination: for vLLM of `max_num_seqs` and `max_num_batched_tokens`, else of batch size and timeout."""
    make = _vllm_candidate if engine == "vllm" else _batch_candidate
    found = [make(size, column) for size, column in itertools.product(sizes, columns)]
    return list({one.name: one for one in found}.values())


def _batch_candidate(size: int, timeout: str) -> Candidate:
    settings: dict[str, Any] = {f"{BATCHER}.max_batch_size": size, f"{BATCHER}.adaptive_batching": timeout == ADAPTIVE}
    if timeout != ADAPTIVE:
        settings[f"{BATCHER}.batch_timeout_ms"] = int(timeout)
    shown = timeout if timeout == ADAPTIVE else f"{timeout} ms"
    return Candidate(name=f"{size} x {shown}", row=str(size), column=shown, settings=settings)


def _vllm_candidate(size: int, tokens: str) -> Candidate:
    settings = {
        f"{VLLM}.max_num_seqs": size,
        f"{VLLM}.max_num_batched_tokens": int(tokens),
        # What the engine admits must be able to reach it.
        f"{BATCHER}.max_batch_size": size,
    }
    name = f"{size} x {tokens} tokens"
    return Candidate(name=name, row=str(size), column=f"{tokens} tokens", settings=settings, needs_restart=True)


def todo(
    wanted: Sequence[Candidate], loads: Sequence[float], done: Iterable[Measurement], target_p95_ms: float
) -> Iterator[tuple[Candidate, float]]:
    """What is left to measure, in order. Loads rise, and stop for a candidate at the first that it cannot bear."""
    by_key = {(one.candidate, one.load): one for one in done}
    for candidate in wanted:
        for load in sorted(loads):
            measured = by_key.get((candidate.name, load))
            if measured is None:
                yield candidate, load
                break
            if measured.p95_ms > target_p95_ms:
                break


def summarize(
    candidate: str, load: float, arrival_rps: float, seconds: float, latencies_ms: Sequence[float | None], target: float
) -> Measurement:
    """What the latencies of one run come to; None stands for a request that failed, which is later than any."""
    known = sorted(math.inf if one is None else one for one in latencies_ms)
    # JSON has no infinity; no request takes as long as a day.
    ranks = [min(86_400_000.0, _at(known, share)) for share in (0.5, 0.95, 0.99)]
    return Measurement(
        candidate=candidate,
        load=load,
        arrival_rps=round(arrival_rps, 3),
        seconds=seconds,
        requests=len(known),
        in_time=sum(one <= target for one in known),
        failed=sum(one is None for one in latencies_ms),
        p50_ms=round(ranks[0], 3),
        p95_ms=round(ranks[1], 3),
        p99_ms=round(ranks[2], 3),
    )


def _at(ordered: Sequence[float], share: float) -> float:
    """The nearest rank; infinite where there is nothing."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.inf


# -- what is best ----------------------------------------------------------------------------------------------------


def verdicts(measured: Iterable[Measurement], target_p95_ms: float) -> list[Verdict]:
    """Each candidate's, the best first: those that meet the target by goodput, then the others by theirs."""
    by_name: dict[str, list[Measurement]] = {}
    for one in measured:
        by_name.setdefault(one.candidate, []).append(one)
    found = []
    for name, parts in by_name.items():
        fine = [one for one in parts if one.p95_ms <= target_p95_ms]
        best = max(fine or parts, key=lambda one: one.goodput_rps)
        found.append(
            Verdict(
                candidate=name,
                goodput_rps=round(best.goodput_rps, 3),
                p95_ms=best.p95_ms,
                load=best.load,
                meets_target=bool(fine),
            )
        )
    return sorted(found, key=lambda one: (not one.meets_target, -one.goodput_rps, one.p95_ms))


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by dotted key as a configuration file nests them."""
    document: dict[str, Any] = {}
    for key, value in settings.items():
        *sections, name = key.split(".")
        inner = document
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = value
    return document


# -- the file --------------------------------------------------------------------------------------------------------


class Measurements:
    """The measurements of a sweep, a line of JSON each, written as they are made: an interrupted sweep goes on from it.

    Raises:
        SweepError: on opening: the file is of other measurements, which cannot be compared with those that are wanted.
    """

    def __init__(self, path: Path, header: Header) -> None:
        self._path = path
        self.done: list[Measurement] = []
        self.saturation: Saturation | None = None
        lines = self._whole_lines()
        if not lines:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(msgspec.json.encode(header) + b"\n")
            return
        self._check(lines[0], header)
        for line in lines[1:]:
            self._take(line)

    def _whole_lines(self) -> list[bytes]:
        """The file's lines; one that was cut off in the middle is taken away."""
        try:
            raw = self._path.read_bytes()
        except FileNotFoundError:
            return []
        whole, _, rest = raw.rpartition(b"\n")
        if rest:
            self._path.write_bytes(whole + b"\n" if whole else b"")
        return whole.splitlines()

    def _check(self, line: bytes, header: Header) -> None:
        try:
            kept = msgspec.json.decode(line, type=Header)
        except msgspec.DecodeError as error:
            raise SweepError(f"{self._path} holds no measurements ({error}): name another folder by --output") from None
        differing = [name for name in header.__struct_fields__ if getattr(kept, name) != getattr(header, name)]
        if differing:
            told = "; ".join(f"{name} was {getattr(kept, name)}, is {getattr(header, name)}" for name in differing)
            raise SweepError(
                f"{self._path} is of another sweep ({told}): --fresh measures anew, --output names another folder"
            )

    def _take(self, line: bytes) -> None:
        try:
            if b'"rate_rps"' in line:
                self.saturation = msgspec.json.decode(line, type=Saturation)
            else:
                self.done.append(msgspec.json.decode(line, type=Measurement))
        except msgspec.DecodeError as error:
            raise SweepError(f"{self._path} cannot be read ({error}): --fresh measures anew") from None

    def add(self, entry: Measurement | Saturation) -> None:
        """Keep what was measured."""
        with self._path.open("ab") as file:
            file.write(msgspec.json.encode(entry) + b"\n")
        if isinstance(entry, Saturation):
            self.saturation = entry
        else:
            self.done.append(entry)
