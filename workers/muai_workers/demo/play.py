"""The demonstration's course: what is done, shown and checked, in order."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from muai_producers.errors import MuaiError
from muai_producers.wire import InferenceResult
from muai_workers.demo.corpus import PROMPTS, QUESTIONS, load_sentences
from muai_workers.demo.figures import Figures, cosine, count, nearest
from muai_workers.demo.stage import (
    NUM_PRODUCERS,
    SENTENCE_MODEL,
    TEXT_MODEL,
    DemoError,
    RecordingConsole,
    Stage,
    build_model,
    stage,
)

MIN_MEAN_BATCH_SIZE = 8.0
MIN_COSINE = 0.999
"""Between the vectors of one sentence from two engines, both in fp32."""
NEW_TOKENS = 24
SHOWN_ANSWERS = 3
SHOWN_TEXTS = 2
SHOWN_LINES = 40
Vectors = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Teller:
    """Says what happens, and when."""

    out: Console
    started_s: float

    def step(self, text: str) -> None:
        """What happens now, with the seconds that have passed."""
        self.out.print(
            f"[dim]{time.monotonic() - self.started_s:4.0f} s[/dim]  {text}", highlight=False, soft_wrap=True
        )


def play(out: Console) -> int:
    """Run the demonstration; returns the exit status: 0 when everything was as claimed."""
    started_s = time.monotonic()
    log = RecordingConsole()
    try:
        with tempfile.TemporaryDirectory(prefix="muai-demo-") as folder:
            figures, unmet = _course(Teller(out, started_s), Path(folder), log)
    except (DemoError, MuaiError) as error:
        out.print("\n".join(["the last lines of the processes:", *list(log.lines)[-SHOWN_LINES:]]), markup=False)
        out.print(f"[red]the demonstration failed:[/red] {error}")
        return 1
    out.print(figures_table(figures))
    for one in figures:
        if one.failed_attempts:
            out.print(f"   attempts that failed, {one.title}: {one.describe_attempts()}", highlight=False)
    for claim in unmet:
        out.print(f"[red]not as claimed:[/red] {claim}")
    if not unmet:
        seconds = time.monotonic() - started_s
        out.print(f"[green]All as claimed[/green], in {seconds:.0f} s; everything that was started has ended.")
    return 1 if unmet else 0


def _course(tell: Teller, folder: Path, log: RecordingConsole) -> tuple[list[Figures], list[str]]:
    sentences = load_sentences()
    texts = [sentence.text for sentence in sentences]
    unmet: list[str] = []
    tell.step("[bold]1. Starting[/bold] a Redis, a batch collector, an ONNX and a PyTorch worker, a control worker …")
    with stage(folder, log) as playing:
        _prepare(tell, folder, playing)
        tell.step(f"[bold]2. {NUM_PRODUCERS} producers submit {len(texts)} sentences[/bold] to {SENTENCE_MODEL} …")
        first = playing.results(playing.produce(texts))
        vectors = [result.outputs["embedding"] for result in first]
        tell.step("[bold]3. A search by meaning[/bold] over the vectors answers three questions:")
        asked = playing.results(
            playing.client.submit_many([{"model": SENTENCE_MODEL, "inputs": one.text} for one in QUESTIONS])
        )
        unmet += show_answers(tell.out, texts, vectors, [result.outputs["embedding"] for result in asked])
        tell.step(f"[bold]4. {len(PROMPTS)} texts are generated[/bold] by the small model …")
        generated = _generate(playing)
        unmet += show_texts(tell.out, generated)
        tell.step("[bold]5. The ONNX engine is made to fail[/bold]: its worker is killed, its models' folder is gone …")
        playing.break_onnx()
        tell.step("   the worker was started again; the same sentences once more …")
        again = playing.results(playing.produce(texts))
        unmet += check_fallback(vectors, again)
        tell.step("[bold]6. Stopping[/bold] everything …")
    if playing.left_behind():
        unmet.append(f"still running: the process groups {playing.left_behind()}")
    figures = [
        count("sentences", first),
        count("questions", asked),
        count("texts", generated),
        count("fallback", again),
    ]
    return figures, unmet + check_batches(figures)


def _prepare(tell: Teller, folder: Path, playing: Stage) -> None:
    """Build the small model while the workers start, then have both models loaded, one of them converted."""
    build_model(folder / TEXT_MODEL)
    playing.wait_for_workers()
    tell.step("   loading the models, converting the sentence encoder to ONNX and comparing it with the original …")
    warming = [(SENTENCE_MODEL, "warm up"), (TEXT_MODEL, "warm up")]
    playing.results(playing.client.submit_many([{"model": model, "inputs": text} for model, text in warming]))


def _generate(playing: Stage) -> list[InferenceResult]:
    parameters = {"max_tokens": NEW_TOKENS}
    requests = [{"model": TEXT_MODEL, "inputs": prompt, "parameters": parameters} for prompt in PROMPTS]
    return playing.results(playing.client.submit_many(requests))


def show_answers(out: Console, texts: Sequence[str], vectors: Vectors, questions: Vectors) -> list[str]:
    """Print the best sentences for each question; returns what is not as claimed."""
    unmet = []
    for question, vector in zip(QUESTIONS, questions, strict=True):
        out.print(f"        [italic]{question.text}[/italic]")
        best = nearest(vector, vectors, SHOWN_ANSWERS)
        for score, index in best:
            out.print(f"          {score:.3f}  {texts[index]}", highlight=False, soft_wrap=True)
        if question.answer not in [texts[index] for _, index in best]:
            unmet.append(f"the answer to {question.text!r} is not among the {SHOWN_ANSWERS} nearest sentences")
    return unmet


def show_texts(out: Console, results: Sequence[InferenceResult]) -> list[str]:
    """Print a few of the texts; returns what is not as claimed."""
    for prompt, result in list(zip(PROMPTS, results, strict=True))[:SHOWN_TEXTS]:
        text = Text(f"          {prompt}")
        text.append(result.outputs["text"].replace("\n", " "), style="dim")
        out.print(text, soft_wrap=True)
    empty = sum(not result.metadata["usage"]["output_tokens"] for result in results)
    return [f"{empty} of the generations have no tokens"] if empty else []


def check_fallback(vectors: Vectors, again: Sequence[InferenceResult]) -> list[str]:
    """What is not as claimed of the requests whose first engine failed."""
    unmet = []
    elsewhere = sum(result.engine_used != "onnx" for result in again)
    named = sum(any(attempt["engine"] == "onnx" for attempt in result.metadata["attempts"]) for result in again)
    failed = sum(
        any(attempt["error"]["code"] == "model_load_failed" for attempt in result.metadata["attempts"])
        for result in again
    )
    if elsewhere < len(again):
        unmet.append(f"{len(again) - elsewhere} sentences were served by the engine that was to fail")
    if named < len(again):
        unmet.append(f"{len(again) - named} results do not name the attempt at the engine that failed")
    if not failed:
        unmet.append("no batch was tried on the failing engine")
    worst = min(cosine(one, result.outputs["embedding"]) for one, result in zip(vectors, again, strict=True))
    if worst < MIN_COSINE:
        unmet.append(f"the engines disagree: a cosine of {worst:.4f} between the two vectors of one sentence")
    return unmet


def check_batches(figures: Sequence[Figures]) -> list[str]:
    """What is not as claimed of the size of batches."""
    return [
        f"{one.title}: a mean batch size of {one.mean_batch_size:.1f}, not over {MIN_MEAN_BATCH_SIZE:.0f}"
        for one in figures
        if one.requests >= len(PROMPTS) and one.mean_batch_size <= MIN_MEAN_BATCH_SIZE
    ]


def figures_table(figures: Sequence[Figures]) -> Table:
    """The table that closes the demonstration."""
    table = Table(title="What was served", box=box.SIMPLE)
    for heading in ("step", "engine"):
        table.add_column(heading)
    for heading in ("requests", "batches", "mean\nbatch size", "attempts", "p50\nms", "p95\nms"):
        table.add_column(heading, justify="right")
    for one in figures:
        table.add_row(
            one.title,
            one.describe_engines(),
            str(one.requests),
            str(one.batches),
            f"{one.mean_batch_size:.1f}",
            f"{one.mean_attempts:.1f}",
            f"{one.p50_ms:.0f}",
            f"{one.p95_ms:.0f}",
        )
    return table
