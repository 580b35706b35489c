"""A web application that submits work in one request and is asked for the result in another.

Run it where `muai up` runs: uvicorn fastapi_app:app
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.responses import JSONResponse

from muai_producers import AsyncInferenceClient
from muai_producers.errors import MuaiError, ResultTimeoutError

MODEL = "all-minilm-l6-v2"


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with AsyncInferenceClient() as client:  # one for the process: it is safe to share
        app.state.inference = client
        yield


app = FastAPI(title="Sentences", lifespan=lifespan)


@app.exception_handler(MuaiError)
async def refused(_: Request, error: MuaiError) -> JSONResponse:
    return JSONResponse({"code": error.code, "message": error.message}, error.http_status)


@app.post("/sentences", status_code=202)
async def submit(request: Request, sentence: Annotated[str, Query(min_length=1)], model: str = MODEL) -> dict[str, str]:
    return {"id": await request.app.state.inference.submit(model, sentence)}


@app.get("/sentences/{request_id}")
async def poll(request: Request, request_id: str, wait_s: Annotated[float, Query(ge=0, le=20)] = 0) -> dict[str, Any]:
    client: AsyncInferenceClient = request.app.state.inference
    try:
        result = await client.result(request_id, timeout_s=wait_s)
    except ResultTimeoutError:
        return {"state": (await client.status(request_id)).state}
    return {"state": "SUCCESS", "outputs": result.outputs}
