"""The composition root: the one place that builds objects from configuration.

Everything that can be refused is refused before anything can be seen: first the
addresses are bound (clients wait in the backlog), then images are made and opened.
Whatever fails, all that was begun is undone.
"""

import asyncio
import contextlib
import os
import resource
import signal
import socket
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Final

import structlog
import uvloop

from nbdserve.config.model import DEFAULT_PORT, ImageConfig, ServeConfig
from nbdserve.errors import ConfigError, ImageError, explain
from nbdserve.exports.access import Policy
from nbdserve.exports.closing import close_all, flush_all
from nbdserve.exports.export import Export
from nbdserve.exports.late import LateExport
from nbdserve.exports.opening import open_disk, open_export
from nbdserve.exports.registry import Registry
from nbdserve.observe.streams import point_to_nowhere
from nbdserve.server.limits import Limits, changed
from nbdserve.server.listeners import (
    Endpoint,
    Listener,
    activated_listeners,
    listen_tcp,
    listen_unix,
    listen_vsock,
)
from nbdserve.server.notify import notify_ready, notify_reloading
from nbdserve.server.server import Server
from nbdserve.server.tls import TlsCredentials
from nbdserve.storage.names import shown

if TYPE_CHECKING:  # what few servers need is imported by those
    from nbdserve.server.kernel import KernelDevice
    from nbdserve.server.workers import Crew

#: Makes the export of an image for a folder of redo records.
Offer = Callable[[ImageConfig, Policy, str | None], Awaitable[Export]]
#: Of the control socket: whoever may write to it owns all the disks.
_CONTROL_MODE: Final = 0o600


@dataclass(frozen=True, slots=True)
class ServedImage:
    """An export, as the operator is told about it; no size if it is not open yet."""

    name: str
    path: str
    size: int | None
    read_only: bool


@dataclass(frozen=True, slots=True)
class Serving:
    """What runs now, and where clients find it.

    Attributes:
        images: In the order of the command line.
        endpoints: At least one.
        activated: Whether whoever started us made the sockets.
        tls_required: Whether plain connections are refused.
    """

    images: tuple[ServedImage, ...]
    endpoints: tuple[Endpoint, ...]
    activated: bool
    tls_required: bool = False


def serve(
    config: ServeConfig,
    announce: Callable[[Serving], None],
    reread: Callable[[], ServeConfig] | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT; a second one ends the process at once.

    SIGHUP makes everything that was written durable, and reads certificates and the
    configuration again.

    Args:
        config: What to serve, and where.
        announce: Called once clients can connect.
        reread: Returns what to serve from now on.

    Raises:
        ConfigError: An address or a path can't be used.
        ImageError: An image can't be used; at the end: could not be closed cleanly.
        OSError: At the end: something could not be made durable.
    """
    _allow_many_files()
    activated = activated_listeners()
    _judge_activation(config, activated)
    # what can be wrong with these is refused before anything is made
    credentials = TlsCredentials(config.tls)
    limits = changed(Limits(), config.limits)
    client = _stdin_client() if config.stdio else None
    listeners = activated or ([] if config.stdio else _listen(config))
    control: Listener | None = None
    try:
        if config.control is not None:
            control = listen_unix(config.control, _CONTROL_MODE)
        parts = _Parts(credentials, limits, reread or (lambda: config), control)
        made = _create(config)
        quiet = bool(activated or client)
        uvloop.run(
            _serve(config, parts, listeners, client, announce, made=made, quiet=quiet)
        )
    finally:
        for listener in (*listeners, *([] if control is None else [control])):
            listener.close()


def _allow_many_files() -> None:
    """Raise the soft limit of file descriptors, 1024 by tradition, to the hard one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # not allowed here: fewer clients
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@dataclass(frozen=True, slots=True)
class _Parts:
    """What is made of a configuration before the loop runs."""

    credentials: TlsCredentials
    limits: Limits
    reread: Callable[[], ServeConfig]
    control: Listener | None


async def _serve(  # noqa: PLR0913
    config: ServeConfig,
    parts: _Parts,
    listeners: list[Listener],
    client: socket.socket | None,
    announce: Callable[[Serving], None],
    *,
    made: bool,
    quiet: bool,
) -> None:
    stop, hung_up = asyncio.Event(), asyncio.Event()
    _stop_on_signals(stop)
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, hung_up.set)
    async with _workers(config, parts) as crew:
        offer = partial(_offer, crew, late=config.open == "use")
        close_timeout_s = parts.limits.close_timeout_s
        registry = await _open_unless(stop, config, offer, close_timeout_s)
        if registry is None:
            return
        if not made:
            _note_another_size(config, registry)
        server = (Server if crew is None else crew.server)(
            registry,
            listeners,
            parts.limits,
            parts.credentials,
            at_once=config.at_once,
        )
        if not config.persistent:
            server.on_last_client_gone = stop.set
        if config.at_once == 1:
            for export in registry:
                export.multi_conn = False
        reload = Reload(
            config,
            parts.reread,
            server,
            parts.credentials,
            offer,
            close_timeout_s=close_timeout_s,
        )
        server.start()
        if parts.control is not None:
            await _start_control(parts.control, server, reload)
        device = None if config.device is None else _device(server, config.device)
        try:
            if device is not None:
                await device.attach(config.images[0].name)
            required = config.tls.mode == "require"
            images = _served(config.images, registry)
            announce(Serving(images, tuple(server.endpoints), quiet, required))
        except BaseException:
            await server.shut_down()
            if device is not None:
                await device.detach()
            raise
        if client is not None:
            only = server.welcome(client, client.getpeername())
            only.add_done_callback(lambda _: stop.set())
        reload.on_hangup(at_once=hung_up.is_set())
        try:
            await server.serve_until(stop)
        finally:
            if device is not None:
                await device.detach()  # with everything in flight answered
            await reload.end()


