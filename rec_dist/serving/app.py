"""The server as an ASGI application: its routes, and the status and sentence of whatever goes wrong."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from starlette.exceptions import HTTPException

from rec_dist.data.sources.listings import as_names, as_text
from rec_dist.errors import UserError, one_line
from rec_dist.evaluation.baselines import Floats
from rec_dist.runtime.arrays import I32
from rec_dist.serving import engine
from rec_dist.serving.batcher import OverloadedError, ScoringFailedError, TooLateError
from rec_dist.serving.guard import Access, Guard
from rec_dist.serving.messages import (
    Fault,
    FoundItem,
    FoundItems,
    ProblemError,
    Question,
    RankedItem,
    RankQuestion,
    RankReply,
    ScoreQuestion,
    ScoreReply,
    sentence,
)
from rec_dist.serving.metrics import Metrics
from rec_dist.serving.served import Served
from rec_dist.serving.switch import Switch

logger = logging.getLogger(__name__)

_PAGE = Path(__file__).parent / "page"
_FILES = {"/": "index.html", "/page.js": "page.js", "/page.css": "page.css", "/docs": "docs.html", "/docs.js": "docs.js"}
_FAULTS: dict[int | str, dict[str, Any]] = {
    401: {"model": Fault, "description": "The token is missing or wrong."},
    413: {"model": Fault, "description": "The body is too large."},
    422: {"model": Fault, "description": "The request is wrong; `error` says how."},
    429: {"model": Fault, "description": "Too many requests wait; Retry-After says when to try again."},
    504: {"model": Fault, "description": "The deadline passed."},
}


def build_app(switch: Switch, access: Access, metrics: Metrics) -> Guard:
    """The application. switch: the model that answers; started and closed with the application."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        switch.start()
        yield
        await switch.close()

    routes = Routes(switch, metrics)
    app = FastAPI(title="rec-dist", version="1", docs_url=None, redoc_url=None, lifespan=lifespan)
    for path, route, methods in (
        ("/v1/rank", routes.rank, ["POST"]),
        ("/v1/score", routes.score, ["POST"]),
        ("/v1/items", routes.items, ["GET"]),
        ("/v1/model", routes.model, ["GET"]),
    ):
        app.add_api_route(path, route, methods=methods, responses=_FAULTS, response_model_exclude_none=False)
    app.add_api_route("/healthz", routes.healthz, methods=["GET"])
    app.add_api_route("/metrics", routes.metrics, methods=["GET"], response_class=Response)
    for path, name in _FILES.items():
        app.add_api_route(path, _file(_PAGE / name), methods=["GET"], include_in_schema=False)
    app.add_exception_handler(ProblemError, _problem)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _bug)
    known = frozenset({"/v1/rank", "/v1/score", "/v1/items", "/v1/model", "/healthz", "/metrics", "/openapi.json", *_FILES})
    return Guard(app, access, metrics, known)


def _file(path: Path) -> Callable[[], FileResponse]:
    return lambda: FileResponse(path, headers={"cache-control": "no-cache"})


