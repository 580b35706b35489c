"""Ray Serve: POST /infer `{"text": …}`. Told by BENCH_MODEL, BENCH_BATCH, BENCH_WAIT_S and BENCH_PORT."""

from __future__ import annotations

import os
import signal
from typing import Any

import model
import ray
from ray import serve
from ray.serve.schema import LoggingConfig
from starlette.requests import Request

BATCH = int(os.environ["BENCH_BATCH"])
WAIT_S = float(os.environ["BENCH_WAIT_S"])
QUIET = LoggingConfig(enable_access_log=False, log_level="WARNING")


@serve.deployment(num_replicas=1, max_ongoing_requests=1024, logging_config=QUIET)
class Served:
    def __init__(self) -> None:
        self.predict_batch = model.load(os.environ["BENCH_MODEL"])

    @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=WAIT_S)
    async def predict(self, texts: list[str]) -> list[model.Answer]:
        return self.predict_batch(texts)

    async def __call__(self, request: Request) -> dict[str, Any]:
        return {"output": await self.predict((await request.json())["text"])}


if __name__ == "__main__":
    variables = {name: value for name, value in os.environ.items() if name.startswith("BENCH_")}
    ray.init(include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": variables})
    serve.start(http_options={"host": "127.0.0.1", "port": int(os.environ["BENCH_PORT"])}, logging_config=QUIET)
    serve.run(Served.bind(), route_prefix="/infer")
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    serve.shutdown()
    ray.shutdown()
