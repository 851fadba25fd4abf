"""Tell systemd how the service is doing: sd_notify(3), without its library."""

import asyncio
import os
import socket
import time

import structlog


def notify(*lines: str) -> bool:
    """Send lines such as `READY=1` to the service manager.

    Returns:
        Whether there is a service manager that took them.
    """
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC
    with socket.socket(socket.AF_UNIX, kind) as sock:
        try:
            sock.connect(address)
            sock.sendall("\n".join(lines).encode())
        except OSError as error:
            # the manager is in trouble, not the disks
            structlog.get_logger().warning("sd_notify failed", error=str(error))
            return False
    return True


def notify_ready(status: str) -> bool:
    """Say that clients can connect; `status` is a line for `systemctl status`."""
    return notify("READY=1", f"STATUS={status}")


def notify_stopping() -> bool:
    """Say that the service is shutting down."""
    return notify("STOPPING=1")


def notify_reloading() -> bool:
    """Say that a reload has begun; `notify_ready` ends it (Type=notify-reload)."""
    now_us = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    return notify("RELOADING=1", f"MONOTONIC_USEC={now_us}")


def watchdog_interval_s() -> float | None:
    """Return how often the watchdog wants to hear of us; None if there is none.

    Half of WATCHDOG_USEC, as sd_watchdog_enabled(3) recommends.
    """
    pid = os.environ.get("WATCHDOG_PID")
    interval = os.environ.get("WATCHDOG_USEC", "")
    if not interval.isdigit() or int(interval) == 0:
        return None
    if pid and pid != str(os.getpid()):
        return None
    return int(interval) / 1e6 / 2


async def feed_watchdog(interval_s: float) -> None:
    """Prove again and again that the loop turns; cancel to stop."""
    while True:
        notify("WATCHDOG=1")
        await asyncio.sleep(interval_s)
