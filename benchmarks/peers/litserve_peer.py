"""LitServe: POST /predict `{"text": …}`. Told by BENCH_MODEL, BENCH_BATCH and BENCH_PORT."""

import os
from typing import Any

import litserve
import model

BATCH = int(os.environ["BENCH_BATCH"])


class Served(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.predict_batch = model.load(os.environ["BENCH_MODEL"])

    def decode_request(self, request: dict[str, Any]) -> str:
        return request["text"]

    def batch(self, inputs: list[str]) -> list[str]:
        return inputs

    def unbatch(self, output: list[model.Answer]) -> list[model.Answer]:
        return output

    def predict(self, x: Any) -> Any:
        return self.predict_batch(x) if isinstance(x, list) else self.predict_batch([x])[0]

    def encode_response(self, output: model.Answer) -> dict[str, model.Answer]:
        return {"output": output}


if __name__ == "__main__":
    api = Served(max_batch_size=BATCH, batch_timeout=float(os.environ["BENCH_WAIT_S"]))
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, timeout=300)
    server.run(host="127.0.0.1", port=int(os.environ["BENCH_PORT"]), generate_client_file=False, log_level="warning")
