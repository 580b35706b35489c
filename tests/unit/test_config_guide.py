"""The configuration guide, written out: its keys, defaults and variables must not drift with the code."""

from typing import Any

import pytest

from muai_config import Settings, build_settings
from muai_config.reference import all_settings, plain, value_of

DEFAULTS: dict[str, Any] = {
    "optimization.enabled": True,
    "optimization.engine_preference": ["vllm", "deepspeed", "onnx", "pytorch"],
    "optimization.fallback_on_error": True,
    "optimization.vllm.enabled": True,
    "optimization.vllm.tensor_parallel_size": 1,
    "optimization.vllm.dtype": "auto",
    "optimization.vllm.max_model_len": None,
    "optimization.vllm.gpu_memory_utilization": 0.9,
    "optimization.vllm.swap_space": 4,
    "optimization.deepspeed.enabled": True,
    "optimization.deepspeed.tensor_parallel": 1,
    "optimization.deepspeed.pipeline_parallel": 1,
    "optimization.deepspeed.dtype": "fp16",
    "optimization.deepspeed.replace_with_kernel_inject": True,
    "optimization.onnx.enabled": True,
    "optimization.onnx.execution_providers": ["CUDAExecutionProvider", "CPUExecutionProvider"],
    "optimization.onnx.optimization_level": "all",
    "optimization.onnx.enable_quantization": False,
    "optimization.batcher.enabled": True,
    "optimization.batcher.max_batch_size": 32,
    "optimization.batcher.batch_timeout_ms": 50,
    "optimization.batcher.adaptive_batching": True,
    "optimization.batcher.min_batch_size": 1,
    "optimization.cache.enabled": True,
    "optimization.cache.max_memory_mb": 4096,
    "optimization.cache.eviction_policy": "lru",
    "optimization.tuner.enabled": False,
    "optimization.tuner.observation_window_seconds": 300,
    "optimization.tuner.tuning_interval_seconds": 60,
    "optimization.tuner.enable_batch_size_tuning": True,
    "optimization.tuner.enable_timeout_tuning": True,
    "optimization.tuner.enable_cache_size_tuning": True,
    "monitoring.enabled": True,
    "monitoring.prometheus.enabled": True,
    "monitoring.prometheus.port": 9090,
    "monitoring.prometheus.host": "0.0.0.0",
    "monitoring.prometheus.path": "/metrics",
    "monitoring.tracing.enabled": True,
    "monitoring.tracing.endpoint": "http://localhost:4317",
    "monitoring.tracing.sample_rate": 1.0,
    "monitoring.tracing.service_name": "muai-orchestration",
    "monitoring.tracing.export_timeout_ms": 30000,
    "monitoring.anomaly.enabled": True,
    "monitoring.anomaly.latency_threshold_ms": 1000.0,
    "monitoring.anomaly.error_rate_threshold": 0.05,
    "monitoring.anomaly.memory_threshold_percent": 90.0,
    "monitoring.anomaly.throughput_threshold_rps": 1.0,
    "monitoring.anomaly.alert_rate_limit_seconds": 300,
    "monitoring.anomaly.alert_destinations": ["log"],
    "monitoring.anomaly.webhook_url": None,
    "monitoring.server.enabled": False,
    "monitoring.server.host": "0.0.0.0",
    "monitoring.server.port": 8000,
    "monitoring.server.queue_capacity": 100,
    "monitoring.server.preload_models": [],
    "monitoring.server.graceful_shutdown_timeout": 30,
    "monitoring.server.health_check_path": "/health",
    "monitoring.server.readiness_check_path": "/ready",
}

