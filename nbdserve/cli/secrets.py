"""Passphrases of encrypted images on the command line: never they, only their files."""

import argparse
from typing import TYPE_CHECKING

from nbdserve.cli.parser import judged, one_of
from nbdserve.errors import ConfigError

if TYPE_CHECKING:
    from nbdserve.formats.crypto.new_luks import NewLuks
    from nbdserve.formats.crypto.secret import Secret

_CIPHERS = ("aes-256", "aes-192", "aes-128")

#: Anything with options: a parser, or a group of it.
Options = argparse._ActionsContainer  # noqa: SLF001 -- the only name that it has


def define_secret_file(
    options: Options, whose: str = "the image and of its backing files"
) -> None:
    """Add --secret-file."""
    options.add_argument(
        "--secret-file",
        metavar="FILE",
        action="append",
        default=[],
        help=f"a file that is the passphrase of {whose}, every byte of it; any number"
        " of times, and each is tried",
    )


def secrets_of(arguments: argparse.Namespace) -> "tuple[Secret, ...]":
    """Read what --secret-file names.

    Raises:
        ConfigError: One can't be read.
    """
    if not arguments.secret_file:
        return ()
    from nbdserve.formats.crypto.secret import read_secrets

    return read_secrets(arguments.secret_file)


def define_encryption(options: Options) -> None:
    """Add what can be chosen about the encryption of a new image."""
    options.add_argument(
        "--encryption",
        metavar="luks",
        help="encrypt guest data (qcow2); needs the packages of 'nbdserve[crypto]'",
    )
    options.add_argument(
        "--cipher",
        metavar="aes-256|aes-192|aes-128",
        type=one_of(*_CIPHERS),
        help="in mode XTS (default: aes-256)",
    )


def define_iter_time(options: Options) -> None:
    """Add --iter-time."""
    options.add_argument(
        "--iter-time",
        metavar="MS",
        type=judged(whole_number),
        help="how long trying a passphrase shall take, in milliseconds (default: 2000)",
    )


def whole_number(text: str) -> int:
    """Read a number.

    Raises:
        ConfigError: It is none.
    """
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise ConfigError(f"{text!r} is not a whole number")
    return int(text)


def judge_encryption(arguments: argparse.Namespace) -> bool:
    """Return whether a new image is to be encrypted.

    Raises:
        ConfigError: It can't be in that way.
    """
    if arguments.encryption is None:
        if arguments.cipher is not None:
            raise ConfigError("--cipher needs --encryption luks")
        return False
    if arguments.encryption == "aes":
        raise ConfigError(
            "--encryption aes: legacy AES is not written any more: the passphrase itself"
            " is its key, and can't be changed; take luks"
        )
    if arguments.encryption != "luks":
        raise ConfigError(f"--encryption {arguments.encryption!r}: must be luks")
    return True


def new_encryption(
    arguments: argparse.Namespace, secret_files: list[str], option: str
) -> "NewLuks | None":
    """Return the LUKS header of a new image, if it is to have one; it is made later.

    Raises:
        ConfigError: It can't be in that way, or there is not exactly one passphrase.
    """
    if not judge_encryption(arguments):
        if arguments.iter_time is not None:
            raise ConfigError("--iter-time needs --encryption luks")
        if secret_files:
            # nobody who names a passphrase wants an image that anybody can read
            raise ConfigError(f"{option} needs --encryption luks")
        return None
    from nbdserve.formats.crypto.new_luks import new_luks
    from nbdserve.formats.crypto.secret import read_secret

    if len(secret_files) != 1:
        raise ConfigError(f"--encryption luks needs one {option} FILE")
    return new_luks(
        read_secret(secret_files[0]),
        cipher=arguments.cipher,
        iter_time_ms=arguments.iter_time,
    )
