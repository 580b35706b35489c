"""vLLM through the queue over vLLM driven directly."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import yaml
from workers.environments.build import build

from benchmarks.environments import PEERS
from benchmarks.figures.base import Measured, Measurement
from benchmarks.machine import ROOT
from benchmarks.muai_side import collector, configuration, engine_worker, environment, script_driver
from benchmarks.plan import Plan
from benchmarks.processes import Driver
from benchmarks.results import Goal, Row, ratios
from benchmarks.session import Session, bulk_rate, fitted_count, metric

MODEL = "writer"
ENGINE = "vllm"
OURS = "MuAI"
DIRECT = "LLM.generate"
NEW_TOKENS = 64
CACHE_MB = 512
CONTEXT_TOKENS = 512
LEAST = 64
"""Prompts in one measurement, at least."""
READY_LIMIT_S = 300.0


def measure(session: Session) -> Measured:
    """Both in turn, on the same prompts, pair by pair; whoever is not measured waits."""
    plan = session.plan
    direct_rates, served_rates = [], []
    with session.logs("vllm") as folder:
        session.on_step("making the model and vLLM's environment")
        model = _build_model(folder / "model")
        with _direct(folder, model) as direct, _served(folder, session.fresh(), model) as ours:
            count = fitted_count(direct, MODEL, plan.model_s, 10_000, LEAST)
            bulk_rate(ours, MODEL, LEAST, 0)
            for pair in range(plan.model_pairs):
                session.on_step(f"{DIRECT} and {OURS}: {count} prompts, pair {pair + 1} of {plan.model_pairs}")
                direct_rates.append(bulk_rate(direct, MODEL, count, pair + 1))
                served_rates.append(bulk_rate(ours, MODEL, count, pair + 1))
            rows = [
                Row(
                    name=DIRECT,
                    settings="fp32, all prompts in one call, no cache of prefixes",
                    versions=direct.versions,
                    metrics={"throughput": metric("requests/s", direct_rates)},
                ),
                Row(
                    name=OURS,
                    settings=f"defaults, no cache of prefixes; {count} prompts at once, one worker, one collector",
                    versions=ours.versions,
                    metrics={
                        "throughput": metric("requests/s", served_rates),
                        "ratio to direct": metric("", list(ratios(served_rates, direct_rates))),
                    },
                ),
            ]
    goals = [Goal(text="served over direct", value=rows[1].metrics["ratio to direct"].median, goal=0.95)]
    return Measured(rows, goals)


def _build_model(folder: Path) -> Path:
    """A Llama of 29 million parameters with seeded random weights: large enough that computing is what takes time."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from muai_workers.models.tiny import causal_tokenizer

    tokenizer = causal_tokenizer(CONTEXT_TOKENS)
    torch.manual_seed(1)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=512,
            intermediate_size=1536,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=8,
            max_position_embeddings=CONTEXT_TOKENS,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _direct(folder: Path, model: Path) -> Driver:
    engine = {
        "model": str(model),
        "dtype": "float32",
        "block_size": 32,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": CACHE_MB * 1_000_000,
    }
    env = {"BENCH_ENGINE": json.dumps(engine), "BENCH_TOKENS": str(NEW_TOKENS), "HF_HUB_OFFLINE": "1"}
    argv = [str(build(ENGINE)), str(PEERS / "vllm_direct.py")]
    return Driver(argv, folder / "direct.log", {**environment(), **env}, ROOT)


@contextmanager
def _served(folder: Path, redis_url: str, model: Path) -> Iterator[Driver]:
    document = configuration(redis_url)
    document["optimization"]["cache"] = {"enabled": False, "max_memory_mb": CACHE_MB}
    document["models"] = {
        MODEL: {
            "task": "text-generation",
            "source": f"folder:{model}",
            "engines": [ENGINE],
            "dtype": "fp32",
            "max_new_tokens": NEW_TOKENS,
        }
    }
    config = folder / "muai.yaml"
    config.write_text(yaml.safe_dump(document))
    with ExitStack() as stack:
        stack.enter_context(collector(config, folder))
        stack.enter_context(engine_worker(config, folder, ENGINE, python=build(ENGINE)))
        driver = stack.enter_context(
            script_driver("muai_producer.py", folder, BENCH_CONFIG=str(config), BENCH_MODEL=MODEL)
        )
        driver.ask(limit_s=READY_LIMIT_S, do="bulk", model=MODEL, count=1, seed=0)
        yield driver


def _steps(plan: Plan) -> int:
    return 1 + plan.model_pairs


MEASUREMENT = Measurement(
    title="vLLM on the CPU: through the queue and directly",
    how=f"A Llama of 29 million parameters with random weights, in fp32, {NEW_TOKENS} tokens at most a prompt, all "
    "prompts submitted at once. Direct is vLLM's own `LLM.generate`, given all of them in one call; direct and served "
    "alternate on the same prompts, and the ratio is taken pair by pair.",
    steps=_steps,
    measure=measure,
)