class Routes:
    """The routes. Each keeps the model that answers when it begins."""

    def __init__(self, switch: Switch, metrics: Metrics) -> None:
        self._switch, self._metrics = switch, metrics

    async def rank(self, body: RankQuestion) -> RankReply:
        """The best items after a history: of the candidates, or of the whole catalogue."""
        began = time.perf_counter()
        with self._switch.asked() as served:
            history, unknown_history = await _history(served, body)
            candidates, unknown = None, 0
            if body.candidates is not None:
                candidates, unknown = served.names.find(_names(body.candidates, "candidates"))
                candidates = candidates[np.sort(np.unique(candidates, return_index=True)[1])]  # once each, in their order
                if not len(candidates):
                    raise ProblemError(422, f"candidates: none of the {unknown} names is an item of the catalogue")
            query = engine.Query(history, candidates, body.top_k, body.exclude_seen, body.members)
            answer = await self._ask(served, query)
        return RankReply(
            **_common(served, answer, unknown_history, unknown, began),
            items=[
                RankedItem(
                    rank=place + 1,
                    item_id=served.raw_items[item],
                    title=served.titles[item],
                    score=_number(answer.scores[place]),
                    members={name: _number(own[place]) for name, own in answer.members.items()} or None,
                )
                for place, item in enumerate(answer.items.tolist())
            ],
        )

    async def score(self, body: ScoreQuestion) -> ScoreReply:
        """The score of each candidate after a history, in their order."""
        began = time.perf_counter()
        with self._switch.asked() as served:
            history, unknown_history = await _history(served, body)
            numbers = served.names.numbers(_names(body.candidates, "candidates"))
            places = np.flatnonzero(numbers >= 0)
            if not len(places):
                raise ProblemError(422, f"candidates: none of the {len(numbers)} names is an item of the catalogue")
            answer = await self._ask(served, engine.Query(history, numbers[places], members=body.members))

        def spread(values: Floats) -> list[float | None]:
            whole: list[float | None] = [None] * len(numbers)
            for place, value in zip(places.tolist(), values, strict=True):
                whole[place] = _number(value)
            return whole

        return ScoreReply(
            **_common(served, answer, unknown_history, len(numbers) - len(places), began),
            scores=spread(answer.scores),
            members={name: spread(own) for name, own in answer.members.items()} or None,
        )

    def items(self, q: str = Query(max_length=200, description="Words of a title, or an id.")) -> FoundItems:
        """Up to 20 items by their title or id, the most popular first."""
        served = self._switch.now
        found = served.search(q)
        return FoundItems(items=[FoundItem(item_id=served.raw_items[item], title=served.titles[item]) for item in found])

    def model(self) -> dict[str, Any]:
        """The model that answers."""
        return {**self._switch.now.about, "num_items": self._switch.now.num_items}

    def healthz(self) -> dict[str, str]:
        """Whether the server is up."""
        return {"status": "ok", "model": self._switch.now.about["model"]}

    def metrics(self) -> Response:
        """The server's numbers for Prometheus."""
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _ask(self, served: Served, query: engine.Query) -> engine.Answer:
        scores = served.num_items if query.candidates is None else len(query.candidates)
        if served.most_titles is not None and scores > served.most_titles and len(query.history):
            raise ProblemError(
                422,
                f"candidates: this model reads a title in milliseconds, and a request may ask for {served.most_titles:,} titles, not "
                f"for {scores:,}; name fewer items",
            )
        try:
            answer = await served.batcher.answer(query, scores)
        except OverloadedError as fault:
            limit = self._switch.limits.queue
            raise ProblemError(
                429, f"{limit} requests wait already; try again in {fault.seconds} s", {"Retry-After": str(fault.seconds)}
            ) from None
        except TooLateError:
            limit_seconds = self._switch.limits.deadline_seconds
            raise ProblemError(504, f"no answer within {limit_seconds:g} s; send fewer candidates, or try again later") from None
        except ScoringFailedError:
            raise ProblemError(500, "the model failed on this request; the server's log says how") from None
        if isinstance(answer, engine.Refusal):
            raise ProblemError(422, answer.sentence)
        return answer


def _names(given: Sequence[str | int], field: str) -> list[str]:
    try:
        return as_names(list(given), field)
    except UserError as fault:
        raise ProblemError(422, str(fault)) from None


async def _history(served: Served, body: Question) -> tuple[I32, int]:
    """The known items of the history, and how many are unknown."""
    if (body.history is None) == (body.user_id is None):
        raise ProblemError(422, "give either history, a list of items, or user_id, a user of the data set")
    if body.history is not None:
        return served.names.find(_names(body.history, "history"))
    try:
        user = as_text(body.user_id, "user_id")
    except UserError as fault:
        raise ProblemError(422, str(fault)) from None
    history = await asyncio.to_thread(served.users.history, user)  # which may open a file of a remote data set
    if history is None:
        raise ProblemError(422, f"user_id: {user[:100]!r} is no user of the data set; give a history")
    return history, 0


def _number(value: Any) -> float | None:
    """A score for JSON, which has no word for an infinite one."""
    return float(value) if np.isfinite(value) else None


def _common(served: Served, answer: engine.Answer, unknown_history: int, unknown: int, began: float) -> dict[str, Any]:
    return {
        "model": served.about["model"],
        "fallback": answer.fallback,
        "unknown_history": unknown_history,
        "unknown_candidates": unknown,
        "seconds": time.perf_counter() - began,
    }


def _problem(_: Request, fault: Exception) -> JSONResponse:
    assert isinstance(fault, ProblemError)
    return JSONResponse({"error": fault.sentence}, fault.status, fault.headers)


def _invalid(_: Request, fault: Exception) -> JSONResponse:
    assert isinstance(fault, RequestValidationError)
    return JSONResponse({"error": sentence(list(fault.errors()))}, 422)


def _http(_: Request, fault: Exception) -> JSONResponse:
    assert isinstance(fault, HTTPException)
    if fault.status_code == 400:  # what FastAPI makes of a body that json gives up on
        return JSONResponse(
            {"error": "the body is no JSON: it is no UTF-8, nested too deeply, or has a number of thousands of digits"}, 422
        )
    return JSONResponse({"error": str(fault.detail)}, fault.status_code, fault.headers)


def _bug(request: Request, fault: Exception) -> JSONResponse:
    logger.warning(f"{request.url.path} failed: {type(fault).__name__}: {one_line(fault, 500)}")
    return JSONResponse({"error": "the server failed on this request; its log says how"}, 500)
