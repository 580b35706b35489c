"""Recorded situations for advice: what a real vLLM server said, with other figures in it, and a server that says it."""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import json
import re
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from muai_producers.advice.architecture import Architecture, architecture_of
from muai_producers.advice.situation import Situation
from muai_producers.advice.vllm_metrics import read_metrics, with_scrape

RECORDED = Path(__file__).parent / "data" / "vllm_metrics.txt"
LLAMA_8B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
"""The published sizes of Llama 3.1 8B."""
CAPACITY_TOKENS = 32768
ON_A_GPU = {"kv_cache_memory_bytes": "None", "num_gpu_blocks": "2048", "block_size": "16"}
"""What a server on a GPU says of its cache: blocks, and no bytes."""


def recorded(cache: Mapping[str, str] | None = None, **values: float) -> str:
    """The recorded page with other figures.

    Args:
        cache: labels of `cache_config_info`.
        values: by the sample's name without `vllm:`; where one has several series, the first gets it, the others 0.
    """
    text = RECORDED.read_text(encoding="utf-8")
    for label, value in (cache or {}).items():
        text, count = re.subn(rf'([{{,]){label}="[^"]*"', rf'\1{label}="{value}"', text)
        assert count == 1, label
    for name, value in values.items():
        line = re.compile(rf"^(vllm:{name}(?:{{.*}})?) \S+$", re.MULTILINE)
        assert line.search(text), name
        text = line.sub(rf"\g<1> {value}", line.sub(r"\1 0.0", text), count=1)
    return text


def histogram(name: str, mean: float, count: int = 1000) -> dict[str, float]:
    """A histogram's sum and count."""
    return {f"{name}_sum": mean * count, f"{name}_count": float(count)}


def served(*, wait_s: float, prefill_s: float, decode_s: float, prompt: float, output: float) -> dict[str, float]:
    """The histograms of a thousand requests."""
    total_s = wait_s + prefill_s + decode_s
    return {
        **histogram("request_queue_time_seconds", wait_s),
        **histogram("request_prefill_time_seconds", prefill_s),
        **histogram("request_decode_time_seconds", decode_s),
        **histogram("request_inference_time_seconds", prefill_s + decode_s),
        **histogram("e2e_request_latency_seconds", total_s),
        **histogram("request_prompt_tokens", prompt),
        **histogram("request_generation_tokens", output),
        "request_success_total": 1000.0,
    }


MEMORY_PRESSURE = recorded(
    ON_A_GPU,
    num_requests_running=40,
    num_requests_waiting=25,
    kv_cache_usage_perc=0.98,
    num_preemptions_total=310,
    **served(wait_s=4.0, prefill_s=0.3, decode_s=8.0, prompt=900, output=300),
)
IDLE_GPU = recorded(
    ON_A_GPU,
    num_requests_running=1,
    num_requests_waiting=0,
    kv_cache_usage_perc=0.01,
    **served(wait_s=0.0005, prefill_s=0.05, decode_s=1.0, prompt=300, output=100),
)
LONG_QUEUE = recorded(
    ON_A_GPU,
    num_requests_running=16,
    num_requests_waiting=200,
    kv_cache_usage_perc=0.30,
    **served(wait_s=20.0, prefill_s=0.2, decode_s=4.0, prompt=400, output=200),
)
SHORT_PROMPTS = recorded(
    ON_A_GPU,
    num_requests_running=16,
    num_requests_waiting=200,
    kv_cache_usage_perc=0.02,
    **served(wait_s=1.0, prefill_s=0.02, decode_s=0.2, prompt=20, output=10),
)
KNOWN = {"model": "llama-8b", "max_num_seqs": 16, "max_model_len": 8192, "quantization": "none"}


@dataclasses.dataclass(frozen=True)
class Recording:
    """What a server said, and what is told of its configuration."""

    text: str
    config: dict[str, Any]

    def situation(self) -> Situation:
        base = Situation("localhost:8000", "vllm", False, "vllm", config=self.config)
        found = with_scrape(base, read_metrics(self.text), 2e9)
        return dataclasses.replace(found, architecture=llama()) if "model" in self.config else found


RECORDINGS = {
    "memory pressure": Recording(MEMORY_PRESSURE, {**KNOWN, "max_num_seqs": 64}),
    "idle GPU": Recording(IDLE_GPU, KNOWN),
    "long queue": Recording(LONG_QUEUE, KNOWN),
    "short prompts": Recording(SHORT_PROMPTS, KNOWN),
    "quantized already": Recording(LONG_QUEUE, {**KNOWN, "quantization": "awq"}),
    "empty configuration": Recording(LONG_QUEUE, {}),
}


def llama() -> Architecture:
    found = architecture_of(LLAMA_8B)
    assert found is not None
    return found


def llama_folder(folder: Path) -> Path:
    """A folder with the file that tells the sizes."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA_8B))
    return folder


class MetricsServer:
    """Says `text`, whole or in chunks, and keeps the paths that it was asked for."""

    def __init__(self, text: str) -> None:
        self.text, self.paths, self.status = text, list[str](), 200
        self.headers: dict[str, str] = {}
        self.in_chunks = False
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                server.paths.append(self.path)
                body = server.text.encode()
                self.send_response(server.status)
                for name, value in server.headers.items():
                    self.send_header(name, value)
                if server.in_chunks:
                    self.send_header("Transfer-Encoding", "chunked")
                else:
                    self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                with contextlib.suppress(OSError):  # whoever asked has heard enough
                    self._send(body)

            def _send(self, body: bytes) -> None:
                for start in range(0, len(body), 4000) if server.in_chunks else ():
                    part = body[start : start + 4000]
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
                self.wfile.write(b"0\r\n\r\n" if server.in_chunks else body)

            def log_message(self, *_: Any) -> None:
                """Quiet."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        self.address = f"localhost:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextlib.contextmanager
def metrics_server(text: str) -> Iterator[MetricsServer]:
    made = MetricsServer(text)
    try:
        yield made
    finally:
        made.close()
