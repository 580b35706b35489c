"""A Flask application that submits work in one request and is asked for the result in another.

Run it where `muai up` runs: flask --app flask_app run
"""

from typing import Any

from flask import Flask, Response, current_app, jsonify, request

from muai_producers import InferenceClient
from muai_producers.errors import InvalidRequestError, MuaiError, ResultTimeoutError

MODEL = "all-minilm-l6-v2"


def create_app() -> Flask:
    app = Flask(__name__)
    # One for the process: threads may share it. With workers that are forked, make it after the fork.
    app.extensions["inference"] = InferenceClient()
    app.add_url_rule("/sentences", view_func=submit, methods=["POST"])
    app.add_url_rule("/sentences/<request_id>", view_func=poll)
    app.register_error_handler(MuaiError, refused)
    return app


def inference() -> InferenceClient:
    client: InferenceClient = current_app.extensions["inference"]
    return client


def refused(error: MuaiError) -> tuple[Response, int]:
    return jsonify(code=error.code, message=error.message), error.http_status


def submit() -> tuple[dict[str, str], int]:
    request_id = inference().submit(request.form.get("model", MODEL), request.form.get("sentence", ""))
    return {"id": request_id}, 202


def poll(request_id: str) -> dict[str, Any]:
    wait_s = request.args.get("wait_s", 0.0, type=float)
    if not 0 <= wait_s <= 20:
        raise InvalidRequestError("wait_s must be a number of seconds from 0 to 20")
    try:
        result = inference().result(request_id, timeout_s=wait_s)
    except ResultTimeoutError:
        return {"state": inference().status(request_id).state}
    return {"state": "SUCCESS", "outputs": result.outputs}
