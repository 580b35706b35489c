"""Which file is read, what comes from where, and how an application's own file is treated."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from muai_config import ConfigError, Settings, build_settings, load_settings
from muai_config.loading import resolve_file


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config").mkdir()
    return tmp_path


def prefixed(path: Path, prefix: str) -> Path:
    path.write_text(f"queue: {{key_prefix: {prefix}}}\n")
    return path


def test_Given_several_files_Then_argument_variable_optimization_and_system_come_in_this_order(folder: Path) -> None:
    assert load_settings(env={}).queue.key_prefix == "muai"
    prefixed(folder / "config/system.yaml", "system")
    assert load_settings(env={}).queue.key_prefix == "system"
    prefixed(folder / "config/optimization.yaml", "optimization")
    assert load_settings(env={}).queue.key_prefix == "optimization"
    named = prefixed(folder / "named.yaml", "named")
    assert load_settings(env={"MUAI_CONFIG": str(named)}).queue.key_prefix == "named"
    given = prefixed(folder / "given.yaml", "given")
    assert load_settings(given, {"MUAI_CONFIG": str(named)}).queue.key_prefix == "given"


def test_Given_MUAI_CONFIG_names_no_file_Then_that_is_an_error_and_not_the_defaults(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read: No such file or directory"):
        load_settings(env={"MUAI_CONFIG": "nowhere.yaml"})


def test_Given_no_environment_passed_Then_the_processs_own_is_read_at_the_call(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MUAI_QUEUE_KEY_PREFIX", "mine")
    assert load_settings().queue.key_prefix == "mine"


def test_Given_duplicates_and_other_faults_Then_all_are_reported_at_once(folder: Path) -> None:
    path = folder / "a.yaml"
    path.write_text("queue:\n  key_prefix: a\n  key_prefix: b\n  max_deliveries: 0\nfoo: 1\n")
    with pytest.raises(ConfigError) as caught:
        load_settings(path, {"MUAI_OPT_ENABLED": "perhaps"})
    assert len(caught.value.problems) == 4
    assert f"[from {path}:4]" in str(caught.value)


def test_Given_a_shared_file_Then_foreign_sections_and_keys_are_left_alone_and_named(folder: Path) -> None:
    path = folder / "system.yaml"
    path.write_text("models: {cache_dir: ./models, max_cached: 3, default: x}\nlogging: {level: info}\n")
    resolution = resolve_file(path, {})
    assert resolution.ignored == ("logging", "models.default")
    assert resolution.settings.model_cache.cache_dir == Path("models")
    assert resolution.settings.model_cache.max_cached == 3
    assert "all-minilm-l6-v2" in resolution.settings.models


def test_Given_the_same_foreign_section_in_a_file_of_ours_Then_it_is_refused(folder: Path) -> None:
    path = folder / "optimization.yaml"
    path.write_text("logging: {level: info}\n")
    with pytest.raises(ConfigError, match="logging: there is no such key"):
        load_settings(path, {})


def test_Given_a_shared_file_without_our_section_Then_optimization_is_off_until_asked_for(folder: Path) -> None:
    path = folder / "system.yaml"
    path.write_text("logging: {}\n")
    assert not load_settings(path, {}).optimization.enabled
    assert load_settings(path, {"MUAI_OPT_ENABLED": "true"}).optimization.enabled
    path.write_text("optimization: {}\n")
    assert load_settings(path, {}).optimization.enabled


def test_Given_file_variable_and_default_Then_each_value_knows_its_source(folder: Path) -> None:
    path = folder / "a.yaml"
    path.write_text("queue:\n  key_prefix: a\n  max_deliveries: 5\n")
    sources = resolve_file(path, {"MUAI_QUEUE_MAX_DELIVERIES": "7", "MUAI_HOME": "/srv"}).sources
    assert str(sources["queue", "key_prefix"]) == f"{path}:2"
    assert str(sources["queue", "max_deliveries"]) == "MUAI_QUEUE_MAX_DELIVERIES"
    assert str(sources["queue", "lease_ttl_s"]) == "default"
    assert str(sources["optimization", "onnx", "cache_dir"]) == "MUAI_HOME"


def test_Given_sections_with_nothing_in_them_Then_they_are_all_defaults() -> None:
    assert build_settings({"optimization": None, "monitoring": {"anomaly": None}, "models": None}, {}) == Settings()


def test_Given_variables_with_empty_texts_Then_they_count_as_not_set() -> None:
    document = {"optimization": {"batcher": {"latency_target_ms": 5.0}}}
    env = {"MUAI_OPT_BATCHER_LATENCY_TARGET_MS": " ", "MUAI_OPT_ENABLED": ""}
    assert build_settings(document, env).optimization.batcher.latency_target_ms == 5.0
    env["MUAI_OPT_BATCHER_LATENCY_TARGET_MS"] = "null"
    assert build_settings(document, env).optimization.batcher.latency_target_ms is None


def test_Given_settings_When_something_assigns_to_them_Then_it_fails() -> None:
    settings = Settings()
    with pytest.raises(ValidationError, match="frozen"):
        settings.queue.key_prefix = "other"


def test_Given_a_document_When_settings_are_built_Then_the_document_is_not_changed() -> None:
    document = {"optimization": {"batcher": {}}, "models": {"max_cached": 3}}
    build_settings(document, {"MUAI_OPT_BATCHER_MAX_SIZE": "5"})
    assert document == {"optimization": {"batcher": {}}, "models": {"max_cached": 3}}


@pytest.mark.parametrize(
    ("env", "state_url"),
    [
        ({}, "redis://127.0.0.1:6379/0"),
        ({"MUAI_BROKER_URL": "rediss://r:1/2"}, "rediss://r:1/2"),
        ({"MUAI_BROKER_URL": "amqp://r//"}, "redis://127.0.0.1:6379/0"),
        (
            {"MUAI_BROKER_URL": "redis://a", "MUAI_REDIS_URL": "redis://b"},
            "redis://b",
        ),
    ],
)
def test_Given_a_broker_Then_the_state_lies_in_it_when_it_is_Redis(env: dict[str, str], state_url: str) -> None:
    assert build_settings({}, env).queue.state_url == state_url
