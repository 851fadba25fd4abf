"""The process that accepts clients, where several others serve them: `--workers`.

One process accepts, negotiates and knows who may do what; it opens no image. Each
writable image is open in exactly one worker; read-only ones are open in all. When a client has chosen
its export, its socket goes to a worker with that export (`channel`), and from then on the two
talk to each other alone. Only of an encrypted client the bytes still come by here (`relay`).

A worker that ends unexpectedly is started again; its clients are cut off, those of
other workers notice nothing. What a killed server leaves behind is dealt with when its
images are opened again, by the redo log as after any kill.
"""

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Coroutine, Iterable
from contextlib import suppress
from functools import partial
from itertools import count
from typing import Any, Final

import structlog
from structlog.typing import FilteringBoundLogger

import nbdserve
from nbdserve.errors import ImageError, ProtocolError
from nbdserve.exports.export import Export
from nbdserve.exports.once import Once
from nbdserve.server.channel import (
    Answer,
    Begin,
    Call,
    Channel,
    Facts,
    Gone,
    LetGo,
    Serve,
)
from nbdserve.server.limits import Limits
from nbdserve.server.line import Line
from nbdserve.server.negotiation import Chosen
from nbdserve.server.relay import PIECE, Relay
from nbdserve.server.server import Served, Server
from nbdserve.server.stall import PeerWatch
from nbdserve.wire.constants import TransmissionFlag
from nbdserve.wire.handshake import ExportInfo

