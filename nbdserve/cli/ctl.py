"""`nbdserve ctl`: change what a running server serves, through its control socket."""

import argparse
import json
import time
from typing import TYPE_CHECKING, Any

from nbdserve.cli.control_client import ControlClient
from nbdserve.cli.parser import one_of
from nbdserve.config.units import format_size, parse_size
from nbdserve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

TAKES = (
    "--control PATH list | resize|compact|reopen|flush EXPORT | snapshot VERB EXPORT"
)

DESCRIPTION = """\
Change what a running `nbdserve serve --control PATH` serves, while clients are
connected.

  list                         the exports: sizes, clients, and whether they are well
  resize EXPORT SIZE           another size: clients that are connected keep the one
                               they saw, new ones see the new one. A smaller one needs
                               --shrink, and that nobody is connected
  snapshot list EXPORT         the internal snapshots of a qcow2 image
  snapshot create EXPORT NAME  keep the disk as it is now
  snapshot delete EXPORT NAME  forget a snapshot
  compact EXPORT               move clusters from the end of a qcow2 image into free
                               space and cut the file; interrupt it as you like
  reopen EXPORT                close the image and open it anew, after a failed sync for
                               instance; clients stay, and wait meanwhile
  flush EXPORT                 make everything durable that was answered"""

EXAMPLES = """\
examples:
  nbdserve ctl --control /run/nbdserve/control.sock list
  nbdserve ctl --control /run/nbdserve/control.sock resize disk +10G
  nbdserve ctl --control /run/nbdserve/control.sock snapshot create disk before
  nbdserve ctl --control /run/nbdserve/control.sock compact disk
  curl --unix-socket /run/nbdserve/control.sock http://localhost/v1/exports"""

#: How often a compaction is asked how far it is.
_POLL_S = 0.1

_VERBS = ("list", "resize", "snapshot", "compact", "reopen", "flush")
_SNAPSHOT_VERBS = ("list", "create", "delete")


def define(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "--control",
        metavar="PATH",
        required=True,
        help="the control socket of the server",
    )
    parser.add_argument(
        "verb", metavar="VERB", type=one_of(*_VERBS), help=" ".join(_VERBS)
    )
    parser.add_argument(
        "words", metavar="WORD", nargs="*", default=[], help="as shown above"
    )
    parser.add_argument(
        "--shrink",
        action="store_true",
        help="resize to a smaller size: what lies behind it is lost",
    )
    parser.add_argument(
        "--json", action="store_true", help="what the server says, for programs"
    )


def run(arguments: argparse.Namespace) -> int:
    """Ask the server, and print what it says."""
    verb, words = arguments.verb, list(arguments.words)
    if arguments.shrink and verb != "resize":
        raise ConfigError("--shrink is for resize")
    client = ControlClient(arguments.control)
    actions: dict[
        str, Callable[[ControlClient, list[str], bool, argparse.Namespace], str]
    ]
    actions = {
        "list": _list,
        "resize": _resize,
        "snapshot": _snapshot,
        "compact": _compact,
        "reopen": _reopen,
        "flush": _flush,
    }
    text = actions[verb](client, words, arguments.json, arguments)
    if text:
        print(text)
    return 0


def _take(words: list[str], *wanted: str) -> list[str]:
    """Return the words after a verb.

    Raises:
        ConfigError: There are more or fewer than wanted.
    """
    if len(words) < len(wanted):
        raise ConfigError(f"{wanted[len(words)]} is missing; see nbdserve ctl --help")
    if len(words) > len(wanted):
        extra = words[len(wanted)]
        raise ConfigError(f"{extra!r} is one word too many; see nbdserve ctl --help")
    return words


def _pretty(answer: Any) -> str:
    return json.dumps(answer, indent=4)


