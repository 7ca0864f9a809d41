"""Makes every HTTP response with which the gateway reports a problem instead of scores: a status, and a JSON object with the reason (RFC
9457), without internal details of the gateway.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from probescore import InvalidRequestError, ProbescoreError, ServerError, TransientError
from probescore.errors import DeadlineExceededError, MessageTooLargeError
from probescore_adapters.errors import SignalError, Unscorable
from probescore_adapters.http.messages import FieldProblem, ProblemDetails
from probescore_adapters.judges import JudgeError

# the standard library's: a trainer's process has its own way of showing logs
logger = logging.getLogger("probescore_adapters")

MEDIA_TYPE = "application/problem+json"
DESCRIPTIONS = {
    400: "The body is not JSON: invalid, not UTF-8, nested too deeply, or with a number of thousands of digits.",
    408: "The body did not arrive in time.",
    413: "The body, or what becomes of it, is too large.",
    422: "The body is JSON, but not what this route takes; or a rollout cannot be scored, and ``on_unscorable`` is ``raise``.",
    500: "The gateway's signals do not go with the server's model and probes, or something is broken; its log has more.",
    503: "No scores: the server or a judge is gone, starting, overloaded or too slow, and ``on_failure`` is not a number.",
}
RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "model": ProblemDetails} for status, text in DESCRIPTIONS.items()
}
"""OpenAPI descriptions of the error responses that every scoring route can send, a dictionary keyed by the HTTP status."""

_MAX_ERRORS = 10
_MAX_FIELD_CHARACTERS = 200


def answer(
    status: int, title: str, detail: str = "", errors: Sequence[FieldProblem] = (), headers: dict[str, str] | None = None
) -> Response:
    """Returns an HTTP response whose body is a JSON object that describes a problem (RFC 9457)."""
    problem = ProblemDetails(title=title, status=status, detail=detail, errors=list(errors))
    # ASCII: a field's name may be anything that a client made up
    return Response(json.dumps(problem.model_dump()), status, headers, MEDIA_TYPE)


def answer_to(error: ProbescoreError | SignalError | Unscorable | JudgeError) -> Response:
    """Returns the HTTP response to a request during whose scoring an error was raised."""
    if isinstance(error, JudgeError):
        logger.warning("no verdict: %s", error)
        return answer(503, "No scores", "the judge gives no verdict", headers={"Retry-After": "1"})
    if isinstance(error, MessageTooLargeError):
        return answer(413, "More than the server takes in one call", "send fewer rollouts")
    if isinstance(error, Unscorable):
        return answer(422, "A rollout cannot be scored", str(error))
    if isinstance(error, InvalidRequestError):
        return answer(422, "The server refuses it", error.message)
    # a status and a reason instead of the message, which may have addresses and paths
    detail = str(error) if isinstance(error, SignalError) else f"{error.code} {error.reason}".strip()
    if isinstance(error, (TransientError, DeadlineExceededError, ServerError)):
        logger.warning("no scores: %s", error)
        return answer(503, "No scores", detail, headers={"Retry-After": str(math.ceil(error.retry_seconds or 1))})
    logger.error("cannot score: %s", error)
    return answer(500, "The gateway does not go with its server", detail)


def register(app: FastAPI) -> None:
    """Makes a FastAPI application respond to every failure with a JSON object that describes the problem (RFC 9457)."""

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> Response:
        del request
        if any(one["type"] == "json_invalid" for one in error.errors()):
            return answer(400, "The body is not JSON")
        return answer(422, "The body is not what this route takes", errors=[_field_problem(one) for one in error.errors()[:_MAX_ERRORS]])

    @app.exception_handler(HTTPException)
    async def _refused(request: Request, error: HTTPException) -> Response:
        del request
        title = "The body is not JSON" if error.status_code == 400 else str(error.detail)
        return answer(error.status_code, title, headers=dict(error.headers or {}))

    @app.exception_handler(ProbescoreError)
    @app.exception_handler(SignalError)
    @app.exception_handler(Unscorable)
    @app.exception_handler(JudgeError)
    async def _failed(request: Request, error: ProbescoreError | SignalError | Unscorable | JudgeError) -> Response:
        del request
        return answer_to(error)

    @app.exception_handler(Exception)
    async def _broken(request: Request, error: Exception) -> Response:
        # the framework logs it when this has answered
        del request, error
        return answer(500, "The gateway failed", "its log has more")


def _field_problem(error: dict[str, Any]) -> FieldProblem:
    field = ".".join(str(part) for part in error["loc"] if part != "body")
    return FieldProblem(field=field[:_MAX_FIELD_CHARACTERS], problem=str(error["msg"]).removeprefix("Value error, "))
