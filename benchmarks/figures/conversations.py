"""What the cache of keys and values is worth to a conversation, and whether it keeps to its budget."""

from __future__ import annotations

from pathlib import Path

from benchmarks.figures.base import Measured, Measurement
from benchmarks.machine import package_versions
from benchmarks.muai_side import cores, script_driver
from benchmarks.plan import Plan
from benchmarks.processes import Driver
from benchmarks.results import Goal, Metric, Row, ratios
from benchmarks.session import Session, metric

ENGINES = {"pytorch": "PyTorch", "onnx": "ONNX Runtime"}
HISTORY_TOKENS = 1000
TURNS = 8
GOAL = 3.0
CONVERSATIONS = 100
ROOM_FOR = 20
ANSWER_S = 600.0


def measure_chat(session: Session) -> Measured:
    """Every turn twice, on two engines of a kind: one that keeps the conversation, one that reads it all again."""
    rows: list[Row] = []
    goals: list[Goal] = []
    for engine, title in ENGINES.items():
        first: dict[str, list[float]] = {"cached": [], "fresh": []}
        later: dict[str, list[float]] = {"cached": [], "fresh": []}
        told: list[int] = []
        with session.logs(f"chat {engine}") as folder, _driver(engine, folder) as driver:
            for chat in range(session.plan.chats):
                session.on_step(f"{title}: conversation {chat + 1} of {session.plan.chats}")
                answer = driver.ask(
                    limit_s=ANSWER_S, do="chat", number=chat, turns=TURNS, history_tokens=HISTORY_TOKENS
                )
                assert answer["identical"], f"{engine} said other tokens with its cache than without"
                told.append(answer["history_tokens"])
                for kind in first:
                    first[kind].append(answer[f"{kind}_ms"][0])
                    later[kind] += answer[f"{kind}_ms"][1:]
        gains = metric("", list(ratios(later["fresh"], later["cached"])))
        rows += [
            _chat_row(f"{title}, no cache", engine, told[0], first["fresh"], later["fresh"], None),
            _chat_row(f"{title}, cache", engine, told[0], first["cached"], later["cached"], gains),
        ]
        goals.append(
            Goal(text=f"later turns on {title}, first token, no cache over cache", value=gains.median, goal=GOAL)
        )
    return Measured(rows, goals)


def _chat_row(
    name: str, engine: str, history_tokens: int, first: list[float], later: list[float], gains: Metric | None
) -> Row:
    metrics = {"first turn, first token": metric("ms", first), "later turns, first token": metric("ms", later)}
    if gains is not None:
        metrics["gain of a later turn"] = gains
    return Row(
        name=name,
        settings=f"{TURNS} turns over {history_tokens} tokens of history, fp32, {cores()} threads; tokens identical",
        versions=package_versions("torch", "transformers") if engine == "pytorch" else package_versions("onnxruntime"),
        metrics=metrics,
    )


def measure_budget(session: Session) -> Measured:
    """A hundred conversations, room for twenty: what is kept, what went, and what the process took."""
    rows: list[Row] = []
    goals: list[Goal] = []
    for engine, title in ENGINES.items():
        with session.logs(f"budget {engine}") as folder, _driver(engine, folder) as driver:
            session.on_step(f"{title}: {CONVERSATIONS} conversations")
            found = driver.ask(limit_s=ANSWER_S, do="budget", conversations=CONVERSATIONS, room_for=ROOM_FOR)
        budget_mb = found["budget_bytes"] / 1e6
        rows.append(
            Row(
                name=title,
                settings=f"{CONVERSATIONS} conversations of {found['conversation_bytes'] / 1e6:.2f} MB each, lru",
                metrics={
                    "budget": metric("MB", [budget_mb]),
                    "most kept": metric("MB", [found["most_bytes"] / 1e6]),
                    "conversations kept": metric("", [found["entries"]]),
                    "evictions": metric("", [found["evictions"]]),
                    "the process grew by": metric("MB", [found["grown_bytes"] / 1e6]),
                    "without a budget": metric("MB", [found["unbounded_bytes"] / 1e6]),
                },
            )
        )
        goals += [
            Goal(
                text=f"most kept on {title}, over the budget",
                value=found["most_bytes"] / found["budget_bytes"],
                goal=1.0,
                at_most=True,
            ),
            Goal(text=f"kept and evicted on {title}", value=found["entries"] + found["evictions"], goal=CONVERSATIONS),
        ]
    return Measured(rows, goals)


def _driver(engine: str, folder: Path) -> Driver:
    return script_driver("muai_chat.py", folder, BENCH_ENGINE=engine, BENCH_FOLDER=str(folder))


def _chat_steps(plan: Plan) -> int:
    return len(ENGINES) * plan.chats


def _budget_steps(_: Plan) -> int:
    return len(ENGINES)


CHAT = Measurement(
    title="A chat over a history of 1,000 tokens: time to first token",
    how="A small causal model on the CPU, MuAI's engines without any queue. Each turn is asked of an engine that keeps "
    "the conversation's keys and values and, straight after, of the same engine without a cache; from handing the "
    "turn in to the first piece of text. Both must give the same text.",
    steps=_chat_steps,
    measure=measure_chat,
)
BUDGET = Measurement(
    title="A hundred conversations, memory for twenty",
    how="One turn each, over some 1,000 tokens. Kept is the sum of the tensors' own bytes, looked at after each turn; "
    "the process is its resident memory over what it was when the budget was first full; without a budget is what all "
    "conversations would take.",
    steps=_budget_steps,
    measure=measure_budget,
)
