"""Many requests at once from asyncio; waiting costs no threads.

Run it where `muai up` runs: python async_client.py [MODEL]
"""

import asyncio
import sys

from muai_producers import AsyncInferenceClient


async def embed(client: AsyncInferenceClient, model: str, number: int) -> str:
    result = await client.infer(model, f"sentence number {number}", timeout_s=60, deadline_s=30)
    return f"{number}: in a batch of {result.batch_size}"


async def main(model: str = "all-minilm-l6-v2") -> None:
    async with AsyncInferenceClient() as client:
        for line in await asyncio.gather(*(embed(client, model, number) for number in range(8))):
            print(line)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
