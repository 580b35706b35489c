"""What a wrong configuration is answered with: exact lines, since they are what the operator has to go by."""

import pickle
from typing import Any

import pytest

from muai_config import ConfigError, UnknownModelError, build_settings
from muai_config.loading import Origin, resolve

URL_WORDS = "redis://, rediss://, sentinel://, amqp://, amqps://"
PROVIDERS = "CUDAExecutionProvider, TensorrtExecutionProvider, CPUExecutionProvider, OpenVINOExecutionProvider"


def lines(document: dict[str, Any], env: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        build_settings(document, env or {})
    return str(caught.value).splitlines()


def at(key: str, value: Any) -> dict[str, Any]:
    for name in reversed(key.split(".")):
        value = {name: value}
    assert isinstance(value, dict)
    return value


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("optimization.enabled", "false", '"false" is not allowed (allowed: true or false)'),
        ("optimization.enabled", 1, "1 is not allowed (allowed: true or false)"),
        ("optimization.batcher.max_batch_size", 0, "0 is not allowed (allowed: an integer from 1 to 4096)"),
        ("optimization.batcher.max_batch_size", True, "true is not allowed (allowed: an integer from 1 to 4096)"),
        ("optimization.batcher.max_batch_size", 8.0, "8.0 is not allowed (allowed: an integer from 1 to 4096)"),
        ("optimization.batcher.max_batch_size", None, "null is not allowed (allowed: an integer from 1 to 4096)"),
        ("optimization.pytorch.num_threads", 0, "0 is not allowed (allowed: an integer from 1 to 4096, or null)"),
        ("optimization.onnx.tolerance", 0.0, "0.0 is not allowed (allowed: a number above 0.0, at most 1.0)"),
        ("monitoring.tracing.sample_rate", True, "true is not allowed (allowed: a number from 0.0 to 1.0)"),
        ("monitoring.anomaly.latency_threshold_ms", -1, "-1 is not allowed (allowed: a number above 0.0)"),
        ("monitoring.anomaly.throughput_threshold_rps", -1, "-1 is not allowed (allowed: a number of at least 0.0)"),
        ("optimization.vllm.dtype", "int8", '"int8" is not allowed (allowed: one of auto, fp16, fp32, bf16)'),
        ("monitoring.prometheus.path", "metrics", '"metrics" is not allowed (allowed: a path that starts with /)'),
        (
            "monitoring.tracing.endpoint",
            "localhost:4317",
            '"localhost:4317" is not allowed (allowed: an http:// or https:// address)',
        ),
        (
            "optimization.engine_preference",
            ["vllm", "vllm"],
            (
                '["vllm", "vllm"] is not allowed (allowed: a list of at least one entry, each at most once, each one '
                "of vllm, deepspeed, onnx, pytorch, fake)"
            ),
        ),
        (
            "optimization.engine_preference",
            [],
            (
                "[] is not allowed (allowed: a list of at least one entry, each at most once, each one of vllm, "
                "deepspeed, onnx, pytorch, fake)"
            ),
        ),
        ("optimization.onnx", 5, None),
        (
            "queue.broker_url",
            "kafka://x",
            f'"kafka://x" is not allowed (allowed: an address that starts with {URL_WORDS})',
        ),
        ("queue.broker_url", "redis://x:99999", None),
        ("queue.broker_url", "redis://a;redis://b", None),
        ("queue.broker_url", "redis://", None),
        ("monitoring.tracing.service_name", "", '"" is not allowed (allowed: a text that is not empty)'),
        ("optimization.onnx.cache_dir", " ", '" " is not allowed (allowed: the path of a folder, or null)'),
    ],
)
def test_Given_a_wrong_value_Then_the_line_says_what_is_allowed(key: str, value: Any, message: str | None) -> None:
    (line,) = lines(at(key, value))
    assert line.startswith(f"{key}: ")
    if message is not None:
        assert line == f"{key}: {message}"


def test_Given_a_wrong_entry_of_a_list_Then_its_place_is_named() -> None:
    assert lines(at("optimization.onnx.execution_providers", ["CPUExecutionProvider", "cpu"])) == [
        f'optimization.onnx.execution_providers[1]: "cpu" is not allowed (allowed: one of {PROVIDERS})'
    ]


def test_Given_a_wrong_variable_Then_it_is_named_as_the_source() -> None:
    assert lines({}, {"MUAI_OPT_BATCHER_MAX_SIZE": "0"}) == [
        (
            "optimization.batcher.max_batch_size: 0 is not allowed (allowed: an integer from 1 to 4096) "
            "[from MUAI_OPT_BATCHER_MAX_SIZE]"
        )
    ]
    assert lines({}, {"MUAI_OPT_ENABLED": "maybe"}) == [
        (
            'optimization.enabled: "maybe" is not allowed (allowed: true or false; in a variable also yes, no, on, '
            "off, 1, 0) [from MUAI_OPT_ENABLED]"
        )
    ]
    (line,) = lines({}, {"MUAI_OPT_ENGINE_PREFERENCE": "vllm,,onnx"})
    assert line.endswith("with commas between the entries) [from MUAI_OPT_ENGINE_PREFERENCE]")


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("optimisation", "did you mean optimization?"),
        ("optimization.vllm_enabled", "did you mean optimization.vllm.enabled?"),
        ("monitoring.prometheus_port", "did you mean monitoring.prometheus.port?"),
        ("optimization.batcher.max_bach_size", "did you mean optimization.batcher.max_batch_size?"),
        ("optimization.queue_capacity", "did you mean monitoring.server.queue_capacity?"),
        ("model_cache", "did you mean models.cache_dir?"),
        ("optimization.tuner.zzz", "the keys there are enabled, observation_window_seconds"),
        ("qqqqqq", "the keys there are optimization, monitoring, queue, gateway, models"),
    ],
)
def test_Given_a_misspelt_key_Then_the_nearest_is_offered(key: str, hint: str) -> None:
    (line,) = lines(at(key, {}))
    assert line.startswith(f"{key}: there is no such key; {hint}")