def _device(server: Server, number: int) -> "KernelDevice":
    from nbdserve.server.kernel import KernelDevice  # noqa: PLC0415

    return KernelDevice(server, number)


def _served(
    images: Sequence[ImageConfig], registry: Registry
) -> tuple[ServedImage, ...]:
    return tuple(
        ServedImage(
            image.name, image.path, export.size, image.reads_only or export.read_only
        )
        for image, export in zip(images, registry, strict=True)
    )


async def _start_control(listener: Listener, server: Server, reload: "Reload") -> None:
    """Let the operator in; the end of the server is that of the control socket too."""
    # takes as long to import as all the rest, and few servers need it
    from nbdserve.control.http import ControlServer  # noqa: PLC0415
    from nbdserve.control.operations import Operations  # noqa: PLC0415

    operations = Operations(server, reload.path_of, reload.reopen)
    control = ControlServer(listener, operations)
    server.on_end = control.close
    await control.start()


def _stdin_client() -> socket.socket:
    """Take the client that inetd, or whoever started us, has connected to stdin.

    Raises:
        ConfigError: There is none.
    """
    fd = os.dup(0)
    try:
        client = socket.socket(fileno=fd)
        client.getpeername()
    except OSError as error:
        os.close(fd)
        raise ConfigError("--stdio: stdin is not a connected socket") from error
    # the client has to see the end when we close, and no words of ours
    point_to_nowhere(0)
    point_to_nowhere(1)
    return client


def _judge_activation(config: ServeConfig, activated: list[Listener]) -> None:
    if activated and (config.listen or config.unix or config.vsock or config.stdio):
        raise ConfigError(
            "systemd has handed over the sockets to listen on: remove --listen and"
            " --unix, or add the address to the socket unit"
        )


def _listen(config: ServeConfig) -> list[Listener]:
    """Bind all addresses, or none.

    Raises:
        ConfigError: One can't be used.
    """
    listeners: list[Listener] = []
    try:
        for address in config.listen:
            listeners += listen_tcp(address.host, address.port)
        for path in config.unix:
            listeners.append(listen_unix(path, config.unix_mode))
        listeners += [listen_vsock(place.cid, place.port) for place in config.vsock]
        if not listeners and config.device is None:
            listeners += listen_tcp(config.default_host, DEFAULT_PORT)
    except BaseException:
        for listener in listeners:
            listener.close()
        raise
    return listeners


