"""The server's endpoints: OpenAI's chat and text completions, the model, health, metrics, and the page.

app = make_app(Service(session, grammars, Settings("demo")))        # for any ASGI server
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime.fields import RequestError
from runtime.replies import ChatReply, CompletionReply, Reply
from runtime.requests import parse_chat, parse_completion
from runtime.service import Parse, Prepared, Service
from runtime.worker import Done, Event, Job

PAGE = Path(__file__).parent / "page"
FILES = {"/": ("index.html", "text/html"), "/page.css": ("page.css", "text/css")}
FILES["/page.js"] = ("page.js", "text/javascript")
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
STREAM_HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-store"}
BODY_SECONDS = 30  # that a body may take to come
LINGER_SECONDS = 1  # that a client gets to read why its body was not


class Completions:
    """An endpoint that answers from the model, one answer a request, whole or as a stream."""

    def __init__(self, service: Service, parse: Parse, reply: type[Reply]) -> None:
        self.service, self.parse, self.reply = service, parse, reply

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = time.perf_counter()
        service = self.service
        service.worker.check_room(service.coming)
        service.coming += 1
        try:
            body = await self._body(Request(scope, receive))
            prepared = await service.prepare_aside(body, self.parse)
            del body
        except ClientDisconnect:
            return
        finally:
            service.coming -= 1
        await Exchange(self.service, prepared, self.reply, began).run(scope, receive, send)

    async def _body(self, request: Request) -> bytes:
        """Not waited for once the server stops. Raises RequestError, ClientDisconnect."""
        reading = asyncio.create_task(read_body(request, self.service.settings.max_body))
        stopping = asyncio.create_task(self.service.stopping.wait())
        try:
            await asyncio.wait((reading, stopping), return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                self.service.worker.check_room()
            return await reading
        finally:
            reading.cancel()
            stopping.cancel()


class Exchange:
    """One request's answer, from its place in the queue to its last byte. Whoever leaves gives up place and answer."""

    def __init__(self, service: Service, prepared: Prepared, reply: type[Reply], began: float) -> None:
        self.service, self.began = service, began
        self.ask = prepared.ask
        self.reply = reply(prepared.ask, service.speaker, service.counts(prepared))
        self.events: asyncio.Queue[Event | None] = asyncio.Queue()  # None: the client has left
        self.loop = asyncio.get_running_loop()
        self.job = Job(prepared.prompt, prepared.request, self._post)

    def _post(self, event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)

    async def run(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises RequestError, if nothing has been sent yet."""
        worker = self.service.worker
        worker.submit(self.job)
        watcher = asyncio.create_task(self._watch(receive))
        try:
            if self.ask.stream:
                await self._stream(send)
            elif (done := await self._collect()) is not None:
                await JSONResponse(self.reply.whole(done))(scope, receive, send)
        finally:
            watcher.cancel()
            worker.cancel(self.job)
            self.service.metrics.add(self.reply.counts)

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.service.worker.cancel(self.job)
        self.events.put_nowait(None)

    async def _next(self) -> Event | None:
        event = await self.events.get()
        metrics, seconds = self.service.metrics, time.perf_counter() - self.began
        if isinstance(event, Done):
            metrics.seconds.observe(seconds)
        elif event and not isinstance(event, RequestError) and not self.reply.counts.completion_tokens:
            metrics.first_token.observe(seconds)
        return event

    async def _collect(self) -> Done | None:
        """The answer into the reply; None: the client has left."""
        while event := await self._next():
            if isinstance(event, RequestError):
                raise event
            if isinstance(event, Done):
                return event
            self.reply.add(event)
        return None

    async def _stream(self, send: Send) -> None:
        """The status is known with the first event only, so nothing is sent before it."""
        event = await self._next()
        if isinstance(event, RequestError):
            raise event
        if event is None:
            return
        headers = [(name.lower().encode(), value.encode()) for name, value in STREAM_HEADERS.items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        while event is not None:
            data = b"".join(self._lines(event))
            ends = isinstance(event, Done | RequestError)
            if data or ends:
                await send({"type": "http.response.body", "body": data, "more_body": not ends})
            if ends:
                return
            event = await self._next()

    def _lines(self, event: Event) -> Iterator[bytes]:
        if isinstance(event, RequestError):
            yield _sse(event.body)
        elif isinstance(event, Done):
            yield from map(_sse, self.reply.last(event))
            yield b"data: [DONE]\n\n"
        elif (chunk := self.reply.add(event)) is not None:
            yield _sse(chunk)


def _sse(data: dict[str, Any]) -> bytes:
    """In ASCII: some clients take other line ends of Unicode for ends of an event's line."""
    return b"data: " + json.dumps(data, separators=(",", ":"), allow_nan=False).encode() + b"\n\n"


async def read_body(request: Request, limit: int) -> bytes:
    """Raises RequestError: not declared as JSON, longer than `limit` bytes, or slow to come."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise RequestError(415, "Content-Type: expected application/json")
    too_long = RequestError(413, f"the body is too long; at most {limit} bytes are read (--max-body)")
    if int(request.headers.get("content-length", 0)) > limit:
        raise too_long
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > limit:
                    raise too_long
    except TimeoutError:
        raise RequestError(408, f"the body took longer than {BODY_SECONDS} seconds to come") from None
    return bytes(body)


class Lingering(JSONResponse):
    """For a client that is still sending: it is read from for a moment, or it would be cut off before it had read."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                while (await receive()).get("more_body"):
                    pass
        await send({"type": "http.response.body", "body": b""})


async def refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    if error.status in (408, 413):
        return Lingering(error.body, error.status, {"Connection": "close"})
    retry = {429: "1", 503: "10"}.get(error.status)
    return JSONResponse(error.body, error.status, {"Retry-After": retry} if retry else None)


async def not_found(request: Request, error: Exception) -> Response:
    """Starlette's own refusals: no such path, no such method."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse(RequestError(error.status_code, message).body, error.status_code, error.headers)


async def failed(request: Request, error: Exception) -> Response:
    return JSONResponse(RequestError(500, "the server failed at this request; its log says how").body, 500)


class Counted:
    """Counts requests by path and status."""

    def __init__(self, app: ASGIApp, service: Service, paths: set[str]) -> None:
        self.app, self.service, self.paths = app, service, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status = 499

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except Exception:
            status = 500
            raise
        finally:
            endpoint = scope["path"] if scope["path"] in self.paths else "other"
            self.service.metrics.requests.labels(endpoint, status).inc()


class Keyed:
    """Lets nobody under /v1 without one of the keys, if there are any."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        if not scope["path"].startswith("/v1") or self.service.admits(given):
            await self.app(scope, receive, send)
            return
        error = RequestError(401, "no valid API key; send one as `Authorization: Bearer KEY`", code="invalid_api_key")
        await JSONResponse(error.body, 401, {"WWW-Authenticate": "Bearer"})(scope, receive, send)


class Named:
    """Only for those who call the server by one of its names, where there are any: a page of another host whose name
    was made to lead here may not read answers."""

    def __init__(self, app: ASGIApp, names: Collection[str]) -> None:
        self.app, self.names = app, names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        host = next((value for name, value in scope["headers"] if name == b"host"), b"").decode("latin-1")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if not self.names or name.strip("[]").lower() in self.names:
            await self.app(scope, receive, send)
            return
        message = f"Host {host!r}: not a name of this server; use {' or '.join(sorted(self.names))}, or --api-key-file"
        await JSONResponse(RequestError(403, message).body, 403)(scope, receive, send)


def make_app(service: Service) -> Starlette:
    async def models(request: Request) -> Response:
        name = request.path_params.get("name")
        if name not in (None, service.served.model):
            raise RequestError(404, f"the model {name!r} does not exist here", "model", "model_not_found")
        model = service.describe()
        return JSONResponse(model if name else {"object": "list", "data": [model]})

    async def health(request: Request) -> Response:
        if service.worker.is_stopping:
            return JSONResponse({"status": "stopping"}, 503)
        return JSONResponse({"status": "ok"})

    async def metrics(request: Request) -> Response:
        return Response(service.metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def page(request: Request) -> Response:
        name, kind = FILES[request.url.path]
        path = PAGE / name
        if not path.is_file():
            raise HTTPException(404)
        return Response(path.read_bytes(), headers=PAGE_HEADERS, media_type=kind)

    routes = [
        Route("/v1/chat/completions", Completions(service, parse_chat, ChatReply), methods=["POST"]),
        Route("/v1/completions", Completions(service, parse_completion, CompletionReply), methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", models),
        Route("/health", health),
        Route("/metrics", metrics),
        *(Route(path, page) for path in FILES),
    ]
    paths = {route.path for route in routes}
    app = Starlette(
        routes=routes,
        middleware=[
            Middleware(Counted, service, paths),
            Middleware(Named, service.settings.names),
            Middleware(Keyed, service),
        ],
        exception_handlers={RequestError: refused, HTTPException: not_found, Exception: failed},
    )
    app.router.redirect_slashes = False
    return app