#: Between the end of a worker and its next start; twice as long each time that it lived
#: for less than `_PROVEN_S`.
_PAUSE_S: Final = 0.1
_LONGEST_PAUSE_S: Final = 10.0
_PROVEN_S: Final = 30.0
#: Who does not answer for so long gets no clients that another one can serve.
_PATIENCE_S: Final = 0.5
#: What the service manager means for this process alone.
_OURS_ALONE: Final = frozenset(
    {"NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "LISTEN_FDS", "LISTEN_PID"}
)
#: Not `-m`, which looks for modules in the current folder first, where images may be. Our own
#: package is the one that runs here, installed or not; what lies beside it comes last.
_BEGIN: Final = (
    "import sys; folder = sys.argv.pop(1); sys.path.insert(0, folder); import nbdserve;"
    " sys.path.append(sys.path.pop(0)); from nbdserve.worker import main; sys.exit(main())"
)
_PACKAGE_FOLDER: Final = os.path.dirname(
    os.path.dirname(os.path.abspath(nbdserve.__file__))
)
#: The flags of an interpreter that concern where modules come from and how they run.
_FLAGS: Final = {
    "isolated": "I",
    "ignore_environment": "E",
    "no_user_site": "s",
    "no_site": "S",
    "dont_write_bytecode": "B",
    "optimize": "O",
}


def _python() -> list[str]:
    """Return how to start the interpreter that runs here, safe from the current folder."""
    given = ((letter, getattr(sys.flags, flag)) for flag, letter in _FLAGS.items())
    return [
        sys.executable,
        "-P",
        *(f"-{letter * times}" for letter, times in given if times),
        *(f"-W{option}" for option in sys.warnoptions),
        *(
            f"-X{name}" if value is True else f"-X{name}={value}"
            for name, value in sys._xoptions.items()  # noqa: SLF001 -- documented
        ),
    ]


class Worker:
    """One worker process, started again when it ends before its time.

    Attributes:
        number: From 0 on, for logs.
        clients: Those it serves, by the numbers that stand for them in messages.
        opened: What is open in it.
        silent: Whether it was asked if it is there, and has not answered yet.
    """

    def __init__(self, number: int, begin: Begin) -> None:
        self.number = number
        self.clients: dict[int, HandedOver] = {}
        self.opened: set[DistantExport] = set()
        self.silent = False
        self._begin = begin
        self._log = structlog.get_logger().bind(worker=number)
        self._calls: dict[int, tuple[str, DistantExport, asyncio.Future[None]]] = {}
        self._numbers = count(1)
        self._running = asyncio.Event()
        self._heard = asyncio.Event()
        self._asked_s: float | None = None  # whether it is there
        self._stopping = False
        self._pause_s = _PAUSE_S
        self._restart: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the process.

        Raises:
            OSError: It can't be started.
        """
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                self._process = await asyncio.create_subprocess_exec(
                    *_python(),
                    "-c",
                    _BEGIN,
                    _PACKAGE_FOLDER,
                    str(theirs.fileno()),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    env={k: v for k, v in os.environ.items() if k not in _OURS_ALONE},
                    pass_fds=(theirs.fileno(),),
                    start_new_session=True,  # Ctrl-C is for us
                )
            except BaseException:
                ours.close()
                raise
        self._started_s = loop.time()
        self._channel = Channel(loop, ours, self._on_message, self._on_end)
        self._channel.send(self._begin)
        self._running.set()

    async def call(self, what: str, export: "DistantExport") -> None:
        """Have an export opened, flushed or closed; wait for the process if need be.

        Raises:
            ConfigError: The path can't be opened.
            ImageError: The image can't be used, or the worker has ended.
            OSError: Something could not be made durable.
        """
        await self._running.wait()
        number = next(self._numbers)
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        image = export.image if what == "open" else None
        try:
            self._channel.send(Call(number, what, export.name, image))
        except OSError as error:
            raise ImageError(
                f"the export {export.name!r}: what is configured for it does not fit"
                f" into a message to a worker: {error.strerror}"
            ) from error
        self._calls[number] = (what, export, answer)
        await answer

    async def answers(self) -> bool:
        """Tell whether the process is there and not stuck."""
        if self._running.is_set() and self._asked_s is None:
            self._asked_s = asyncio.get_running_loop().time()
            self._heard.clear()
            self._channel.send(Call(0, "answer", ""))
        if self._asked_s is not None:
            try:
                async with asyncio.timeout_at(self._asked_s + _PATIENCE_S):
                    await self._heard.wait()
            except TimeoutError:
                self.silent = True
        return self._running.is_set() and not self.silent

    def serve(self, client: "HandedOver", message: Serve, fd: int) -> bool:
        """Hand a client over; False if there is no worker just now.

        Raises:
            OSError: It can't be handed over.
        """
        if not self._running.is_set():
            return False
        self._channel.send(message, fd)
        self.clients[message.number] = client
        return True

    def let_go(self, number: int, *, at_once: bool = False) -> None:
        """Have the connection of a client ended."""
        if number in self.clients:
            self._channel.send(LetGo(number, at_once))

    def next_number(self) -> int:
        """Return a number that stands for nothing yet."""
        return next(self._numbers)

    async def stop(self, timeout_s: float) -> None:
        """Let the process end; it closes what is still open."""
        self._stopping = True
        if self._restart is not None:
            self._restart.cancel()
            with suppress(asyncio.CancelledError):
                await self._restart
        if not self._running.is_set():
            return
        self._channel.close()
        try:
            async with asyncio.timeout(timeout_s):
                await self._process.wait()
        except TimeoutError:
            self._log.error("a worker did not end and is killed")
            self._process.kill()
            await self._process.wait()

    def _hear(self) -> None:
        self.silent = False
        self._asked_s = None
        self._heard.set()

    def _on_message(self, message: object, _fds: list[int]) -> None:
        self._hear()
        if isinstance(message, Gone):
            client = self.clients.pop(message.number, None)
            if client is not None:
                client.gone(message)
        elif isinstance(message, Answer) and message.number in self._calls:
            what, export, answer = self._calls.pop(message.number)
            # here, as whoever asked may have given up
            if what == "close":
                self.opened.discard(export)
            elif message.outcome is not None:
                self.opened.add(export)
                export.facts = message.outcome
            if answer.done():
                return
            if message.error is not None:
                answer.set_exception(message.error)
            else:
                answer.set_result(None)

    def _on_end(self) -> None:
        """The process has ended: tell everybody who counts on it, and start another."""
        self._running.clear()
        self._hear()
        self.opened.clear()
        calls, self._calls = self._calls, {}
        for _, _, answer in calls.values():
            if not answer.done():
                answer.set_exception(ImageError("the worker process has ended"))
        clients, self.clients = self.clients, {}
        for client in clients.values():
            client.lost()
        if not self._stopping:
            self._restart = asyncio.get_running_loop().create_task(
                self._start_again(len(clients))
            )

    async def _start_again(self, clients: int) -> None:
        loop = asyncio.get_running_loop()
        status = await self._process.wait()
        self._log.error(
            "a worker has ended and is started again", status=status, clients=clients
        )
        proven = loop.time() - self._started_s > _PROVEN_S
        pause_s = _PAUSE_S if proven else self._pause_s
        self._pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        while not self._running.is_set():
            await asyncio.sleep(pause_s)
            try:
                await self.start()
            except OSError as error:
                self._log.error("a worker can't be started", error=error.strerror)
                pause_s = _LONGEST_PAUSE_S


class Crew:
    """All workers.

    Attributes:
        workers: By number.
        server: What accepts clients for them.
    """

    def __init__(self, size: int, begin: Begin) -> None:
        """Start nothing yet."""
        self.server = Front
        self.workers = [Worker(number, begin) for number in range(size)]
        self._next = 0

    async def start(self) -> None:
        """Start all.

        Raises:
            OSError: One can't be started; then none goes on.
        """
        try:
            for worker in self.workers:
                await worker.start()
        except BaseException:
            await self.stop(timeout_s=1.0)
            raise

    def export(
        self, name: str, description: str, image: Any, *, shared: bool
    ) -> "DistantExport":
        """Make an export of an image, not open yet.

        Args:
            name: The export's.
            description: The same.
            image: The configuration of the image, for the worker: what is the same for all
                clients.
            shared: Whether every worker may have it open, as nobody writes.
        """
        if shared:
            return DistantExport(name, description, image, self.workers)
        self._next += 1
        owner = self.workers[self._next % len(self.workers)]
        return DistantExport(name, description, image, [owner])

    async def stop(self, timeout_s: float) -> None:
        """Let all processes end."""
        await asyncio.gather(*(worker.stop(timeout_s) for worker in self.workers))


class DistantExport(Export):
    """An export whose disk is open in one worker, or in each if it is read-only.

    Attributes:
        places: The workers.
        image: The configuration of the image.
        facts: What a worker has said of the disk; all say the same.
    """

    facts: Facts | None = None

    def __init__(
        self, name: str, description: str, image: Any, places: list[Worker]
    ) -> None:
        self.name = name
        self.description = description
        self.clients = 0
        self.change = asyncio.Lock()
        self.places = places
        self.image = image
        self._openings = {
            worker: Once(partial(self._open_in, worker)) for worker in places
        }

    @property
    def is_open(self) -> bool:
        """The disk is in another process."""
        return False

    @property
    def size(self) -> int | None:
        """Bytes, once a worker has said so."""
        return None if self.facts is None else self.facts.read_write.size

    @property
    def read_only(self) -> bool:
        """Whether it is known that nobody can write."""
        flags = self.facts.read_write.transmission_flags if self.facts else 0
        return bool(flags & TransmissionFlag.READ_ONLY)

    async def open(self) -> None:
        """Have it opened in all its workers.

        Raises:
            ConfigError: The image's path can't be opened.
            ImageError: It can't be used.
        """
        await _all(self._openings[worker].done() for worker in self._where_closed())

    async def ready(self) -> None:
        """Have it open in a worker, which is not stuck if it can be helped."""
        pending = {self._openings[worker].begin() for worker in self._where_closed()}
        while pending and not self._where_open():
            done, pending = await asyncio.wait(
                pending, return_when=asyncio.FIRST_COMPLETED
            )
            if not pending:
                for opening in done:
                    opening.result()
        if len(self.places) > 1:
            for _ in self.places:
                if await self.place().answers():
                    break

    async def _open_in(self, worker: Worker) -> None:
        if not self.retired:
            await worker.call("open", self)

    async def flush(self) -> None:
        """Make everything durable that was written."""
        if not self.retired:  # otherwise it is being closed
            await _all(worker.call("flush", self) for worker in self._where_open())

    async def close(self) -> None:
        """Close the disk in each worker."""
        self.retired = True
        await _all(self._close_in(worker) for worker in self.places)

    async def _close_in(self, worker: Worker) -> None:
        await self._openings[worker].ended()
        if self in worker.opened:
            await worker.call("close", self)

    def _where_open(self) -> list[Worker]:
        return [worker for worker in self.places if self in worker.opened]

    def _where_closed(self) -> list[Worker]:
        return [worker for worker in self.places if self not in worker.opened]

    def info(self, *, read_only: bool = False) -> ExportInfo:
        """Return what a worker has said, under the description of today."""
        if self.facts is None:
            raise ImageError(f"the export {self.name!r} is not open yet")
        found = self.facts.read_only if read_only else self.facts.read_write
        return ExportInfo(
            name=self.name,
            size=found.size,
            transmission_flags=found.transmission_flags,
            description=self.description,
            minimum_block=found.minimum_block,
            preferred_block=found.preferred_block,
            maximum_payload=found.maximum_payload,
            meta_contexts=found.meta_contexts,
        )

    def place(self) -> Worker:
        """Return the worker for the next client: of those that can, the one with the fewest."""
        return min(
            self.places,
            key=lambda worker: (
                worker.silent or self not in worker.opened,
                len(worker.clients),
            ),
        )


async def _all(work: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Do some things side by side, all of them to the end, and raise the first error."""
    for outcome in await asyncio.gather(*work, return_exceptions=True):
        if outcome is not None:
            raise outcome


class HandedOver(Served):
    """A client that a worker serves."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        line: Line,
        chosen: Chosen,
        limits: Limits,
        memory: memoryview,
        log: FilteringBoundLogger,
    ) -> None:
        """`memory` is that of all relays."""
        if not isinstance(chosen.export, DistantExport):
            raise TypeError(f"{chosen.export.name}: is not an export of a worker")
        self.closed: asyncio.Future[str] = loop.create_future()
        self.blame: ProtocolError | None = None
        self._loop = loop
        self._line = line
        self._chosen = chosen
        self._watch = PeerWatch(limits, loop.time())
        self._memory = memory
        self._log = log
        self._worker = chosen.export.place()
        self._number = self._worker.next_number()
        self._story: dict[str, int] = {}
        self._relay: Relay | None = None
        self._reason = ""

    @property
    def in_flight(self) -> int:
        """Only the worker knows."""
        return 0

    @property
    def story(self) -> dict[str, int]:
        """What the worker has told."""
        return self._story

    def start(self, leftover: bytes) -> None:
        """Hand over the socket, or our end of a pair for what is decrypted."""
        chosen, line = self._chosen, self._line
        message = Serve(
            self._number,
            chosen.export.name,
            chosen.access,
            chosen.negotiated,
            leftover,
            line.client,
            line.peer,
        )
        try:
            taken = self._hand_over(message)
        except OSError as error:
            self._log.warning("could not hand a client over", error=error.strerror)
            taken = False
        if not taken:
            self._end("no worker has taken it")

    def _hand_over(self, message: Serve) -> bool:
        line = self._line
        plain = line.plain
        if plain is not None:
            taken = self._worker.serve(self, message, plain.fileno())
            line.close()  # the end of it is the worker's to say
            return taken
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                taken = self._worker.serve(self, message, theirs.fileno())
            except OSError:
                ours.close()
                raise
        self._relay = Relay(self._loop, line.sock, ours, self._memory)
        return taken

    def gone(self, message: Gone) -> None:
        """The worker tells the end of the story."""
        self._story = message.story
        if message.blame is not None:
            self.blame = ProtocolError(message.blame)
        self._end(message.reason)

    def lost(self) -> None:
        """The worker is gone."""
        self._end("the worker has ended")

    def shut_down(self) -> None:
        """Have the client let go politely."""
        self._worker.let_go(self._number)

    def abort(self) -> None:
        """Have the connection ended at once; nothing is waited for any longer."""
        self._break_off("server shutting down")

    def end_if_stalled(self) -> None:
        """Close if the client does not take what it is sent.

        The worker looks after everything else. It may be gone, or think that all is sent.
        """
        if self._relay is not None:
            reason = self._watch.stall(
                self._loop.time(),
                held=self._relay.held,
                moved=self._relay.moved,
                memory_is_short=False,
            )
            if reason is not None:
                self.blame = ProtocolError(reason)
                self._break_off(reason)

    def _break_off(self, reason: str) -> None:
        self._worker.let_go(self._number, at_once=True)
        if self._relay is not None:
            self._relay.ended.cancel()
        self._end(reason)

    def _end(self, reason: str) -> None:
        self._reason = reason
        if self._relay is None:
            self._close()
        else:  # the last replies may still be on their way
            self._relay.ended.add_done_callback(self._close)

    def _close(self, _relay: object = None) -> None:
        if not self.closed.done():
            self.closed.set_result(self._reason)


class Front(Server):
    """A server that leaves transmission to workers."""

    def start(self) -> None:
        """See `Server.start`."""
        self._relay_memory = memoryview(bytearray(PIECE))
        super().start()

    def _connect(self, line: Line, chosen: Chosen, log: FilteringBoundLogger) -> Served:
        """Prepare the handing over of a client."""
        return HandedOver(
            self._loop, line, chosen, self._limits, self._relay_memory, log
        )
