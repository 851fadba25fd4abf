"""Passphrases of encrypted images, out of files: everybody can see command lines."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Final

from nbdserve.errors import ConfigError
from nbdserve.storage.names import shown

#: More than any passphrase; a file that was not meant is not read whole.
_MAX_LENGTH: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Secret:
    """A passphrase.

    Attributes:
        value: Its bytes: all of the file's, as for qemu and cryptsetup.
        name: Where it is from, for messages.
    """

    value: bytes = field(repr=False)
    name: str = "the passphrase"

    @property
    def hint(self) -> str:
        """What may be the matter if it is wrong."""
        if self.value.endswith(b"\n"):
            return f" ({self.name} ends with a newline, which counts)"
        return ""

    def require_text(self) -> None:
        """Refuse what qemu could not pass on, before it locks something.

        Raises:
            ConfigError: It is not UTF-8, or has a NUL byte.
        """
        try:
            text = self.value.decode()
        except UnicodeDecodeError:
            text = "\0"
        if "\0" in text:
            raise ConfigError(
                f"{self.name}: is not UTF-8 text without NUL bytes, so qemu could not"
                " open what it locks"
            )


def read_secret(path: str | PathLike[str]) -> Secret:
    """Read the passphrase that is in a file: all of its bytes.

    Raises:
        ConfigError: It can't be read, is empty or no passphrase.
    """
    try:
        with open(path, "rb") as file:
            value = file.read(_MAX_LENGTH + 1)
    except OSError as error:
        raise ConfigError(f"secret file {shown(path)}: {error.strerror}") from error
    if not 0 < len(value) <= _MAX_LENGTH:
        size = "is empty" if not value else f"has more than {_MAX_LENGTH} bytes"
        raise ConfigError(f"secret file {shown(path)}: {size}")
    return Secret(value, shown(path))


def read_secrets(paths: Sequence[str | PathLike[str]]) -> tuple[Secret, ...]:
    """Read the passphrase of each file; see `read_secret`."""
    return tuple(read_secret(path) for path in paths)