def _create(config: ServeConfig) -> bool:
    """Make the image of `--create` if it is missing.

    Returns:
        Whether it was made now.

    Raises:
        ConfigError: It can't be made.
    """
    if config.create_size is None:
        return False  # a configuration file need not have any exports yet
    path = config.images[0].path
    if os.path.lexists(path):
        return False
    if config.images[0].secret_files:
        raise ConfigError(
            f"{shown(path)}: --create would make an image that is not encrypted; use"
            " nbdserve image create --encryption luks"
        )
    from nbdserve.formats.create import create_image  # noqa: PLC0415

    create_image(path, config.create_size, format=config.images[0].format or "qcow2")
    return True


def _note_another_size(config: ServeConfig, registry: Registry) -> None:
    """Say so where `--create` found an image of another size."""
    for export in registry:
        if config.create_size is not None and export.size not in {
            None,
            config.create_size,
        }:
            structlog.get_logger().warning(
                "the image exists with another size and is left as it is",
                image=shown(config.images[0].path),
                size=export.size,
                create=config.create_size,
            )


@contextlib.asynccontextmanager
async def _workers(config: ServeConfig, parts: _Parts) -> AsyncIterator["Crew | None"]:
    """Have the processes that serve, if it is not this one.

    Raises:
        ConfigError: They can't be started.
    """
    if config.workers == 1:
        yield None
        return
    from nbdserve.server.channel import Begin  # noqa: PLC0415
    from nbdserve.server.workers import Crew  # noqa: PLC0415

    state_dir = _state_dir(config, os.environ)
    begin = Begin(parts.limits, state_dir, config.log_format, config.log_level)
    crew = Crew(config.workers, begin)
    try:
        await crew.start()
    except OSError as error:
        raise ConfigError(f"--workers: can't start them: {error.strerror}") from error
    try:
        yield crew
    finally:
        await crew.stop(parts.limits.close_timeout_s)


async def _offer(
    crew: "Crew | None",
    image: ImageConfig,
    policy: Policy,
    state_dir: str | None,
    *,
    late: bool,
) -> Export:
    """Make the export of an image, which is opened here, in a worker, or later.

    Raises:
        ConfigError: Its path can't be opened.
        ImageError: It can't be used.
    """
    if crew is not None:
        distant = crew.export(
            image.name, image.description, _disk_of(image), shared=image.reads_only
        )
        distant.policy = policy
        if not late:
            try:
                await distant.open()
            except (ConfigError, ImageError):
                with contextlib.suppress(OSError, ImageError):
                    await distant.close()  # some workers may have it open
                raise
        return distant
    opening = partial(open_export, image, policy, state_dir)
    if not late:
        return await opening()
    export = LateExport(image.name, image.description, opening)
    export.policy = policy
    return export


