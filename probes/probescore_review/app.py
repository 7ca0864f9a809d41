"""Answers the pages of the review: which address gives what."""

from __future__ import annotations

import contextlib
import json
import secrets
import sqlite3
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from fastapi import Body, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.staticfiles import StaticFiles

from probescore_review.columns import columns
from probescore_review.export import file_name
from probescore_review.jobs import JobConflict
from probescore_review.labelling import LabelConflict
from probescore_review.queries import Query as RolloutQuery
from probescore_review.queries import comparisons
from probescore_review.runs import ReviewedRun
from probescore_review.security import GuardMiddleware

STATIC = Path(__file__).with_name("static")


class AsciiJson(Response):
    """Response of JSON in ASCII: texts of models may have halves of characters, which no other form can carry."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:  # noqa: ANN401 - whatever JSON has
        """Returns values as JSON."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


def create_app(runs: Sequence[ReviewedRun]) -> FastAPI:
    """Returns the application that shows runs to people, labels their rollouts and repairs their probes, for any ASGI server that listens
    on this machine alone.
    """
    token = secrets.token_urlsafe(24)
    by_key = {run.key: run for run in runs}

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        del app
        yield
        for run in runs:
            run.jobs.close()
            run.labelling.close()

    app = FastAPI(title="probescore review", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.add_middleware(GuardMiddleware, token=token)
    _answer_errors(app)

    def found(key: str) -> ReviewedRun:
        if key not in by_key:
            raise KeyError(f"run: {key[:40]!r}; there is {', '.join(by_key)}")
        with contextlib.suppress(sqlite3.OperationalError):  # a full disk: what was read before is shown
            by_key[key].index.refresh()
        return by_key[key]

    @app.get("/api/session")
    def session() -> Response:
        """Gives the token with which the application's pages change anything."""
        return AsciiJson({"token": token})

    @app.get("/api/runs")
    def all_runs() -> Response:
        """Says which runs there are."""
        return AsciiJson({"runs": [found(key).facts() for key in by_key]})

    @app.get("/api/jobs/{job}")
    def one_job(job: str) -> Response:
        """Says how far a job is."""
        for run in by_key.values():
            with contextlib.suppress(KeyError):
                return AsciiJson(run.jobs.found(job).shown())
        raise KeyError(f"job: {job[:40]!r}; there is no such job, or it was of a process that has ended")

    _add_rollout_routes(app, found)
    _add_label_routes(app, found)
    _add_repair_routes(app, found)
    app.mount("/static", StaticFiles(directory=STATIC), name="static")

    @app.get("/{page:path}")
    def page(page: str) -> Response:
        """Gives the one page of the application, whose addresses it reads by itself."""
        if page.startswith(("api/", "static/")):
            raise KeyError(f"{page[:80]}: there is nothing here")
        return FileResponse(STATIC / "index.html")

    return app


Found = Callable[[str], ReviewedRun]


def _query(run: ReviewedRun, request: Request) -> RolloutQuery:
    """Returns the query that an address names: a view, to which what else the address says is added."""
    asked = request.query_params
    base = run.views.query_of(asked["view"]) if asked.get("view") else RolloutQuery()
    own = RolloutQuery.of(asked.get("where", ""), asked.get("q", ""), asked.get("sort", ""), asked.get("descending", "") in ("1", "true"))
    return RolloutQuery(
        where=base.where + own.where,
        search=" ".join(part for part in (base.search, own.search) if part),
        sort=own.sort or base.sort,
        descending=own.descending if own.sort or "descending" in asked else base.descending,
    )


def _add_rollout_routes(app: FastAPI, found: Found) -> None:
    @app.get("/api/runs/{run}/columns")
    def table_columns(run: str) -> Response:
        """Names the table's columns and the run's views."""
        reviewed = found(run)
        shown = ("name", "title", "kind", "help", "sortable")
        named = [{name: getattr(each, name) for name in shown} | {"ops": comparisons(each)} for each in columns(reviewed.index).values()]
        return AsciiJson({"columns": named, "views": reviewed.views.all()})

    @app.get("/api/runs/{run}/rollouts")
    def rollouts(
        run: str,
        request: Request,
        after: str = "",
        offset: int = 0,
        limit: Annotated[int, Query()] = 100,
    ) -> Response:
        """Gives a part of a view's rows."""
        reviewed = found(run)
        start = int(after) if after.isdecimal() and len(after) < 12 else offset
        total, rows = reviewed.queries.page(_query(reviewed, request), start, limit)
        further = start + limit
        return AsciiJson({"total": total, "offset": start, "rows": rows, "next": str(further) if further < total else None})

    @app.get("/api/runs/{run}/rollouts/{rollout:path}")
    def one_rollout(run: str, rollout: str, blind: bool = False, part: int = 0) -> Response:
        """Gives everything of one rollout."""
        return AsciiJson(found(run).rollouts.found(rollout, blind=blind, part=part))

    @app.get("/api/runs/{run}/overview")
    def overview(run: str, wait: bool = True) -> Response:
        """Gives what the audit says, and the numbers by step."""
        return AsciiJson(found(run).overview.found(wait=wait))

    @app.get("/api/runs/{run}/suspicious")
    def suspicious(run: str) -> Response:
        """Gives the lists of suspicious rollouts."""
        return AsciiJson({"lists": found(run).suspicious.lists()})

    @app.get("/api/runs/{run}/export")
    def export(run: str, request: Request, format: Literal["jsonl", "parquet", "html"] = "jsonl") -> Response:
        """Gives a view's rollouts as a file."""
        reviewed = found(run)
        numbers = reviewed.queries.numbers(_query(reviewed, request))
        name = reviewed.index.header().run_id
        file = file_name(name, request.query_params.get("view", ""), format)
        headers = {"Content-Disposition": f'attachment; filename="{file}"'}
        if format == "jsonl":
            return StreamingResponse(reviewed.export.lines(numbers), media_type="application/x-ndjson", headers=headers)
        if format == "parquet":
            return Response(reviewed.export.parquet(numbers), media_type="application/vnd.apache.parquet", headers=headers)
        return Response(reviewed.export.page(numbers, f"{name}: rollouts"), media_type="text/html; charset=utf-8", headers=headers)

    @app.put("/api/runs/{run}/views/{view}")
    def save_view(run: str, view: str, body: Annotated[dict[str, Any], Body()]) -> Response:
        """Saves a view."""
        return AsciiJson(found(run).views.save(view, body))

    @app.delete("/api/runs/{run}/views/{view}")
    def delete_view(run: str, view: str) -> Response:
        """Deletes a saved view."""
        found(run).views.delete(view)
        return AsciiJson({"deleted": view})


class GivenLabel(BaseModel):
    """A label as a page sends it."""

    model_config = ConfigDict(strict=True, extra="forbid")

    rollout: str
    label: str
    labeller: str
    note: str | None = None
    spans: list[list[int]] = Field(default_factory=list)
    second: bool = False


class WhoUndoes(BaseModel):
    """Who takes a label back."""

    model_config = ConfigDict(strict=True, extra="forbid")

    labeller: str


class AskedPlan(BaseModel):
    """How many rollouts are to be planned."""

    model_config = ConfigDict(strict=True, extra="forbid")

    per_step: int | None = Field(default=None, ge=4, le=100_000)
    more: int | None = Field(default=None, ge=1, le=100_000)
    first_step: int = Field(default=0, ge=0)
    last_step: int | None = Field(default=None, ge=0)


class AskedRepair(BaseModel):
    """A step of a repair."""

    model_config = ConfigDict(strict=True, extra="forbid")

    step: str
    options: dict[str, str | float | bool | None] = Field(default_factory=dict)


def _add_repair_routes(app: FastAPI, found: Found) -> None:
    @app.get("/api/runs/{run}/repair")
    def repair_steps(run: str) -> Response:
        """Says which steps a repair has."""
        return AsciiJson(found(run).repair.steps())

    @app.post("/api/runs/{run}/repair")
    def begin_repair(run: str, asked: AskedRepair) -> Response:
        """Begins a step of a repair."""
        return AsciiJson({"job": found(run).repair.begin(asked.step, asked.options).job})

    @app.get("/api/runs/{run}/jobs")
    def jobs_of(run: str) -> Response:
        """Says which jobs there are."""
        return AsciiJson({"jobs": [job.shown(whole=False) for job in found(run).jobs.of_run(run)]})


def _add_label_routes(app: FastAPI, found: Found) -> None:
    @app.get("/api/runs/{run}/queue")
    def queue(run: str, labeller: str, blind: bool = True) -> Response:
        """Gives the next rollout to label."""
        return AsciiJson(found(run).labelling.next(labeller, blind=blind))

    @app.post("/api/runs/{run}/labels")
    def give_label(run: str, given: GivenLabel) -> Response:
        """Takes a label."""
        labelling = found(run).labelling
        return AsciiJson(
            labelling.give(given.rollout, given.label, given.labeller, note=given.note or "", spans=given.spans, second=given.second)
        )

    @app.post("/api/runs/{run}/labels/{label}/undo")
    def undo_label(run: str, label: str, who: WhoUndoes) -> Response:
        """Takes a label back."""
        return AsciiJson(found(run).labelling.undo(label, who.labeller))

    @app.post("/api/runs/{run}/plan")
    def plan(run: str, asked: AskedPlan) -> Response:
        """Plans rollouts to label."""
        return AsciiJson(found(run).labelling.plan(**asked.model_dump()))


def _answer_errors(app: FastAPI) -> None:
    """Answers what goes wrong with one sentence, and no more of the machine than it names."""

    def answers(kind: type[Exception], status: int, sentence: Callable[[Exception], str]) -> None:
        async def handler(request: Request, error: Exception) -> Response:
            del request
            return AsciiJson({"error": sentence(error)}, status_code=status)

        app.add_exception_handler(kind, handler)

    answers(ValueError, 400, str)
    answers(RequestValidationError, 400, _what_is_wrong)
    answers(LabelConflict, 409, str)
    answers(JobConflict, 409, str)
    answers(KeyError, 404, lambda error: str(error.args[0]) if error.args else "not found")
    answers(FileNotFoundError, 404, lambda error: "a file has gone" if cast("OSError", error).filename else str(error))
    answers(sqlite3.OperationalError, 507, lambda error: f"the index could not be written: {error}")
    answers(OSError, 507, lambda error: f"it could not be written: {getattr(error, 'strerror', None) or type(error).__name__}")

    async def of_http(request: Request, error: Exception) -> Response:
        del request
        assert isinstance(error, HTTPException)  # noqa: S101 - registered for it
        return AsciiJson({"error": str(error.detail)}, status_code=error.status_code)

    app.add_exception_handler(HTTPException, of_http)


def _what_is_wrong(error: Exception) -> str:
    assert isinstance(error, RequestValidationError)  # noqa: S101 - registered for it
    first = error.errors()[0]
    return f"{'.'.join(str(part) for part in first['loc'][1:]) or 'body'}: {first['msg']}"
