"""vLLM's part of property 3, for any configuration; that it computes with it is tried where vLLM is."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests import models

from muai_workers.engines.vllm_plan import DTYPES, Device, plan_vllm

DEVICES: tuple[Device, ...] = ("cpu", "cuda")


# Property 3: Engine configuration is applied correctly
@pytest.mark.property(3)
@given(
    tensor=st.integers(1, 16),
    pipeline=st.integers(1, 8),
    dtypes=st.tuples(st.sampled_from(("auto", *DTYPES)), st.sampled_from(("auto", *DTYPES))),
    length=st.none() | st.integers(1, 1_000_000),
    share=st.floats(0, 1),
    swap=st.integers(0, 64),
    device=st.sampled_from(DEVICES),
)
def test_vllm_is_told_what_is_configured(
    tensor: int,
    pipeline: int,
    dtypes: tuple[str, str],
    length: int | None,
    share: float,
    swap: int,
    device: Device,
) -> None:
    spec = models.model_spec("writer", "chat", "folder:/nowhere", dtype=dtypes[0])
    vllm = {
        "tensor_parallel_size": tensor,
        "pipeline_parallel_size": pipeline,
        "dtype": dtypes[1],
        "max_model_len": length,
        "gpu_memory_utilization": share,
        "swap_space": swap,
    }
    plan = plan_vllm(spec, Path("/models/writer"), models.settings(vllm=vllm), device)
    told = plan.arguments
    assert (told["tensor_parallel_size"], told["pipeline_parallel_size"]) == (tensor, pipeline)
    assert plan.num_ranks == tensor * pipeline
    assert told.get("max_model_len") == length
    assert told["gpu_memory_utilization"] == share
    wanted = dtypes[0] if dtypes[0] != "auto" else dtypes[1]
    assert told["dtype"] == DTYPES.get(wanted, "float32" if device == "cpu" else "auto")
    if device == "cuda":
        assert told.get("kv_offloading_size", 0.0) == swap * tensor * pipeline
    else:
        assert any("swap_space" in one for one in plan.degraded) == (swap > 0)