async def _open_unless(
    stop: asyncio.Event, config: ServeConfig, offer: Offer, close_timeout_s: float
) -> Registry | None:
    """Open every image, or none if the server is to end before that.

    Raises:
        ConfigError: A path can't be opened.
        ImageError: An image can't be used.
    """
    opening = asyncio.create_task(_open_exports(config, offer, close_timeout_s))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait([opening, stopping], return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not stop.is_set():
        return await opening
    _, late = await asyncio.wait([opening], timeout=close_timeout_s)
    if late:
        structlog.get_logger().error("gave up on opening", seconds=close_timeout_s)
        opening.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await opening
    else:
        await _close(await opening, close_timeout_s)
    return None


async def _open_exports(
    config: ServeConfig, offer: Offer, close_timeout_s: float
) -> Registry:
    """Open every image, or none.

    Raises:
        ConfigError: A path can't be opened.
        ImageError: An image can't be used.
    """
    registry = Registry()
    state_dir = _state_dir(config, os.environ)
    _require_different(config.images)
    try:
        for image in config.images:
            policy = _policy(image)
            registry.add(await offer(image, policy, state_dir))
    except BaseException:
        await _close(registry, close_timeout_s)
        raise
    return registry


def _require_different(images: Sequence[ImageConfig]) -> None:
    """Refuse two exports of one file of which one may be written.

    Raises:
        ConfigError: Names both; the file's lock would only speak of "another process".
    """
    seen: dict[tuple[int, int], ImageConfig] = {}
    for image in images:
        try:
            status = os.stat(image.path)
        except OSError:
            continue  # opening it says what is wrong
        other = seen.setdefault((status.st_dev, status.st_ino), image)
        if other is image or (other.leaves_alone and image.leaves_alone):
            continue
        raise ConfigError(
            f"{shown(image.path)} is the same file as {shown(other.path)}, served as"
            f" {other.name!r}: several exports of it must all be read-only"
        )


def _policy(image: ImageConfig) -> Policy:
    """Return who may use an export.

    Raises:
        ConfigError: A rule is for a user that doesn't exist.
    """
    return Policy.of(image.access, tls_only=image.tls_only)


async def _close(registry: Registry, timeout_s: float) -> None:
    """Close devices that nobody has used; the error that led here comes first."""
    for export, error in (await close_all(registry, timeout_s)).items():
        structlog.get_logger().error(
            "could not close an image cleanly", export=export.name, error=explain(error)
        )


def _state_dir(config: ServeConfig, environment: Mapping[str, str]) -> str | None:
    """Return the folder for redo records; None if there is none.

    Raises:
        ConfigError: The operator's choice is no folder that can be written.
    """
    if config.state_dir is not None:
        if not os.path.isdir(config.state_dir):
            raise ConfigError(f"--state-dir {shown(config.state_dir)}: is not a folder")
        if not os.access(config.state_dir, os.W_OK | os.X_OK):
            raise ConfigError(
                f"--state-dir {shown(config.state_dir)}: can't be written"
            )
        return config.state_dir
    return default_state_dir(environment)


def default_state_dir(environment: Mapping[str, str]) -> str | None:
    """Return the folder for redo records if nobody names one; None if there is none."""
    # systemd separates several RuntimeDirectory= by colons
    candidates = [
        *environment.get("RUNTIME_DIRECTORY", "").split(":"),
        environment.get("XDG_RUNTIME_DIR", ""),
    ]
    for folder in candidates:
        if folder and os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK):
            return folder
    if _in_container(environment):
        return None  # its /dev/shm ends with it, and what was answered must not
    # tmpfs on every Linux; what others may do to it is looked at before it is used
    return _own_folder(f"/dev/shm/nbdserve-{os.getuid()}")  # noqa: S108


def _in_container(environment: Mapping[str, str]) -> bool:
    """Tell whether all tmpfs around may vanish when this process is restarted."""
    return (
        os.getpid() == 1
        or "container" in environment
        or "KUBERNETES_SERVICE_HOST" in environment
        or os.path.exists("/.dockerenv")
        or os.path.exists("/run/.containerenv")
    )


def _own_folder(path: str) -> str | None:
    """Make a folder that only this user can use; None if there can't be one.

    Everybody may write in its parent, so what is there already is not trusted: it
    must be a folder (no link), ours, and closed to others.
    """
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
        status = os.lstat(path)
    except OSError:
        return None
    ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
    return path if ours and not status.st_mode & 0o077 else None


def _stop_on_signals(stop: asyncio.Event) -> None:
    """Let the first SIGTERM or SIGINT set `stop`, and the second end the process."""
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        stop.set()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)