# variable: (key, text, value)
VARIABLES: dict[str, tuple[str, str, Any]] = {
    "MUAI_OPT_ENABLED": ("optimization.enabled", "false", False),
    "MUAI_OPT_VLLM_ENABLED": ("optimization.vllm.enabled", "false", False),
    "MUAI_OPT_VLLM_TENSOR_PARALLEL": ("optimization.vllm.tensor_parallel_size", "2", 2),
    "MUAI_OPT_VLLM_DTYPE": ("optimization.vllm.dtype", "fp16", "fp16"),
    "MUAI_OPT_VLLM_GPU_MEMORY": ("optimization.vllm.gpu_memory_utilization", "0.8", 0.8),
    "MUAI_OPT_DEEPSPEED_ENABLED": ("optimization.deepspeed.enabled", "false", False),
    "MUAI_OPT_DEEPSPEED_TENSOR_PARALLEL": ("optimization.deepspeed.tensor_parallel", "2", 2),
    "MUAI_OPT_ONNX_ENABLED": ("optimization.onnx.enabled", "false", False),
    "MUAI_OPT_BATCHER_ENABLED": ("optimization.batcher.enabled", "false", False),
    "MUAI_OPT_BATCHER_MAX_SIZE": ("optimization.batcher.max_batch_size", "64", 64),
    "MUAI_OPT_BATCHER_TIMEOUT": ("optimization.batcher.batch_timeout_ms", "20", 20),
    "MUAI_OPT_CACHE_ENABLED": ("optimization.cache.enabled", "false", False),
    "MUAI_OPT_CACHE_MAX_MEMORY": ("optimization.cache.max_memory_mb", "1024", 1024),
    "MUAI_OPT_TUNER_ENABLED": ("optimization.tuner.enabled", "true", True),
    "MUAI_MON_ENABLED": ("monitoring.enabled", "false", False),
    "MUAI_MON_PROMETHEUS_ENABLED": ("monitoring.prometheus.enabled", "false", False),
    "MUAI_MON_PROMETHEUS_PORT": ("monitoring.prometheus.port", "9100", 9100),
    "MUAI_MON_TRACING_ENABLED": ("monitoring.tracing.enabled", "false", False),
    "MUAI_MON_TRACING_ENDPOINT": ("monitoring.tracing.endpoint", "http://otel:4317", "http://otel:4317"),
    "MUAI_MON_TRACING_SAMPLE_RATE": ("monitoring.tracing.sample_rate", "0.1", 0.1),
    "MUAI_MON_ANOMALY_ENABLED": ("monitoring.anomaly.enabled", "false", False),
    "MUAI_MON_ANOMALY_LATENCY_THRESHOLD": ("monitoring.anomaly.latency_threshold_ms", "500.0", 500.0),
    "MUAI_MON_SERVER_ENABLED": ("monitoring.server.enabled", "true", True),
    "MUAI_MON_SERVER_PORT": ("monitoring.server.port", "8080", 8080),
    "MUAI_MON_SERVER_QUEUE_CAPACITY": ("monitoring.server.queue_capacity", "5", 5),
    "MUAI_MON_SERVER_PRELOAD_MODELS": ("monitoring.server.preload_models", "qwen_chat,t5", ["qwen_chat", "t5"]),
}
MODELS = {
    "models": {
        "qwen_chat": {"task": "chat", "source": "hub:a/b"},
        "t5": {"task": "summarization", "source": {"folder": "/models/t5"}},
    }
}
BY_KEY = {info.key: info for info in all_settings()}


@pytest.mark.parametrize("key", DEFAULTS)
def test_Given_nothing_configured_When_read_Then_the_guides_default_holds(key: str) -> None:
    assert plain(value_of(build_settings({}, {}), BY_KEY[key])) == DEFAULTS[key]


@pytest.mark.parametrize("variable", VARIABLES)
def test_Given_a_variable_of_the_guide_When_read_Then_it_sets_its_key(variable: str) -> None:
    key, text, value = VARIABLES[variable]
    assert plain(value_of(build_settings(MODELS, {variable: text}), BY_KEY[key])) == value


def test_Given_defaults_by_code_and_by_reading_Then_they_are_the_same() -> None:
    assert build_settings({}, {}) == Settings()


@pytest.mark.parametrize(
    ("variable", "key"),
    [
        ("MUAI_OPT_BATCHER_MAX_BATCH_TOKENS", "optimization.batcher.max_batch_tokens"),
        ("MUAI_OPT_PYTORCH_NUM_THREADS", "optimization.pytorch.num_threads"),
        ("MUAI_QUEUE_MAX_DELIVERIES", "queue.max_deliveries"),
        ("MUAI_QUEUE_TENANT_MAX_TOKENS", "queue.tenant_max_tokens"),
        ("MUAI_MODELS_MAX_CACHED", "models.max_cached"),
    ],
)
def test_Given_a_key_without_a_name_in_the_guide_Then_its_path_is_its_variable(variable: str, key: str) -> None:
    assert value_of(build_settings({}, {variable: "7"}), BY_KEY[key]) == 7


def test_Every_setting_Then_has_a_variable_of_its_own_and_words_for_the_reference() -> None:
    variables = [variable for info in all_settings() for variable in info.variables]
    assert len(variables) == len(set(variables))
    for info in all_settings():
        assert info.description.endswith("."), info.key
        assert info.allowed, info.key
        assert info.example is not None, info.key
