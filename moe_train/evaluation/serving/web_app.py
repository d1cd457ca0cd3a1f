"""The web application of moe-serve: ``POST /translate``, ``GET /health``, and the page."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from moe_train.config.serving import ServeConfig
from moe_train.errors import UserError
from moe_train.evaluation.inference.stream import check_languages
from moe_train.evaluation.serving.batch_queue import BatchQueue, QueueFull
from moe_train.evaluation.serving.request_guard import App, RequestGuard, is_wildcard
from moe_train.evaluation.translations import Translation

_ASSETS = Path(__file__).with_name("assets")
_PAGE = {
    "/": ("page.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}
_MOST_BYTES = 4  # of a character in UTF-8; JSON's \\uXXXX takes up to 12
_ROOM = 16_384  # bytes of a body for anything but sentences


class TranslateRequest(BaseModel):
    """The body of ``POST /translate``."""

    model_config = ConfigDict(extra="forbid", strict=True)

    sentences: Annotated[list[str], Field(min_length=1)]
    source: str
    target: str
    experts: bool = False


def make_app(queue: BatchQueue, config: ServeConfig, about: Mapping[str, Any]) -> App:
    """The application.

    Args:
        about: ``languages`` and what else ``GET /health`` tells of the model.
    """
    app = FastAPI(title="moe-serve", docs_url=None, redoc_url=None, openapi_url=None)
    languages = about["languages"]

    @app.post("/translate")
    async def translate(body: TranslateRequest) -> JSONResponse:
        try:
            _check(body, config)
            check_languages(body.source, body.target, languages)
        except UserError as error:
            return _error(422, error.what, error.where, error.remedy)
        try:
            waiting = queue.put(body.sentences, body.source, body.target, body.experts)
        except QueueFull as full:
            return _error(
                429,
                f"{queue.waiting:,} sentences wait, and the queue takes {config.queue:,}",
                remedy=f"try again after {full.seconds} s",
                headers={"Retry-After": str(full.seconds)},
            )
        found = await asyncio.wrap_future(waiting)
        answers = [_to_json(translation, body.experts) for translation in found]
        return JSONResponse({"source": body.source, "target": body.target, "translations": answers})

    @app.get("/health")
    async def health() -> dict[str, Any]:
        limits = {"sentences": config.max_sentences, "characters": config.max_characters, "queue": config.queue}
        return {"status": "ok", **about, "waiting": queue.waiting, "limits": limits}

    for path, (name, kind) in _PAGE.items():
        _add_file(app, path, (_ASSETS / name).read_bytes(), kind)
    _add_errors(app)

    async def refuse(scope: Any, receive: Any, send: Any) -> None:
        answer = _error(403, "the request's Host is not served here", remedy="add it to allowed_hosts=[…] of moe-serve")
        await answer(scope, receive, send)

    hosts = [*config.allowed_hosts, *([] if is_wildcard(config.host) else [config.host])]
    longest = 3 * _MOST_BYTES * config.max_sentences * config.max_characters + _ROOM
    return RequestGuard(app, hosts, longest, refuse)


def _check(body: TranslateRequest, config: ServeConfig) -> None:
    """Checks the limits.

    Raises:
        UserError: one is exceeded, or a sentence is no valid text.
    """
    if len(body.sentences) > config.max_sentences:
        what = f"{len(body.sentences):,} sentences are more than {config.max_sentences:,}"
        raise UserError(what, "sentences", "send them in several requests")
    for number, sentence in enumerate(body.sentences):
        where = f"sentences[{number}]"
        if len(sentence) > config.max_characters:
            what = f"{len(sentence):,} characters are more than {config.max_characters:,}"
            raise UserError(what, where, "send it in parts")
        if any("\ud800" <= character <= "\udfff" for character in sentence):
            raise UserError("half of a surrogate pair is no character", where, "send valid Unicode")


def _to_json(translation: Translation, experts: bool) -> dict[str, Any]:
    plain = {"text": translation.text, "score": translation.score, "tokens": translation.tokens, "cut": translation.cut}
    if not experts:
        return plain
    found = translation.experts
    return {**plain, "experts": asdict(found) if found is not None else None}


def _add_file(app: FastAPI, path: str, content: bytes, kind: str) -> None:
    @app.get(path)
    async def file() -> Response:
        return Response(content, media_type=kind)


def _add_errors(app: FastAPI) -> None:
    """Errors as JSON: ``error``, ``where``, ``remedy``."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request: HttpRequest, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"][1:])
        return _error(422, str(first["msg"]), place.removeprefix("."), "see docs/evaluation.md for the body")

    @app.exception_handler(HTTPException)
    async def refused(request: HttpRequest, error: HTTPException) -> JSONResponse:
        return _error(error.status_code, str(error.detail), request.url.path, headers=dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def failed(request: HttpRequest, error: Exception) -> JSONResponse:
        return _error(500, "the translation failed", request.url.path, "see the messages of moe-serve")


def _error(
    status: int, what: str, where: str = "", remedy: str = "", headers: Mapping[str, str] | None = None
) -> JSONResponse:
    texts = {"error": what, "where": where, "remedy": remedy}
    # A request's own words may have half of a surrogate pair, which UTF-8 cannot write.
    valid = {name: text.encode("utf-8", "replace").decode() for name, text in texts.items()}
    return JSONResponse(valid, status, headers=headers)
