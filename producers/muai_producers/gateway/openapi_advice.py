"""The OpenAPI document: analysis and plans."""

from __future__ import annotations

from typing import Any

from muai_producers.advice.records import (
    Analysis,
    AnalysisRequest,
    ApplyRequest,
    ApplyResult,
    OptimizationPlan,
    OptimizationRequest,
)
from muai_producers.gateway.openapi import content, operation, response

TYPES = (Analysis, AnalysisRequest, ApplyRequest, ApplyResult, OptimizationPlan, OptimizationRequest)
_SIZE = "optimization.batcher.max_batch_size"
_SERVER = {
    "instance_id": "localhost:8000",
    "instance_type": "vllm",
    "current_config": {"max_batch_size": 32, "quantization": "none", "max_model_len": 4096},
}
_OWN = {"instance_id": "all-minilm-l6-v2", "instance_type": "muai"}
_REQUESTS = {
    "server": {"summary": "A vLLM server", "value": _SERVER},
    "own": {"summary": "A model of this installation", "value": _OWN},
}
_ANALYSES = {
    "server": {
        "summary": "A vLLM server",
        "value": {"instance_id": "localhost:8000", "instance_type": "vllm", "current_config": {"max_num_seqs": 32}},
    },
    "own": {"summary": "A model of this installation", "value": _OWN},
}
_ANALYSIS = {
    "instance_id": "all-minilm-l6-v2",
    "instance_type": "muai",
    "timestamp": "2026-11-25T03:12:40.120Z",
    "source": "the performance data of all-minilm-l6-v2 on onnx, 5210 requests in 300 s",
    "bottlenecks": [
        {
            "kind": "queueing",
            "severity": "critical",
            "description": "Requests wait for longer than they need to: more arrive than are run at once.",
            "evidence": [
                {
                    "metric": "wait_share",
                    "value": 0.91,
                    "threshold": 0.5,
                    "meaning": "91% of a request's time is waiting (212 of 233 ms); half is much",
                }
            ],
        }
    ],
    "figures": {"wait_ms": 212.0, "total_ms": 233.0, "mean_batch": 7.9},
}
_PLAN: dict[str, Any] = {
    "instance_id": "all-minilm-l6-v2",
    "instance_type": "muai",
    "timestamp": "2026-11-25T03:12:40.120Z",
    "optimizations": [
        {
            "type": "batching",
            "title": "Run more requests in one batch",
            "description": "Requests wait although every batch is full.",
            "config_changes": [
                {
                    "parameter": _SIZE,
                    "current_value": 8,
                    "recommended_value": 16,
                    "reason": "More requests share what a batch costs however large it is",
                }
            ],
            "expected_impact": "medium",
            "estimated_improvement": "21-33% throughput increase (a batch of n was measured to take 1.5·n + 12 ms: "
            "each slot serves 332 requests/s in batches of 7.9, 400 if they fill to 12, 444 if to 16)",
            "implementation_effort": "Low - a reloadable setting, applied within a second",
            "risks": ["The setting is for all models of the installation"],
            "prerequisites": ["Memory for a batch of that size"],
        }
    ],
    "batching_config": {
        "max_batch_size": 16,
        "enable_continuous_batching": False,
        "enable_dynamic_batching": True,
    },
    "priority_order": ["batching_0"],
    "estimated_total_improvement": "21-33% throughput increase expected (at least the best of them alone, at most each "
    "on top of the others)",
}
_APPLIED = {"version": 8, "rollback_to": 7, "applied": {_SIZE: 16}, "not_applied": []}
_ERRORS = (403, 404, 408, 413, 415)

ANALYZE = operation(
    "analyzeInstance",
    "What holds an instance up, with the figures that say so",
    {200: response("Most severe first.", Analysis, _ANALYSIS)},
    (*_ERRORS, 424),
    requestBody={"required": True, "content": content(AnalysisRequest, examples=_ANALYSES)},
)
OPTIMIZE = operation(
    "optimizeInstance",
    "A plan of what would help an instance, by how much, and where the figures come from",
    {200: response("Most urgent first.", OptimizationPlan, _PLAN)},
    _ERRORS,
    requestBody={"required": True, "content": content(OptimizationRequest, examples=_REQUESTS)},
)
APPLY = operation(
    "applyPlan",
    "Do what a plan advises, as far as settings can change while processes run",
    {200: response("What was done, what has to be done elsewhere, and the way back.", ApplyResult, _APPLIED)},
    (*_ERRORS, 409, 422),
    requestBody={
        "required": True,
        "content": content(
            ApplyRequest, examples={"first": {"summary": "The first of a plan", "value": {
                "plan": _PLAN, "optimizations": ["batching_0"], "why": "morning peak"}}}
        ),
    },
)  # fmt: skip