def _list(
    client: ControlClient, words: list[str], as_json: bool, _: argparse.Namespace
) -> str:
    _take(words)
    answer = client.ask("GET", "exports")
    if as_json:
        return _pretty(answer)
    rows = [("EXPORT", "SIZE", "CLIENTS", "FORMAT", "FILE", "STATE")]
    rows += [
        (
            each["name"] or '""',
            "-" if each["size"] is None else format_size(each["size"]),
            str(each["clients"]),
            each["format"] or "-",
            each["file"],
            _state(each),
        )
        for each in answer["exports"]
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _state(export: dict[str, Any]) -> str:
    if export["broken"] is not None:
        return f"reopen it: {export['broken']}"
    if export["size"] is None:
        return "not used yet"
    return "read-only" if export["read-only"] else "read-write"


def _resize(
    client: ControlClient,
    words: list[str],
    as_json: bool,
    arguments: argparse.Namespace,
) -> str:
    name, size = _take(words, "EXPORT", "SIZE")
    parse_size(size.removeprefix("+") if size[:1] == "+" else size.removeprefix("-"))
    wanted = {"size": size, "shrink": arguments.shrink}
    answer = client.ask("PATCH", "exports", name, body=wanted)
    if as_json:
        return _pretty(answer)
    return (
        f"{name}: {format_size(answer['previous-size'])} ->"
        f" {format_size(answer['size'])}, {_paused(answer)}"
    )


def _paused(answer: dict[str, Any]) -> str:
    return f"longest pause of writers {answer['longest-pause-s'] * 1000:.1f} ms"


def _snapshot(
    client: ControlClient, words: list[str], as_json: bool, _: argparse.Namespace
) -> str:
    verb = words.pop(0) if words else "list"
    try:
        one_of(*_SNAPSHOT_VERBS)(verb)
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"snapshot: {error}; see nbdserve ctl --help") from None
    if verb == "list":
        (name,) = _take(words, "EXPORT")
        answer = client.ask("GET", "exports", name, "snapshots")
        return _pretty(answer) if as_json else _snapshot_lines(answer["snapshots"])
    name, snapshot = _take(words, "EXPORT", "NAME")
    if verb == "create":
        answer = client.ask(
            "POST", "exports", name, "snapshots", body={"name": snapshot}
        )
    else:
        answer = client.ask("DELETE", "exports", name, "snapshots", snapshot)
    if as_json:
        return _pretty(answer)
    return f"{name}: snapshot {snapshot} {verb}d, {_paused(answer)}"


def _snapshot_lines(snapshots: list[dict[str, Any]]) -> str:
    rows = [("ID", "TAG", "DATE")]
    for each in snapshots:
        date = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(each["date-sec"]))
        rows.append((each["id"], each["name"], date))
    if len(rows) == 1:
        return ""
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _compact(
    client: ControlClient, words: list[str], as_json: bool, _: argparse.Namespace
) -> str:
    from nbdserve.cli.progress import growing_bar

    (name,) = _take(words, "EXPORT")
    where = "exports", name, "compaction"
    state = client.ask("POST", *where)
    try:
        with growing_bar("compacting") as progress:
            while state["state"] == "running":
                time.sleep(_POLL_S)
                state = client.ask("GET", *where)
                progress(state["moved-bytes"], state["total-bytes"])
    except KeyboardInterrupt:
        client.ask("DELETE", *where)
        raise
    if state["state"] == "failed":
        raise ConfigError(f"{name}: {state['error']}")
    if as_json:
        return _pretty(state)
    text = (
        f"{name}: {format_size(state['size-before'])} ->"
        f" {format_size(state['size-after'] or 0)},"
        f" {format_size(state['moved-bytes'])} moved, {_paused(state)}"
    )
    if state["unmovable-clusters"]:
        text += (
            f"; {state['unmovable-clusters']} clusters up to its end can't be moved (used"
            " by snapshots or bitmaps)"
        )
    return text if state["state"] == "done" else f"{text}; stopped"


def _reopen(
    client: ControlClient, words: list[str], as_json: bool, _: argparse.Namespace
) -> str:
    (name,) = _take(words, "EXPORT")
    answer = client.ask("POST", "exports", name, "reopen")
    if as_json:
        return _pretty(answer)
    clients = answer["clients"]
    return f"{name}: reopened, {clients} client{'' if clients == 1 else 's'} stayed"


def _flush(
    client: ControlClient, words: list[str], as_json: bool, _: argparse.Namespace
) -> str:
    (name,) = _take(words, "EXPORT")
    answer = client.ask("POST", "exports", name, "flush")
    return _pretty(answer) if as_json else ""
