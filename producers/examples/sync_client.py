"""Submit requests from plain Python, and fetch the results as they come.

Run it where `muai up` runs: python sync_client.py [MODEL]
"""

import sys

from muai_producers import InferenceClient, InferenceResult

SENTENCES = ["How far is the moon?", "Where do eels come from?", "Who wrote the Edda?"]


def main(model: str = "all-minilm-l6-v2") -> None:
    with InferenceClient() as client:
        ids = client.submit_many([{"model": model, "inputs": sentence} for sentence in SENTENCES])
        for request_id, outcome in client.results(ids, timeout_s=60):
            if isinstance(outcome, InferenceResult):
                print(f"{request_id}: {outcome.engine_used}, {outcome.latency_ms:.1f} ms, {sorted(outcome.outputs)}")
            else:
                print(f"{request_id}: {outcome.code}: {outcome}")


if __name__ == "__main__":
    main(*sys.argv[1:])
