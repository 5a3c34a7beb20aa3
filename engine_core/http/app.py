"""The pages of the endpoint, as an ASGI application: it reads requests, hands them to the intake and sends answers."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hmac
import logging
from collections import deque
from collections.abc import Awaitable, Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from engine_core.errors import EdgeLLMError, NotActiveError
from engine_core.http.errors import HttpError, ModelError, describe, describe_ending
from engine_core.http.fields import Fields, parse_object
from engine_core.http.limits import HttpLimits
from engine_core.http.metrics import CONTENT_TYPE, Metrics
from engine_core.http.openai_answers import ChatAnswer, TextAnswer, event
from engine_core.http.openai_requests import Asked, chat_request, completion_request
from engine_core.http.status import PAGE, PAGE_HEADERS, StatusFigures
from engine_core.request import GenerationResult, Piece, RequestDefaults
from engine_core.serving.engine import Engine
from engine_core.serving.intake import Intake

_log = logging.getLogger(__name__)
_Page = Callable[[Request], Awaitable[Response]]
_Reader = Callable[[Fields, RequestDefaults, dict[str, str]], Asked]


class OpenAIApp:
    """OpenAI's API in front of ``intake``. ``keys``: a client has to send one of them; none = all may ask."""

    def __init__(
        self, intake: Intake, metrics: Metrics, figures: StatusFigures, limits: HttpLimits, keys: tuple[bytes, ...]
    ) -> None:
        self._intake = intake
        self._metrics = metrics
        self._figures = figures
        self._limits = limits
        self._keys = keys
        self._receiving = 0  # B, of all bodies that have not come as a whole
        pages: tuple[tuple[str, str, _Page], ...] = (
            ("GET", "/v1/models", self._models),
            ("GET", "/v1/models/{model:path}", self._model),
            ("POST", "/v1/chat/completions", self._chat),
            ("POST", "/v1/completions", self._complete),
            ("GET", "/metrics", self._show_metrics),
            ("GET", "/status", self._status),
        )
        routes = [Route(path, self._guarded(page), methods=[method]) for method, path, page in pages]
        routes.append(Route("/health", self._health, methods=["GET"]))
        routes.append(Route("/", self._show_page, methods=["GET"]))
        self.asgi = Starlette(routes=routes, exception_handlers={HTTPException: _no_page})
        self.asgi.router.redirect_slashes = False  # a redirect would name the host that the client's header names

    # --- pages ----------------------------------------------------------------------------------------

    async def _chat(self, request: Request) -> Response:
        return await self._generate(request, chat_request, ChatAnswer)

    async def _complete(self, request: Request) -> Response:
        return await self._generate(request, completion_request, TextAnswer)

    async def _generate(self, request: Request, read: _Reader, kind: type[TextAnswer]) -> Response:
        fields = parse_object(await self._body(request))
        engine = self._engine_or_raise()
        asked = read(fields, self._intake.state.settings, _adapters(engine))
        return GenerationResponse(self._intake, asked, kind(asked, f"fp_{engine.hash[:12]}"))

    async def _models(self, request: Request) -> Response:
        engine = self._engine_or_raise()
        return JSONResponse({"object": "list", "data": [_card(engine, name) for name in _adapters(engine)]})

    async def _model(self, request: Request) -> Response:
        engine, name = self._engine_or_raise(), request.path_params["model"]
        if name not in _adapters(engine):
            raise ModelError(name, _adapters(engine))
        return JSONResponse(_card(engine, name))

    async def _health(self, request: Request) -> Response:
        """200 while requests are accepted; needs no key and says nothing of the model."""
        is_active = self._intake.state.worker is not None
        return JSONResponse({"status": "ok" if is_active else "inactive"}, 200 if is_active else 503)

    async def _show_metrics(self, request: Request) -> Response:
        return Response(self._metrics.text(), media_type=CONTENT_TYPE)

    async def _status(self, request: Request) -> Response:
        return JSONResponse(self._figures.as_dict(), headers={"Cache-Control": "no-store"})

    async def _show_page(self, request: Request) -> Response:
        """Needs no key: it holds no figures, but asks for the key where /status needs one."""
        return HTMLResponse(PAGE, headers=PAGE_HEADERS)

    # --- helpers --------------------------------------------------------------------------------------

    def _engine_or_raise(self) -> Engine:
        self._intake.worker_or_raise()
        if (engine := self._intake.state.engine) is None:
            raise NotActiveError("Nothing is configured; configure the node first.")
        return engine

    def _guarded(self, page: _Page) -> _Page:
        """Return ``page`` for those who have a key, with every error as OpenAI's error object."""

        async def guarded(request: Request) -> Response:
            try:
                self._check_key(request)
                return await page(request)
            except ClientDisconnect:
                return Response()  # to nobody
            except Exception as error:
                if not isinstance(error, EdgeLLMError):
                    _log.exception("A page of the HTTP endpoint raised")
                return _error_response(error)

        return guarded

    def _check_key(self, request: Request) -> None:
        header = request.headers.get("authorization", "").encode("latin-1")  # as it came: Starlette decodes it so
        scheme, _, key = header.partition(b" ")
        given = key.strip() if scheme.lower() == b"bearer" else b""
        # All are compared, so that the time tells nothing.
        if self._keys and not any([hmac.compare_digest(given, known) for known in self._keys]):
            raise HttpError(
                401, "The API key is missing or wrong; send one of those in http_api_key_file.", "invalid_api_key",
                closes=True,
            )  # fmt: skip

    async def _body(self, request: Request) -> bytes:
        """Raises HttpError, ClientDisconnect."""
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json":  # which no web page sends elsewhere without being asked first (CORS)
            raise HttpError(415, "The Content-Type is not application/json.", "unsupported_media_type", closes=True)
        if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
            raise HttpError(
                415, "The body has a Content-Encoding; send it as it is.", "unsupported_media_type", closes=True
            )
        too_large = HttpError(
            413, f"The body is larger than {self._limits.body_bytes} bytes.", "body_too_large", closes=True
        )
        length = request.headers.get("content-length", "0")
        if length.isdigit() and int(length) > self._limits.body_bytes:
            raise too_large
        body = bytearray()

        async def read() -> None:
            async for part in request.stream():
                body.extend(part)
                self._receiving += len(part)
                if len(body) > self._limits.body_bytes:
                    raise too_large
                if len(body) < self._receiving > self._limits.all_body_bytes:
                    raise HttpError(
                        503, "Too many large bodies are being received; send it again later.", "too_many_bodies",
                        closes=True,
                    )  # fmt: skip

        try:
            await asyncio.wait_for(read(), self._limits.body_time)
        except asyncio.TimeoutError:
            raise HttpError(
                408, f"The body was not complete after {self._limits.body_time:g} s.", "timeout", closes=True
            ) from None
        finally:
            self._receiving -= len(body)
        return bytes(body)


