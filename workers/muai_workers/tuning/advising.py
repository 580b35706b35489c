"""What the tuner advises and does not do itself, because it takes a restart and changes what models answer. Pure."""

from __future__ import annotations

from muai_workers.tuning.proposing import PATIENCE, TIGHT_PERCENT, Situation
from muai_workers.tuning.records import Look, Rules

ENGINE_SHARE = 0.5
"""Of the latency: from there on smaller weights are worth a thought."""
LATE_SHARE = 0.05


def advice(look: Look, now: Situation, rules: Rules) -> str:
    """A sentence on quantization; '' where it would not help, or the engine has none, or it is on already."""
    if look.quantized is not False:
        return ""
    setting = "optimization.onnx.enable_quantization stores weights as 8-bit integers: try it beside your own checks"
    if look.memory_percent >= TIGHT_PERCENT:
        return f"{look.memory_percent:.0f} % of the memory is in use; {setting}"
    if now.behind and now.drains_in_s <= PATIENCE * rules.interval_s:
        return ""
    latency_ms = now.wait_ms + now.inference_ms
    late = 1.0 - now.in_time
    if late > LATE_SHARE and latency_ms > 0 and (now.behind or now.inference_ms / latency_ms >= ENGINE_SHARE):
        return (
            f"{100 * late:.0f} % of requests are not answered within {rules.target_ms:.0f} ms at the best settings "
            f"found, and {look.engine} takes {now.inference_ms:.0f} ms for a batch; {setting}"
        )
    return ""
