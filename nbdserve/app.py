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
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import structlog
import uvloop

from nbdserve.block.device import BlockDevice
from nbdserve.config.model import DEFAULT_PORT, ImageConfig, ServeConfig
from nbdserve.errors import ConfigError, ImageError
from nbdserve.exports.export import Export
from nbdserve.exports.registry import Registry
from nbdserve.formats.create import create_image
from nbdserve.formats.open import open_image
from nbdserve.server.limits import Limits, changed
from nbdserve.server.listeners import (
    Endpoint,
    Listener,
    activated_listeners,
    listen_tcp,
    listen_unix,
)
from nbdserve.server.notify import notify_ready, notify_reloading
from nbdserve.server.server import Server
from nbdserve.storage.names import shown

#: Where to listen if nobody says.
DEFAULT_HOST = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class ServedImage:
    """An open export, as the operator is told about it."""

    name: str
    path: str
    size: int
    read_only: bool


@dataclass(frozen=True, slots=True)
class Serving:
    """What runs now, and where clients find it.

    Attributes:
        images: In the order of the command line.
        endpoints: At least one.
        activated: Whether whoever started us made the sockets.
    """

    images: tuple[ServedImage, ...]
    endpoints: tuple[Endpoint, ...]
    activated: bool


def serve(config: ServeConfig, announce: Callable[[Serving], None]) -> None:
    """Serve until SIGTERM or SIGINT; a second one ends the process at once.

    SIGHUP makes everything that was written durable.

    Args:
        config: What to serve, and where.
        announce: Called once clients can connect.

    Raises:
        ConfigError: An address or a path can't be used.
        ImageError: An image can't be used; at the end: could not be closed cleanly.
        OSError: At the end: something could not be made durable.
    """
    _allow_many_files()
    activated = activated_listeners()
    _judge_activation(config, activated)
    listeners = activated or _listen(config)
    try:
        made = _create(config)
        uvloop.run(
            _serve(config, listeners, announce, made=made, activated=bool(activated))
        )
    finally:
        for listener in listeners:
            listener.close()


def _allow_many_files() -> None:
    """Raise the soft limit of file descriptors, 1024 by tradition, to the hard one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # not allowed here: fewer clients
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def _serve(
    config: ServeConfig,
    listeners: list[Listener],
    announce: Callable[[Serving], None],
    *,
    made: bool,
    activated: bool,
) -> None:
    stop = asyncio.Event()
    _stop_on_signals(stop)
    registry = await _open_exports(config)
    if stop.is_set():
        await _close(registry)
        return
    if not made:
        _note_another_size(config, registry)
    server = Server(registry, listeners, changed(Limits(), config.limits))
    flushes = _flush_on_hangup(registry)
    server.start()
    images = tuple(
        ServedImage(image.name, image.path, export.device.size, export.device.read_only)
        for image, export in zip(config.images, registry, strict=True)
    )
    try:
        announce(Serving(images, tuple(server.endpoints), activated))
    except BaseException:
        await server.shut_down()
        raise
    await server.serve_until(stop)
    await asyncio.gather(*flushes)


def _judge_activation(config: ServeConfig, activated: list[Listener]) -> None:
    if activated and (config.listen or config.unix):
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
            listeners.append(listen_unix(path))
        if not listeners:
            listeners += listen_tcp(DEFAULT_HOST, DEFAULT_PORT)
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
    path = config.images[0].path
    if config.create_size is None or os.path.lexists(path):
        return False
    create_image(path, config.create_size, format=config.format or "qcow2")
    return True


def _note_another_size(config: ServeConfig, registry: Registry) -> None:
    """Say so where `--create` found an image of another size."""
    for export in registry:
        if config.create_size not in {None, export.device.size}:
            structlog.get_logger().warning(
                "the image exists with another size and is left as it is",
                image=shown(config.images[0].path),
                size=export.device.size,
                create=config.create_size,
            )


async def _open_exports(config: ServeConfig) -> Registry:
    """Open every image, or none.

    Raises:
        ConfigError: A path can't be opened.
        ImageError: An image can't be used.
    """
    registry = Registry()
    state_dir = _state_dir(config, os.environ)
    try:
        for image in config.images:
            device = await _open(config, image, state_dir)
            for note in device.notes:
                structlog.get_logger().warning(note)
            registry.add(
                Export(
                    image.name,
                    device,
                    config.description,
                    allocation_depth=config.allocation_depth,
                    bitmaps=config.bitmaps,
                )
            )
    except BaseException:
        await _close(registry)
        raise
    return registry


async def _open(
    config: ServeConfig, image: ImageConfig, state_dir: str | None
) -> BlockDevice:
    return await open_image(
        image.path,
        format=config.format or "auto",
        read_only=config.read_only or config.snapshot is not None,
        allow_backing=config.allow_backing,
        cache=config.cache,
        state_dir=state_dir,
        snapshot=config.snapshot,
    )


async def _close(registry: Registry) -> None:
    """Close devices that nobody has used; the error that led here comes first."""
    for export in registry:
        try:
            await export.device.close()
        except (OSError, ImageError) as error:
            structlog.get_logger().error(
                "could not close an image cleanly",
                export=export.name,
                error=str(error),
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


def _flush_on_hangup(registry: Registry) -> set[asyncio.Task[None]]:
    """Let SIGHUP flush every export.

    Returns:
        The flushes under way.
    """
    loop = asyncio.get_running_loop()
    under_way: set[asyncio.Task[None]] = set()

    def on_hangup() -> None:
        task = loop.create_task(_flush(registry))
        under_way.add(task)
        task.add_done_callback(under_way.discard)

    loop.add_signal_handler(signal.SIGHUP, on_hangup)
    return under_way


async def _flush(registry: Registry) -> None:
    log = structlog.get_logger()
    notify_reloading()
    for export in registry:
        try:
            await export.device.flush()
        except (OSError, ImageError) as error:
            # no traceback: the error names the disk, and that is where it lies
            log.error("could not flush", export=export.name, error=str(error))  # noqa: TRY400
    log.info("flushed", exports=len(registry))
    notify_ready(f"Serving {len(registry)} export(s)")
