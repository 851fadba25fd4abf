"""Where a process begins: which command, and what its failure looks like."""

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ExtensionFileLoader, PathFinder

from nbdserve import __version__
from nbdserve.errors import ConfigError, NbdserveError, explain
from nbdserve.observe.streams import open_missing, point_to_nowhere

#: Exit codes that other people's scripts rely on.
OK = 0
FAILED = 1
INTERRUPTED = 130

#: What stands for a failure where 1 has a meaning of its own.
FAILURE_CODES = {"image compare": 2}

#: The words of a command, its module, and what `nbdserve --help` says of it.
COMMANDS = {
    "serve": ("nbdserve.cli.serve", "serve disk images to NBD clients"),
    "ctl": ("nbdserve.cli.ctl", "resize, snapshot, compact what is being served"),
    "list": ("nbdserve.cli.list_exports", "show what an NBD server exports"),
    "image create": ("nbdserve.cli.image.create", "make a new image"),
    "image info": ("nbdserve.cli.image.info", "describe an image"),
    "image check": ("nbdserve.cli.image.check", "look for damage in an image"),
    "image map": ("nbdserve.cli.image.map", "show where an image holds data"),
    "image resize": ("nbdserve.cli.image.resize", "make a disk larger or smaller"),
    "image amend": ("nbdserve.cli.image.amend", "change an image's version or layout"),
    "image snapshot": (
        "nbdserve.cli.image.snapshot",
        "list, create, apply or delete internal snapshots",
    ),
    "image bitmap": (
        "nbdserve.cli.image.bitmap",
        "add, remove, clear, enable, disable or merge dirty bitmaps",
    ),
    "image measure": ("nbdserve.cli.image.measure", "compute the size of a copy"),
    "image compare": ("nbdserve.cli.image.compare", "compare what two disks hold"),
    "image convert": ("nbdserve.cli.image.convert", "copy a disk to another format"),
    "image commit": ("nbdserve.cli.image.commit", "write an overlay into its base"),
    "image rebase": ("nbdserve.cli.image.rebase", "give an image another backing file"),
    "image compact": ("nbdserve.cli.image.compact", "make an image's file smaller"),
    "image rename": ("nbdserve.cli.image.rename", "rename an image and its references"),
}

DESCRIPTION = "An NBD server for raw, qcow and qcow2 disk images."

EXAMPLES = """\
examples:
  nbdserve serve --create 10G disk.qcow2    make a disk and serve it
  nbdserve list nbd://127.0.0.1             see it
  nbdserve image check disk.qcow2           check it

`nbdserve COMMAND --help` has the options of a command and more examples."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The words after the program's name; those of the process if None.

    Returns:
        The exit code: 1 for any failure, unless the command has others.
    """
    open_missing()
    words = list(sys.argv[1:] if argv is None else argv)
    failed = FAILURE_CODES.get(" ".join(words[:2]), FAILED)
    try:
        code = _run(words)
        sys.stdout.flush()
    except (NbdserveError, OSError) as error:
        _settle_stdout()
        if isinstance(error, BrokenPipeError) and error.filename is None:
            return failed
        print(f"nbdserve: {explain(error)}", file=sys.stderr)
        return failed
    except KeyboardInterrupt:
        return INTERRUPTED
    return code


def _settle_stdout() -> None:
    """Write what is still buffered, or let it go: exiting would complain about it."""
    try:
        sys.stdout.flush()
    except OSError:
        point_to_nowhere(sys.stdout.fileno())


def _is_compiled() -> bool:
    """Whether the modules that serve requests are extensions (deploy/compile.py)."""
    wire = os.path.join(os.path.dirname(os.path.dirname(__file__)), "wire")
    found = PathFinder.find_spec("requests", [wire])
    return found is not None and isinstance(found.loader, ExtensionFileLoader)


def _run(words: list[str]) -> int:
    if not words:
        print(_help_text(""), file=sys.stderr)
        return FAILED
    if words[0] in {"-h", "--help"}:
        print(_help_text(""))
        return OK
    if words[0] in {"-V", "--version"}:
        how = "compiled" if _is_compiled() else "interpreted"
        print(f"nbdserve {__version__} ({how})")
        return OK
    if words == ["image"]:
        print(_help_text("image "), file=sys.stderr)
        return FAILED
    if words[0] == "image" and words[1] in {"-h", "--help"}:
        print(_help_text("image "))
        return OK
    name, rest = _split(words)

    from nbdserve.cli.parser import Parser

    module = import_module(COMMANDS[name][0])
    parser = Parser(
        f"nbdserve {name}",
        takes=module.TAKES,
        description=module.DESCRIPTION,
        epilog=module.EXAMPLES,
    )
    module.define(parser)
    arguments = parser.parse(rest)
    code: int = module.run(arguments)
    return code


def _split(words: list[str]) -> tuple[str, list[str]]:
    """Return the command's name, and the words after it.

    Raises:
        ConfigError: There is no such command.
    """
    count = 2 if words[0] == "image" else 1
    name, rest = " ".join(words[:count]), words[count:]
    if name not in COMMANDS:
        from nbdserve.config.spelling import did_you_mean

        what = "option" if name.startswith("-") else "command"
        known = ["--help", "--version"] if what == "option" else list(COMMANDS)
        hint = did_you_mean(name, known) or ":"
        raise ConfigError(f"unknown {what} {name!r}{hint} see nbdserve --help")
    return name, rest


def _help_text(prefix: str) -> str:
    """Return what there is to know about the commands that begin with `prefix`."""
    lines = [f"usage: nbdserve {prefix}COMMAND ...", "", DESCRIPTION, "", "commands:"]
    lines += [
        f"  {name:15}{summary}"
        for name, (_, summary) in COMMANDS.items()
        if name.startswith(prefix)
    ]
    lines += ["", "options:", f"  {'-h, --help':15}show this text"]
    if not prefix:
        lines.append(f"  {'--version':15}show the version")
    return "\n".join([*lines, "", EXAMPLES])
