"""What a process counts: increases, bounded in their number of series, and never an exception."""

from muai_producers.monitoring import instruments
from muai_producers.monitoring.guard import standings
from muai_producers.monitoring.instruments import INSTRUMENTS, OTHER, Instrument
from muai_producers.monitoring.recorder import Gathered, Recorder


def test_given_counts_and_observations_when_taken_then_each_increase_is_there_once() -> None:
    recorder = Recorder()
    recorder.count(instruments.REQUESTS, "m", "onnx", "success", by=3)
    recorder.observe(instruments.BATCH_SIZE, "m", values=[1, 2, 600])
    recorder.observe(instruments.BATCH_SIZE, "m", values=[2] * 4)
    taken = recorder.take()
    assert taken.counters == {("inference_requests_total", ("m", "onnx", "success")): 3}
    cells = taken.histograms["batch_size", ("m",)]
    assert cells[:2] == [1, 5]
    assert cells[-2:] == [1, 611]
    assert not recorder.take()


def test_given_two_gatherings_when_added_then_they_are_one() -> None:
    recorder, whole = Recorder(), Gathered()
    for value in (1, 4):
        recorder.count(instruments.DIED, "oom", by=value)
        recorder.observe(instruments.BATCH_SIZE, "m", values=[value])
        whole.add(recorder.take())
    assert whole.counters["muai_dead_letters_total", ("oom",)] == 5
    assert whole.histograms["batch_size", ("m",)][-1] == 5


def test_given_more_tenants_than_series_then_the_rest_are_other() -> None:
    recorder = Recorder()
    for number in range(300):
        recorder.count(instruments.TENANT_REQUESTS, f"t{number}", "success")
    counters = recorder.take().counters
    assert len(counters) == 201
    assert counters["muai_tenant_requests_total", (OTHER, "success")] == 100


def test_given_wrong_labels_then_nothing_is_raised_and_the_failure_counts() -> None:
    recorder, before = Recorder(), standings.failures().get("metrics", 0)
    recorder.count(instruments.DIED)
    assert standings.failures()["metrics"] == before + 1
    assert not recorder.take()


def test_given_a_sampler_that_fails_then_the_others_are_read() -> None:
    recorder = Recorder()

    def broken() -> list[tuple[Instrument, tuple[str, ...], float]]:
        raise RuntimeError("no device")

    recorder.sample_from(broken)
    recorder.sample_from(lambda: [(instruments.CPU_USAGE, ("here",), 12.0)])
    recorder.set(instruments.COLLECTED, "m", value=3)
    assert {instrument.name: value for instrument, _, value in recorder.readings()} == {
        "cpu_usage_percent": 12.0,
        "muai_requests_collected": 3,
    }


def test_given_a_recorder_that_is_off_then_nothing_gathers() -> None:
    recorder = Recorder()
    recorder.enabled = False
    recorder.count(instruments.DIED, "oom")
    recorder.observe(instruments.BATCH_SIZE, "m", values=[1])
    assert not recorder.take()


def test_every_instrument_has_its_own_name_and_meaning() -> None:
    assert len({one.name for one in INSTRUMENTS}) == len(INSTRUMENTS)
    for one in INSTRUMENTS:
        assert one.help.endswith(".")
        assert one.name.endswith("_total") == (one.kind == "counter")
        assert bool(one.buckets) == (one.kind == "histogram")
        assert set(one.open) <= set(one.labels)


def test_no_metric_has_the_family_of_another() -> None:
    """A counter's family is its name without `_total`: readers that strip it would take a gauge of that name for it."""
    families = [name.removesuffix("_total") for name in instruments.BY_NAME]
    assert len(set(families)) == len(families)
