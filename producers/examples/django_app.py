"""A Django application, whole in one file, that submits work in one request and is asked for the result in another.

Run it where `muai up` runs: python django_app.py runserver
In a project of yours it is the two views, the two paths, and the client in a module that both import.
"""

import sys
from functools import cache, wraps
from typing import Any

import django
from django.conf import settings
from django.core.management import execute_from_command_line
from django.http import HttpRequest, JsonResponse
from django.urls import path
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.http import require_GET, require_POST

from muai_producers import InferenceClient
from muai_producers.errors import InvalidRequestError, MuaiError, ResultTimeoutError

MODEL = "all-minilm-l6-v2"

settings.configure(ALLOWED_HOSTS=["*"], DEBUG=False, ROOT_URLCONF=__name__, SECRET_KEY="for this example alone")
django.setup()


@cache
def inference() -> InferenceClient:
    """One for the process, made when first needed: after a server like gunicorn has forked its workers."""
    return InferenceClient()


def told(view: Any) -> Any:
    """Answer with the error's own status and words."""

    @wraps(view)
    def answer(request: HttpRequest, **options: Any) -> JsonResponse:
        try:
            response: JsonResponse = view(request, **options)
        except MuaiError as error:
            return JsonResponse({"code": error.code, "message": error.message}, status=error.http_status)
        return response

    return answer


@csrf_exempt  # a form of your own sends a token instead
@require_POST
@told
def submit(request: HttpRequest) -> JsonResponse:
    request_id = inference().submit(request.POST.get("model", MODEL), request.POST.get("sentence", ""))
    return JsonResponse({"id": request_id}, status=202)


@require_GET
@told
def poll(request: HttpRequest, request_id: str) -> JsonResponse:
    wait_s = request.GET.get("wait_s", "0")
    if not wait_s.isdecimal() or int(wait_s) > 20:
        raise InvalidRequestError("wait_s must be a whole number of seconds from 0 to 20")
    try:
        result = inference().result(request_id, timeout_s=int(wait_s))
    except ResultTimeoutError:
        return JsonResponse({"state": inference().status(request_id).state})
    return JsonResponse({"state": "SUCCESS", "outputs": result.outputs})


urlpatterns = [path("sentences", submit), path("sentences/<str:request_id>", poll)]

if __name__ == "__main__":
    execute_from_command_line(sys.argv)
