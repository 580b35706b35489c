"""`muai result`, `muai status`, `muai cancel`: what became of requests."""

from __future__ import annotations

import json

import click

from muai_producers.cli.invocation import Invocation, pass_invocation


@click.command()
@click.argument("request_id")
@click.option("--wait", is_flag=True, help="Wait until the request is finished.")
@click.option("--timeout-s", type=click.FloatRange(min=0), help="Longest wait; the request goes on after it.")
@click.option("--json", "as_json", is_flag=True, help="Print it as one JSON object.")
@pass_invocation
def result(invocation: Invocation, request_id: str, wait: bool, timeout_s: float | None, as_json: bool) -> None:
    """Print the result of a request."""
    from muai_producers.cli.present import echo_outcome
    from muai_producers.errors import MuaiError, ResultTimeoutError

    with invocation.client() as client:
        status = client.status(request_id)
        if not wait and not status.finished:
            raise ResultTimeoutError(f"request {request_id} is {status.state}; --wait waits for its result")
        for _, outcome in client.results([request_id], timeout_s):
            echo_outcome(request_id, outcome, as_json=as_json, with_id=False)
            if isinstance(outcome, MuaiError):
                click.get_current_context().exit(1)


@click.command()
@click.argument("request_ids", nargs=-1, required=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line.")
@pass_invocation
def status(invocation: Invocation, request_ids: tuple[str, ...], as_json: bool) -> None:
    """Print where requests stand; PENDING is also what nobody knows."""
    from muai_producers.cli.present import echo_json

    with invocation.client() as client:
        for request_id in request_ids:
            found = client.status(request_id)
            if as_json:
                echo_json({"request_id": request_id, "state": found.state, "info": found.info})
            else:
                info = json.dumps(found.info, ensure_ascii=False) if found.info else ""
                click.echo(f"{request_id}  {found.state}  {info}".rstrip())


@click.command()
@click.argument("request_ids", nargs=-1, required=True)
@pass_invocation
def cancel(invocation: Invocation, request_ids: tuple[str, ...]) -> None:
    """Cancel requests that are not finished; exit status 1 when one had finished already."""
    with invocation.client() as client:
        outcomes = {request_id: client.cancel(request_id) for request_id in request_ids}
    for request_id, is_cancelled in outcomes.items():
        click.echo(f"{request_id}  {'cancelled' if is_cancelled else 'had finished already'}")
    if not all(outcomes.values()):
        click.get_current_context().exit(1)
