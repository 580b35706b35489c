"""What a sweep measures, keeps and calls best; the installation that it measures is not started here."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from muai_config import build_settings
from muai_config.errors import Source
from muai_config.runtime import overlaid
from muai_producers.cli.main import muai
from muai_workers.cli.tune import numbers, timeouts
from muai_workers.tuning import sweeping
from muai_workers.tuning.sweep import (
    Candidate,
    Header,
    Measurement,
    Measurements,
    Saturation,
    SweepError,
    candidates,
    nested,
    summarize,
    todo,
    verdicts,
)
from muai_workers.tuning.sweep_load import arrivals
from muai_workers.tuning.sweep_report import CSV, JSON, write_configuration, write_measurements
from muai_workers.tuning.sweeping import Sweep

HEADER = Header(
    model="m",
    engine="onnx",
    target_p95_ms=200.0,
    seconds=10.0,
    seed=1,
    machine="here",
    inputs="a",
    configuration="b",
)


def measurement(candidate: str, load: float, p95_ms: float, in_time: int = 100) -> Measurement:
    return Measurement(
        candidate=candidate,
        load=load,
        arrival_rps=100 * load,
        seconds=10.0,
        requests=1000,
        in_time=in_time,
        failed=0,
        p50_ms=p95_ms / 2,
        p95_ms=p95_ms,
        p99_ms=p95_ms * 2,
    )


def test_given_sizes_and_timeouts_then_every_combination_is_one_valid_configuration() -> None:
    found = candidates("onnx", [4, 32], ["adaptive", "0", "20"])
    assert [one.name for one in found] == [
        "4 x adaptive", "4 x 0 ms", "4 x 20 ms", "32 x adaptive", "32 x 0 ms", "32 x 20 ms"
    ]  # fmt: skip
    for one in found:
        batcher = overlaid(build_settings({}, {}), one.settings, Source("runtime", "test")).optimization.batcher
        assert batcher.max_batch_size == int(one.row)
        assert batcher.adaptive_batching == (one.column == "adaptive")
        assert build_settings(nested(one.settings), {}).optimization.batcher == batcher
    assert not any(one.needs_restart for one in found)


def test_given_vllm_then_its_own_limits_are_swept_and_each_needs_a_start() -> None:
    found = candidates("vllm", [8, 16], ["2048", "4096"])
    assert len(found) == 4
    for one in found:
        vllm = build_settings(nested(one.settings), {}).optimization.vllm
        assert f"{vllm.max_num_seqs} x {vllm.max_num_batched_tokens} tokens" == one.name
        assert one.needs_restart


def test_given_a_load_that_a_candidate_cannot_bear_then_no_higher_one_is_tried_of_it() -> None:
    wanted = candidates("onnx", [4, 8], ["5"])
    small, large = (one.name for one in wanted)
    done = [measurement(small, 0.5, 100.0), measurement(small, 0.7, 300.0), measurement(large, 0.5, 100.0)]
    left = list(todo(wanted, [0.9, 0.5, 0.7], done, 200.0))
    assert [(one.name, load) for one, load in left] == [(large, 0.7)]


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.floats(0.1, 1.0), st.floats(1.0, 400.0), st.integers(0, 1000)), min_size=1
    )
)
def test_given_any_measurements_then_the_best_meets_the_target_if_any_does_and_none_that_does_is_better(
    parts: list[tuple[str, float, float, int]],
) -> None:
    measured = [measurement(*part) for part in parts]
    best = verdicts(measured, 200.0)[0]
    fine = [one for one in measured if one.p95_ms <= 200.0]
    assert best.meets_target == bool(fine)
    assert best.goodput_rps == pytest.approx(max(one.goodput_rps for one in fine or measured), abs=1e-3)


def test_given_latencies_then_failures_are_later_than_any() -> None:
    got = summarize("x", 0.5, 20.0, 10.0, [10.0] * 90 + [None] * 10, 200.0)
    assert (got.requests, got.in_time, got.failed, got.goodput_rps) == (100, 90, 10, 9.0)
    assert got.p50_ms == 10.0
    assert got.p95_ms > 1e6, "a setting with which a tenth fail does not meet a target"


def test_given_an_interrupted_sweep_then_its_measurements_are_there_and_a_line_that_was_cut_off_is_not(
    tmp_path: Path,
) -> None:
    path = tmp_path / "deep" / "measurements.jsonl"
    kept = Measurements(path, HEADER)
    kept.add(Saturation(rate_rps=123.4))
    kept.add(measurement("a", 0.5, 100.0))
    with path.open("ab") as file:
        file.write(b'{"candidate":"a","load":0.')
    again = Measurements(path, HEADER)
    assert (again.saturation, again.done) == (Saturation(rate_rps=123.4), [measurement("a", 0.5, 100.0)])
    again.add(measurement("a", 0.7, 120.0))
    assert len(Measurements(path, HEADER).done) == 2


def test_given_measurements_of_another_sweep_then_they_are_not_mixed_and_the_error_says_what_differs(
    tmp_path: Path,
) -> None:
    path = tmp_path / "measurements.jsonl"
    Measurements(path, HEADER)
    other = Header(**{name: getattr(HEADER, name) for name in HEADER.__struct_fields__} | {"seconds": 20.0})
    with pytest.raises(SweepError, match=r"seconds was 10\.0, is 20\.0.*--fresh"):
        Measurements(path, other)
    path.write_text("something else\n", encoding="utf-8")
    with pytest.raises(SweepError, match="holds no measurements"):
        Measurements(path, HEADER)


def test_given_arrivals_then_they_are_poissons_and_the_same_for_a_seed() -> None:
    times = arrivals(200.0, 50.0, 3)
    assert times == arrivals(200.0, 50.0, 3) != arrivals(200.0, 50.0, 4)
    assert 9500 < len(times) < 10_500
    assert times == sorted(times)
    assert times[-1] < 50.0
    counts = [sum(at <= time_s < at + 1 for time_s in times) for at in range(50)]
    mean = sum(counts) / 50
    variance = sum((count - mean) ** 2 for count in counts) / 49
    assert 0.5 < variance / mean < 1.7, "the variance of a Poisson count is its mean"


def test_given_results_then_the_configuration_is_valid_and_the_measurements_lie_beside_it(tmp_path: Path) -> None:
    wanted = candidates("onnx", [4, 32], ["adaptive"])
    measured = [measurement("4 x adaptive", 0.5, 100.0, 400), measurement("32 x adaptive", 0.5, 150.0, 480)]
    found = verdicts(measured, 200.0)
    settings = {one.name: one.settings for one in wanted}
    path = write_configuration(tmp_path, HEADER, found[0], settings[found[0].candidate])
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert document == {"optimization": {"batcher": {"max_batch_size": 32, "adaptive_batching": True}}}
    result = CliRunner().invoke(muai, ["config", "check", str(path)])
    assert result.exit_code == 0, result.output
    write_measurements(tmp_path, HEADER, Saturation(rate_rps=99.0), measured, found)
    told = json.loads((tmp_path / JSON).read_text(encoding="utf-8"))
    assert told["verdicts"][0]["candidate"] == "32 x adaptive"
    assert told["measurements"][1]["goodput_rps"] == 48.0
    assert (
        (tmp_path / CSV).read_text(encoding="utf-8").splitlines()[2].startswith("32 x adaptive,0.5,50.0,10.0,1000,480")
    )


def test_given_no_matplotlib_then_it_is_said_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    config = tmp_path / "muai.yaml"
    config.write_text("models: {m: {task: embedding, source: 'hub:none', engines: [fake]}}", encoding="utf-8")
    output = tmp_path / "out"
    command = ["tune", "--model", "m", "--target-p95-ms", "200", "--output", str(output)]
    result = CliRunner(env={"MUAI_CONFIG": str(config)}).invoke(muai, command)
    assert result.exit_code == 1
    assert "pip install 'muai[tune]', or --no-plot" in result.output
    assert not output.exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--model", "n"], "no model 'n'; it has: m"),
        (["--engine", "vllm"], "no engine of m can run here"),
        (["--sizes", "4,x"], "no list of numbers above 0"),
        (["--timeouts", "fast"], "no list such as adaptive,5,20"),
        (["--tokens", "2048"], "--tokens says nothing to fake"),
    ],
)
def test_given_a_wrong_word_then_the_error_names_it(tmp_path: Path, words: list[str], told: str) -> None:
    config = tmp_path / "muai.yaml"
    config.write_text("models: {m: {task: embedding, source: 'hub:none', engines: [fake]}}", encoding="utf-8")
    command = ["tune", "--model", "m", "--target-p95-ms", "200", "--no-plot", *words]
    result = CliRunner(env={"MUAI_CONFIG": str(config), "COLUMNS": "200"}).invoke(muai, command)
    assert result.exit_code != 0
    assert told in " ".join(result.output.split())


def test_given_lists_then_they_are_read() -> None:
    assert numbers("4, 8,16", int, "--sizes") == [4, 8, 16]
    assert timeouts("adaptive,05") == ["adaptive", "5"]
    with pytest.raises(click.BadParameter):
        numbers("0", int, "--sizes")


class Recorded:
    """In place of an installation and its load: which settings it was given, and what it would measure."""

    def __init__(self) -> None:
        self.starts: list[dict[str, Any]] = []
        self.set_to: list[Mapping[str, Any]] = []
        self.client = None

    @contextmanager
    def start(self, home: Path, document: Any, static: Mapping[str, Any], engine: str) -> Iterator[Recorded]:
        self.starts.append(dict(static))
        yield self

    def set(self, settings: Mapping[str, Any]) -> None:
        self.set_to.append(settings)

    def loop(self, client: Any, requests: Any) -> Recorded:
        return self

    def saturate(self, count: int, seed: int) -> float:
        return 100.0

    def run(self, rate: float, seconds: float, seed: int) -> list[float]:
        return [rate] * round(rate * seconds)


@pytest.mark.parametrize(
    ("wanted", "starts", "changes"),
    [
        (candidates("onnx", [4, 8], ["adaptive", "5"]), 1, 4),
        (candidates("vllm", [8, 16], ["2048", "4096"]), 4, 0),
    ],
    ids=["batches", "vllm"],
)
def test_given_settings_that_engines_read_at_their_start_then_each_is_started_for_them_and_others_change_while_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: Sequence[Candidate], starts: int, changes: int
) -> None:
    fake = Recorded()
    monkeypatch.setattr(sweeping, "swept_stack", fake.start)
    monkeypatch.setattr(sweeping, "OpenLoop", fake.loop)
    steps: list[tuple[str, int]] = []
    sweep = Sweep(
        document={},
        engine="any",
        requests=[],
        candidates=wanted,
        loads=[0.5, 0.7, 0.9],
        target_p95_ms=60.0,
        seconds=1.0,
        seed=1,
        home=tmp_path,
        on_step=lambda text, left: steps.append((text, left)),
    )
    kept = Measurements(tmp_path / "m.jsonl", HEADER)
    sweep.run(kept)
    # Latencies are as many milliseconds as the load is: 70 a second is the first that misses the target.
    assert [(one.candidate, one.load) for one in kept.done] == [
        (candidate.name, load) for candidate in wanted for load in (0.5, 0.7)
    ]
    assert len(fake.starts) == starts
    if wanted[0].needs_restart:
        assert fake.starts == [one.settings for one in wanted]
    assert len(fake.set_to) >= changes
    assert steps[-1][1] >= 1
    assert sweep.most_left(kept) == 0
    again = Recorded()
    monkeypatch.setattr(sweeping, "swept_stack", again.start)
    sweep.run(Measurements(tmp_path / "m.jsonl", HEADER))
    assert again.starts == [], "what is measured is not measured again"
