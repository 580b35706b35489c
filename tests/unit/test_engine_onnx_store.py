"""Converted models on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from muai_workers.engines.onnx_store import MANIFEST, ConversionStore


class Builder:
    def __init__(self) -> None:
        self.builds = 0

    def __call__(self, scratch: Path) -> dict[str, float]:
        self.builds += 1
        (scratch / "model.onnx").write_bytes(b"a graph")
        return {"max_difference": 0.5}


def test_a_conversion_is_made_once_and_keeps_its_facts(tmp_path: Path) -> None:
    builder, store = Builder(), ConversionStore(tmp_path / "cache")
    for _ in range(2):
        conversion = store.open_or_build("key", builder)
        assert conversion.facts == {"max_difference": 0.5}
        assert (conversion.folder / "model.onnx").read_bytes() == b"a graph"
    assert builder.builds == 1


@pytest.mark.parametrize(
    "damage", ["other bytes", "file gone", "manifest gone", "manifest cut", "manifest of another shape"]
)
def test_a_damaged_conversion_is_made_anew(tmp_path: Path, damage: str) -> None:
    builder, store = Builder(), ConversionStore(tmp_path)
    folder = store.open_or_build("key", builder).folder
    match damage:
        case "other bytes":
            (folder / "model.onnx").write_bytes(b"a graPh")
        case "file gone":
            (folder / "model.onnx").unlink()
        case "manifest gone":
            (folder / MANIFEST).unlink()
        case "manifest cut":
            (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:20])
        case _:
            (folder / MANIFEST).write_text(json.dumps([1, 2]))
    assert (store.open_or_build("key", builder).folder / "model.onnx").read_bytes() == b"a graph"
    assert builder.builds == 2


def test_a_build_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    store = ConversionStore(tmp_path)

    def fail(scratch: Path) -> dict[str, float]:
        (scratch / "model.onnx").write_bytes(b"half")
        raise RuntimeError("exporter")

    with pytest.raises(RuntimeError, match="exporter"):
        store.open_or_build("key", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["key.lock"]
    assert store.open_or_build("key", Builder()).facts == {"max_difference": 0.5}