class Reload:
    """What SIGHUP does: flush, read again, and change what is served.

    One after the other. Clients of exports that stay as they are notice nothing.
    """

    def __init__(
        self,
        config: ServeConfig,
        reread: Callable[[], ServeConfig],
        server: Server,
        credentials: TlsCredentials,
        offer: Offer,
        *,
        close_timeout_s: float,
    ) -> None:
        self._offer = offer
        self._close_timeout_s = close_timeout_s
        self._config = config
        self._reread = reread
        self._server = server
        self._credentials = credentials
        self._images = {image.name: image for image in config.images}
        self._turn = asyncio.Lock()
        self._under_way: set[asyncio.Task[None]] = set()
        self._log = structlog.get_logger()

    def on_hangup(self, *, at_once: bool) -> None:
        """Reload with each SIGHUP; `at_once` if there was one before."""
        loop = asyncio.get_running_loop()

        def reload() -> None:
            task = loop.create_task(self._reload())
            self._under_way.add(task)
            task.add_done_callback(self._under_way.discard)

        loop.add_signal_handler(signal.SIGHUP, reload)
        if at_once:
            reload()

    def path_of(self, name: str) -> str:
        """Return the image of an export as the operator wrote it."""
        image = self._images.get(name)
        return "" if image is None else image.path

    async def reopen(self, export: Export) -> None:
        """Open the disk of an export anew; see `Server.exchange_disk`."""
        image = self._images.get(export.name)
        if image is None:
            raise ConfigError(f"the export {export.name!r} has just been removed")
        if image.scratch is not None:
            raise ConfigError(
                f"the export {export.name!r} keeps what is written in a temporary file,"
                " which reopening would lose"
            )
        state_dir = _state_dir(self._config, os.environ)
        await self._server.exchange_disk(export, lambda: open_disk(image, state_dir))

    async def end(self) -> None:
        """Wait for what is under way, and give up on what takes too long."""
        timeout_s = self._close_timeout_s
        if self._under_way:
            _, late = await asyncio.wait(self._under_way, timeout=timeout_s)
            for task in late:
                self._log.error("gave up on a reload", seconds=timeout_s)
                task.cancel()

    async def _reload(self) -> None:
        async with self._turn:
            if self._server.stopping:
                return
            notify_reloading()
            await self._flush()
            try:
                config = self._reread()
                _require_different(config.images)
                policies = {image.name: _policy(image) for image in config.images}
                state_dir = _state_dir(config, os.environ)
                self._credentials.replace(config.tls)
            except ConfigError as error:
                self._log.error("reload failed, nothing is changed", error=str(error))
            else:
                await self._apply(config, policies, state_dir)
            notify_ready(f"Serving {len(self._server.registry)} export(s)")

    async def _flush(self) -> None:
        exports = list(self._server.registry)
        for export, error in (await flush_all(exports, self._close_timeout_s)).items():
            self._log.error("could not flush", export=export.name, error=explain(error))
        self._log.info("flushed", exports=len(exports))

    async def _apply(
        self, config: ServeConfig, policies: dict[str, Policy], state_dir: str | None
    ) -> None:
        """Change what is served; one export that fails leaves the others alone."""
        self._warn_of_the_rest(config)
        wanted = {image.name: image for image in config.images}
        gone = [
            name
            for name, image in self._images.items()
            if name not in wanted or _disk_of(wanted[name]) != _disk_of(image)
        ]
        await asyncio.gather(*(self._withdraw(name) for name in gone))
        for name, image in wanted.items():
            if name in self._images:
                await self._change(image, policies[name])
            else:
                await self._add(image, policies[name], state_dir)
        self._config = config
        self._log.info("reloaded", exports=len(self._server.registry))

    def _warn_of_the_rest(self, config: ServeConfig) -> None:
        kept = (
            "listen",
            "unix",
            "unix_mode",
            "vsock",
            "limits",
            "state_dir",
            "workers",
            "open",
            "control",
        )
        for what in kept:
            if getattr(config, what) != getattr(self._config, what):
                self._log.warning("changed at the next start only", what=what)

    async def _withdraw(self, name: str) -> None:
        del self._images[name]
        export = self._server.registry.get(name)
        if export is None:
            return
        try:
            await self._server.withdraw(export)
        except (OSError, ImageError) as error:
            self._log.error(
                "could not close an image cleanly", export=name, error=explain(error)
            )
        else:
            self._log.info("export removed", export=name)

    async def _change(self, image: ImageConfig, policy: Policy) -> None:
        export = self._server.registry.get(image.name)
        if export is not None:
            export.description, export.policy = image.description, policy
            self._images[image.name] = image
            await self._server.recheck(export)

    async def _add(
        self, image: ImageConfig, policy: Policy, state_dir: str | None
    ) -> None:
        try:
            export = await self._offer(image, policy, state_dir)
        except (ConfigError, ImageError, OSError) as error:
            self._log.error(
                "could not open an image", export=image.name, error=explain(error)
            )
            return
        if self._server.stopping:
            await export.close()
            return
        self._server.registry.add(export)
        self._images[image.name] = image
        self._log.info("export added", export=image.name)


def _disk_of(image: ImageConfig) -> ImageConfig:
    """Return what can't be changed while the image is open."""
    return replace(image, description="", access=(), tls_only=False)