@pytest.mark.parametrize(
    ("variable", "hint"),
    [
        ("MUAI_OPT_BATCHER_MAX_BATCH_SIZE", "did you mean MUAI_OPT_BATCHER_MAX_SIZE?"),
        ("MUAI_OPT_BATCHER_BATCH_TIMEOUT_MS", "did you mean MUAI_OPT_BATCHER_TIMEOUT?"),
        ("MUAI_OPT_VLLM_TENSOR_PARALEL", "did you mean MUAI_OPT_VLLM_TENSOR_PARALLEL?"),
        ("MUAI_MON_SERVER_PROT", "did you mean MUAI_MON_SERVER_PORT?"),
        ("MUAI_BROKER", "did you mean MUAI_BROKER_URL?"),
        ("MUAI_ZZZZZZZZZZZZZZZZ", "`muai config docs` lists the variables"),
    ],
)
def test_Given_an_unknown_variable_Then_the_nearest_is_offered(variable: str, hint: str) -> None:
    assert lines({}, {variable: "1"}) == [f"{variable}: there is no such variable; {hint} [from {variable}]"]


def test_Given_variables_that_are_no_settings_Then_they_are_left_alone() -> None:
    env = {"MUAI_HOME": "/srv/muai", "MUAI_LOG_LEVEL": "debug", "MUAI_TEST_X": "1", "MUAI_BENCH_Y": "2", "PATH": "/bin"}
    assert build_settings({}, env).optimization.onnx.conversions_folder.as_posix() == "/srv/muai/onnx"


@pytest.mark.parametrize(
    ("document", "line"),
    [
        (
            at("optimization.batcher", {"min_batch_size": 64}),
            "optimization.batcher.min_batch_size: 64 is not allowed (allowed: at most max_batch_size, which is 32)",
        ),
        (
            at("monitoring.anomaly.alert_destinations", ["webhook"]),
            (
                "monitoring.anomaly.webhook_url: null is not allowed (allowed: an http:// or https:// address, because "
                "alert_destinations has webhook)"
            ),
        ),
        (
            at("monitoring.anomaly.alert_destinations", ["alertmanager"]),
            (
                "monitoring.anomaly.alertmanager_url: null is not allowed (allowed: an http:// or https:// address, "
                "because alert_destinations has alertmanager)"
            ),
        ),
        (
            at("monitoring.server", {"enabled": True, "port": 9090}),
            (
                "monitoring.prometheus.port: 9090 is not allowed (allowed: a port other than monitoring.server.port, "
                "as both listen)"
            ),
        ),
        (
            at("monitoring.server.readiness_check_path", "/health"),
            (
                'monitoring.server.readiness_check_path: "/health" is not allowed (allowed: a path other than '
                "health_check_path)"
            ),
        ),
        (
            at("monitoring.server.preload_models", ["all-minilm"]),
            (
                'monitoring.server.preload_models: "all-minilm" is not allowed (allowed: names from the models '
                "section: all-minilm-l6-v2; did you mean all-minilm-l6-v2?)"
            ),
        ),
    ],
)
def test_Given_values_that_contradict_each_other_Then_the_line_names_both(document: dict[str, Any], line: str) -> None:
    assert lines(document) == [line]


def test_Given_two_variables_for_one_key_When_they_differ_Then_neither_is_guessed() -> None:
    env = {"MUAI_BROKER_URL": "redis://a", "MUAI_QUEUE_BROKER_URL": "redis://b"}
    assert lines({}, env) == [
        (
            "queue.broker_url: MUAI_QUEUE_BROKER_URL and MUAI_BROKER_URL differ (allowed: one of them, or the same "
            "value in both)"
        )
    ]
    assert build_settings({}, env | {"MUAI_QUEUE_BROKER_URL": "redis://a"}).queue.broker_url == "redis://a"


def test_Given_a_password_in_a_wrong_value_Then_it_is_not_shown() -> None:
    (line,) = lines({}, {"MUAI_BROKER_URL": "redis://app:hunter2@host:notaport/0"})
    assert "hunter2" not in line
    assert "app:***@host" in line


def test_Given_hostile_keys_and_values_Then_each_problem_stays_one_short_line() -> None:
    text = "\u2028\n\r\x1b[31m" + "x" * 5000
    found = lines({text: 1, "optimization": {"vllm": {"dtype": text}}})
    assert len(found) == 2
    assert all(len(line) < 400 and "\x1b" not in line for line in found)


def test_Given_a_file_When_it_is_wrong_Then_its_line_is_named() -> None:
    origin = Origin("a.yaml", {("queue",): 3, ("queue", "key_prefix"): 5})
    with pytest.raises(ConfigError) as caught:
        resolve({"queue": {"key_prefix": "", "result_ttl": 4}}, {}, origin)
    assert [str(problem.source) for problem in caught.value.problems] == ["a.yaml:5", "a.yaml:3"]


def test_Given_the_errors_When_they_cross_processes_Then_they_stay_whole() -> None:
    with pytest.raises(ConfigError) as caught:
        build_settings({"queu": 1}, {})
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.problems, str(copy)) == (caught.value.problems, str(caught.value))
    unknown = UnknownModelError("all-minilm", ["all-minilm-l6-v2"])
    twin = pickle.loads(pickle.dumps(unknown))
    assert (str(twin), twin.nearest, twin.name) == (str(unknown), unknown.nearest, unknown.name)
