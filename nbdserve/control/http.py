"""The way in: HTTP with JSON over a Unix socket that only its owner may use.

| method and path | what |
|---|---|
| GET /v1/exports | all exports |
| GET /v1/exports/NAME | one |
| PATCH /v1/exports/NAME | `{"size": "20G"}`: another size; `"shrink": true` allows a smaller one |
| POST /v1/exports/NAME/flush | make everything durable |
| POST /v1/exports/NAME/reopen | open the image anew |
| GET /v1/exports/NAME/snapshots | internal snapshots |
| POST /v1/exports/NAME/snapshots | `{"name": "before"}`: make one |
| DELETE /v1/exports/NAME/snapshots/SNAPSHOT | forget one |
| POST /v1/exports/NAME/compaction | begin to compact |
| GET /v1/exports/NAME/compaction | how far it is |
| DELETE /v1/exports/NAME/compaction | stop it |

Names are percent-encoded. What fails is answered with `{"error": "one line"}` and
a status: 400 the question makes no sense, 404 no such export, 409 not now or
not with this image, 500 the disk failed, 507 it is full.

aiohttp is imported with this module only: a server without a control socket starts
without it.
"""

import errno
import logging
import os
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import msgspec
import structlog
from aiohttp import web

from nbdserve.control.answers import Failure, NewSize, NewSnapshot
from nbdserve.control.operations import (
    BusyError,
    Operations,
    UnknownExportError,
)
from nbdserve.errors import ConfigError, NbdserveError
from nbdserve.server.listeners import Listener

#: No question needs more.
_MOST_BYTES: Final = 64 << 10
#: How long questions may take that are being answered when the server ends.
_SHUTDOWN_S: Final = 5.0
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
_EXPORT: Final = "/v1/exports/{name:[^/]*}"

_Question = TypeVar("_Question", bound=msgspec.Struct)
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class ControlServer:
    """Answers on one listener what `Operations` can do."""

    def __init__(self, listener: Listener, operations: Operations) -> None:
        """Begin nothing yet; the listener is closed by whoever made it."""
        self._listener = listener
        self._operations = operations
        app = web.Application(middlewares=[_explained], client_max_size=_MOST_BYTES)
        app.add_routes(self._routes())
        self._runner = web.AppRunner(
            app,
            access_log=None,
            logger=_logger(),
            handle_signals=False,
            shutdown_timeout=_SHUTDOWN_S,
        )

    async def start(self) -> None:
        """Begin to answer."""
        await self._runner.setup()
        await web.SockSite(self._runner, self._listener.sock).start()

    async def close(self) -> None:
        """End what goes on, and answer no more."""
        self._listener.close()
        await self._operations.close()
        await self._runner.cleanup()

    def _routes(self) -> list[web.RouteDef]:
        return [
            web.get("/v1/exports", self._exports),
            web.get(_EXPORT, self._export),
            web.patch(_EXPORT, self._resize),
            web.post(f"{_EXPORT}/flush", self._flush),
            web.post(f"{_EXPORT}/reopen", self._reopen),
            web.get(f"{_EXPORT}/snapshots", self._snapshots),
            web.post(f"{_EXPORT}/snapshots", self._create_snapshot),
            web.delete(_EXPORT + "/snapshots/{snapshot}", self._delete_snapshot),
            web.post(f"{_EXPORT}/compaction", self._compact),
            web.get(f"{_EXPORT}/compaction", self._compaction),
            web.delete(f"{_EXPORT}/compaction", self._stop_compaction),
        ]

    async def _exports(self, _: web.Request) -> web.Response:
        return _answer(self._operations.exports())

    async def _export(self, request: web.Request) -> web.Response:
        export = self._operations.find(_name(request))
        return _answer(self._operations.state(export))

    async def _resize(self, request: web.Request) -> web.Response:
        wanted = await _question(request, NewSize)
        return _answer(await self._operations.resize(_name(request), wanted))

    async def _flush(self, request: web.Request) -> web.Response:
        await self._operations.flush(_name(request))
        return _answer({})

    async def _reopen(self, request: web.Request) -> web.Response:
        return _answer(await self._operations.reopen(_name(request)))

    async def _snapshots(self, request: web.Request) -> web.Response:
        return _answer(await self._operations.snapshots(_name(request)))

    async def _create_snapshot(self, request: web.Request) -> web.Response:
        wanted = await _question(request, NewSnapshot)
        done = await self._operations.create_snapshot(_name(request), wanted.name)
        return _answer(done, 201)

    async def _delete_snapshot(self, request: web.Request) -> web.Response:
        snapshot = request.match_info["snapshot"]
        return _answer(await self._operations.delete_snapshot(_name(request), snapshot))

    async def _compact(self, request: web.Request) -> web.Response:
        return _answer(await self._operations.start_compaction(_name(request)), 202)

    async def _compaction(self, request: web.Request) -> web.Response:
        return _answer(self._operations.compaction(_name(request)))

    async def _stop_compaction(self, request: web.Request) -> web.Response:
        return _answer(await self._operations.stop_compaction(_name(request)))


