"""argparse with the manners of nbdserve.

Wrong usage is one line and exit code 1 (argparse: the usage, a line and 2),
options can't be abbreviated (scripts that do would break when an option is
added), a near miss gets a suggestion, and options may stand between images.
"""

import argparse
import re
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

from nbdserve.config.spelling import did_you_mean
from nbdserve.errors import ConfigError

Value = TypeVar("Value")

#: What options that take a path call it in their help.
_PATHS = ("PATH", "FILE", "DIR")


def one_of(*choices: str) -> Callable[[str], str]:
    """Return a converter that accepts `choices` only."""

    def convert(text: str) -> str:
        if text not in choices:
            hint = did_you_mean(text, choices)
            raise argparse.ArgumentTypeError(
                f"{text!r} is not one of {', '.join(choices)}{hint}"
            )
        return text

    return convert


def judged(parse: Callable[[str], Value]) -> Callable[[str], Value]:
    """Return a converter whose `ConfigError` is reported with the option's name."""

    def convert(text: str) -> Value:
        try:
            return parse(text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def define_allowed_files(parser: argparse._ActionsContainer) -> None:
    """Add the options that allow files to be opened which an image names."""
    parser.add_argument(
        "--allow-backing",
        metavar="DIR",
        action="append",
        default=[],
        help="also open backing files below DIR, not only from the image's own folder",
    )
    parser.add_argument(
        "--allow-data-file",
        metavar="PATH",
        action="append",
        default=[],
        help="open the external data file that the image names, if it is PATH or lies"
        " below it; without this option, none",
    )


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Help in which a name with hyphens can be copied."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        from textwrap import wrap  # only help needs it

        return wrap(" ".join(text.split()), width, break_on_hyphens=False)


class Parser(argparse.ArgumentParser):
    """The parser of one command."""

    def __init__(self, prog: str, *, takes: str, description: str, epilog: str) -> None:
        """Take the command's words, what follows them, what it does, and examples."""
        super().__init__(
            prog=prog,
            usage=f"{prog} {takes} [options]",
            description=description,
            epilog=epilog,
            formatter_class=_Formatter,
            allow_abbrev=False,
        )
        # or -512M would be taken for an option
        self._negative_number_matcher = re.compile(r"-[\d.]+[KMGTkmgt]?")

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """Read the words after the command.

        Raises:
            ConfigError: They are not what the command takes.
        """
        arguments, rest = self.parse_known_intermixed_args(words)
        if rest:
            self._refuse(rest[0])
        return arguments

    def _get_value(self, action: argparse.Action, arg_string: str) -> object:
        # `--tls-ca "$unset"` is a mistake, not the wish to have none
        if not arg_string and action.option_strings and action.metavar in _PATHS:
            raise argparse.ArgumentError(action, "the path is empty")
        value: object = super()._get_value(action, arg_string)
        return value

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print."""
        raise self._usage_error(message.removeprefix("argument "))

    def _refuse(self, word: str) -> NoReturn:
        option = word.partition("=")[0]
        if not option.startswith("-"):
            raise self._usage_error(f"{word!r} is one argument too many")
        known = [name for action in self._actions for name in action.option_strings]
        raise self._usage_error(f"unknown option {option}{did_you_mean(option, known)}")

    def _usage_error(self, message: str) -> ConfigError:
        end = "" if message.endswith("?") else ";"
        return ConfigError(f"{message}{end} see {self.prog} --help")