def _adapters(engine: Engine) -> dict[str, str]:
    """Return the name of each served model → its LoRA adapter; the model itself comes first."""
    return {engine.manifest.model_name: "", **{name: name for name in engine.adapters}}


def _card(engine: Engine, name: str) -> dict:
    card = {"id": name, "object": "model", "created": 0, "owned_by": "edgellm", "max_model_len": engine.max_context}
    if name != engine.manifest.model_name:
        card["parent"] = engine.manifest.model_name
    return card


def _error_response(error: Exception) -> Response:
    status, body, headers = describe(error)
    return JSONResponse(body, status, headers)


async def _no_page(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    what = {404: "There is no such page", 405: "The page is not asked with this method"}.get(status, "Refused")
    answer = _error_response(HttpError(status, f"{what}: {request.method} {request.url.path[:200]}.", "not_found"))
    if isinstance(error, HTTPException) and error.headers:
        answer.headers.update(error.headers)
    return answer


class _Inbox:
    """Carries pieces and the result from the worker's thread to the event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._items: deque[Piece | GenerationResult] = deque()
        self._ready = asyncio.Event()
        self.is_closed = False  # the client has left

    def put(self, item: Piece | GenerationResult) -> None:
        """Queue it; may be called from any thread."""
        self._items.append(item)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits for it
            self._loop.call_soon_threadsafe(self._ready.set)

    def close(self) -> None:
        self.is_closed = True
        self._ready.set()

    async def get(self) -> list[Piece | GenerationResult]:
        """Return what has come, at least one; nothing if the client has left."""
        while not (self._items or self.is_closed):
            self._ready.clear()
            await self._ready.wait()
        items = []
        while self._items and not self.is_closed:
            items.append(self._items.popleft())
        return items


class GenerationResponse(Response):
    """Has a request answered and sends the answer, whole or as it comes; a client that leaves cancels it."""

    def __init__(self, intake: Intake, asked: Asked, answer: TextAnswer) -> None:
        self._intake, self._asked, self._answer = intake, asked, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        inbox = _Inbox()
        stream = self._asked.stream
        opened = self._intake.take(
            self._asked.request,
            on_piece=inbox.put if stream else None,
            on_done=inbox.put,
            images=self._asked.images,
        )
        self._asked = dataclasses.replace(self._asked, images=None)  # megabytes, which go once they are decoded
        left = asyncio.ensure_future(_until_gone(receive, inbox))
        is_done = False
        try:
            is_done = await (self._send_stream if stream else self._send_whole)(inbox, scope, receive, send)
        finally:
            left.cancel()
            if not is_done:
                opened.cancel()

    async def _send_whole(self, inbox: _Inbox, scope: Scope, receive: Receive, send: Send) -> bool:
        """Return whether the request has ended; otherwise its client has left."""
        items = await inbox.get()
        if not items:
            return False
        (result,) = items
        assert isinstance(result, GenerationResult)
        failure = describe_ending(result)
        if failure is not None:
            response = JSONResponse(failure.body, failure.status, failure.headers)
        else:
            response = JSONResponse(self._answer.whole(result))
        await response(scope, receive, send)
        return True

    async def _send_stream(self, inbox: _Inbox, scope: Scope, receive: Receive, send: Send) -> bool:
        """Send the answer piece by piece, otherwise as ``_send_whole``.

        Nothing is sent before the first piece, so that a refusal has its own status.
        """
        has_begun = False
        while items := await inbox.get():
            data, result = b"", None
            for item in items:
                if isinstance(item, Piece):
                    data += self._answer.piece(item)
                else:
                    result = item
            if result is not None:
                failure = describe_ending(result)
                if failure is not None and not (has_begun or data):
                    await JSONResponse(failure.body, failure.status, failure.headers)(scope, receive, send)
                    return True
                data += self._answer.end(result) if failure is None else event(failure.body)
            if data and not has_begun:
                has_begun = True
                await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
            if data:
                await send({"type": "http.response.body", "body": data, "more_body": result is None})
            if result is not None:
                return True
        return False


_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # a proxy has to hand on each event
]


async def _until_gone(receive: Receive, inbox: _Inbox) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    inbox.close()