class _OneLine(logging.Handler):
    """Tells what aiohttp logs as the rest of the server does: one line, no traceback."""

    def emit(self, record: logging.LogRecord) -> None:
        """Say it; what a broken client has sent may be long."""
        error = record.exc_info[1] if record.exc_info else None
        text = " ".join(str(error or record.getMessage()).split())
        structlog.get_logger().warning(
            "control request not understood", error=text[:200]
        )


def _logger() -> logging.Logger:
    """Return a logger of our own; only requests that aren't HTTP get there."""
    logger = logging.Logger("nbdserve.control", logging.WARNING)  # noqa: LOG001
    logger.addHandler(_OneLine())
    return logger


def _name(request: web.Request) -> str:
    return request.match_info["name"]


async def _question(request: web.Request, kind: type[_Question]) -> _Question:
    """Read the body of a request.

    Raises:
        ConfigError: It is not what is asked there.
    """
    try:
        return msgspec.json.decode(await request.read(), type=kind)
    except msgspec.DecodeError as error:
        raise ConfigError(f"the body is not understood: {error}") from error


def _answer(outcome: object, status: int = 200) -> web.Response:
    """Return JSON, with a line end for whoever looks at it in a terminal."""
    return web.Response(
        body=msgspec.json.encode(outcome) + b"\n",
        status=status,
        content_type="application/json",
    )


@web.middleware
async def _explained(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """Answer every failure as JSON."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        text = f"{request.method} {request.path}: {error.reason}"
        response = _answer(Failure(error=text), error.status)
        if "Allow" in error.headers:
            response.headers["Allow"] = error.headers["Allow"]
        return response
    except (NbdserveError, OSError) as error:
        return _answer(Failure(error=_line(error)), _status(error))
    except Exception:  # noqa: BLE001 -- a bug: told to the log, and not to a stranger
        structlog.get_logger().exception(
            "control request failed unexpectedly", path=request.path
        )
        return _answer(Failure(error="failed unexpectedly; the log says how"), 500)


def _status(error: Exception) -> int:
    """Return the status that says what happens next."""
    if isinstance(error, UnknownExportError):
        return 404
    if isinstance(error, ConfigError) and not isinstance(error, BusyError):
        return 400
    if isinstance(error, NbdserveError):
        return 409
    return 507 if isinstance(error, OSError) and error.errno in _FULL else 500


def _line(error: Exception) -> str:
    """Return the message of an error as one line."""
    text = str(error)
    if isinstance(error, OSError) and error.errno:
        text = error.strerror or os.strerror(error.errno)
        if error.filename is not None:
            text = f"{os.fsdecode(error.filename)}: {text}"
    return " ".join(text.split())
