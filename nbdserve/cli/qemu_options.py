"""qemu's ways to write options: `key=value,...`, `json:{...}` and objects of TLS.

Words of `docs/tools/qemu-nbd.rst` and of the QAPI schema of qemu. What is not known here
is refused by name: an option that is ignored is a disk served in another way than asked.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from nbdserve.config.access import AccessRule
from nbdserve.config.model import ImageConfig, ImageFormat
from nbdserve.config.tls import TlsConfig
from nbdserve.config.units import parse_size
from nbdserve.errors import ConfigError

_FORMATS: dict[str, ImageFormat] = {"raw": "raw", "qcow": "qcow", "qcow2": "qcow2"}
_FILES = ("file", "host_device")
_TRUE, _FALSE = ("on", "yes", "true", "y"), ("off", "no", "false", "n")
_KEY_SECRET = re.compile(r"(backing\.)*encrypt\.key-secret")
_ENCRYPTION = re.compile(r"(backing\.)*encrypt\.format")
_OFFSET = re.compile("[0-9]+|0[xX][0-9a-fA-F]+")


def parse_options(text: str, implied: str | None = None) -> dict[str, str]:
    """Read `key=value,key=value`; a comma in a value is written twice.

    Args:
        text: The options.
        implied: The key of a first value without one.

    Raises:
        ConfigError: Something has no key, or a key occurs twice.
    """
    options: dict[str, str] = {}
    for piece in re.findall("(?:[^,]|,,)+", text):
        key, equals, value = piece.replace(",,", ",").partition("=")
        if not equals:
            if options or implied is None:
                raise ConfigError(f"{piece!r} in {text!r} is not KEY=VALUE")
            key, value = implied, key
        if key in options:
            raise ConfigError(f"{key!r} occurs twice in {text!r}")
        options[key] = value
    return options


def parse_switch(key: str, value: object) -> bool:
    """Read `on` or `off`, or what JSON has for them.

    Raises:
        ConfigError: It is neither.
    """
    if value is True or value in _TRUE:
        return True
    if value is False or value in _FALSE:
        return False
    raise ConfigError(f"{key}={value} is neither on nor off")


def parse_offset(text: str) -> int:
    """Read a number of bytes.

    Raises:
        ConfigError: It is none.
    """
    if not _OFFSET.fullmatch(text):
        return parse_size(text)
    return int(text, 16 if text[:2].lower() == "0x" else 10)


def image_from_file_name(base: ImageConfig, name: str) -> ImageConfig:
    """Read a file name, `file:NAME` or `json:{...}`.

    Raises:
        ConfigError: It says something that can't be done.
    """
    if name.startswith("json:"):
        try:
            tree = json.loads(name.removeprefix("json:"))
        except ValueError as error:
            raise ConfigError(f"{name!r} is no JSON: {error}") from None
        if not isinstance(tree, dict):
            raise ConfigError(f"{name!r} is no JSON object")
        return image_from_options(base, tree)
    scheme = re.match("([a-z][a-z+]*):", name)
    if scheme is not None and scheme[1] == "file":
        name = name.removeprefix("file:")
    elif scheme is not None and not os.path.exists(name):
        raise ConfigError(
            f"{name!r}: the protocol {scheme[1]!r} is not supported, only files are"
        )
    return replace(base, path=name)


def image_from_options(base: ImageConfig, tree: Mapping[str, Any]) -> ImageConfig:
    """Read the options of a block node, nested or with dots.

    Raises:
        ConfigError: One is unknown or has a value that can't be had.
    """
    options = _flat(tree)
    driver = options.pop("driver", None)
    if driver in _FILES:
        options = {f"file.{key}": value for key, value in options.items()}
        options["file.driver"], driver = driver, "raw"
    image = base if driver is None else replace(base, format=parse_format(driver))
    if options.get("file.driver", "file") not in _FILES:
        raise ConfigError(
            f"file.driver={options['file.driver']} is not supported: only file and"
            " host_device are"
        )
    path = options.pop("file.filename", None)
    if not isinstance(path, str) or not path:
        raise ConfigError("the image options have no file.filename")
    image = replace(image, path=path)
    for key, value in options.items():
        image = _with_option(image, key, value)
    return image


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _with_option(image: ImageConfig, key: str, value: object) -> ImageConfig:
    name = key.removeprefix("file.")
    if name in {"driver", "node-name", "aio", "cache.direct", "auto-read-only"}:
        return image  # without effect here
    if name == "read-only":
        return replace(image, read_only=image.read_only or parse_switch(key, value))
    if name == "discard":
        return replace(image, discard=parse_discard(str(value)))
    if key == "offset" and image.format == "raw":
        return replace(image, offset=image.offset + parse_offset(str(value)))
    if _KEY_SECRET.fullmatch(key):
        # the id of an object; see `Objects.with_secrets`
        return replace(image, secret_files=(*image.secret_files, str(value)))
    harmless = {"cache.no-flush": "off", "detect-zeroes": "off", "locking": "auto"}
    if (
        value in {harmless.get(name), "on" if name == "locking" else None}
        or (name == "cache.no-flush" and value is False)
        # the image itself says which
        or (_ENCRYPTION.fullmatch(key) and value in {"luks", "aes"})
    ):
        return image
    raise ConfigError(f"the image option {key}={value} is not supported")


def parse_discard(text: str) -> bool:
    """Read `ignore` or `unmap`.

    Raises:
        ConfigError: It is neither.
    """
    if text in {"unmap", "on"}:
        return True
    if text in {"ignore", "off"}:
        return False
    raise ConfigError(f"--discard={text} is neither ignore nor unmap")


def parse_format(text: str) -> ImageFormat:
    """Read the name of a format, or of its driver.

    Raises:
        ConfigError: There is none of that name.
    """
    if text not in _FORMATS:
        raise ConfigError(
            f"the format {text!r} is not supported: {', '.join(_FORMATS)} are"
        )
    return _FORMATS[text]


def parse_snapshot(text: str) -> str:
    """Read `-l`: `snapshot.name=NAME`, `snapshot.id=ID`, or one of them alone.

    Raises:
        ConfigError: It names both or neither.
    """
    if not text.startswith(("snapshot.id=", "snapshot.name=")):
        return text
    options = parse_options(text)
    if len(options) != 1 or not options.keys() <= {"snapshot.id", "snapshot.name"}:
        raise ConfigError(
            f"-l {text}: give snapshot.id or snapshot.name; both is not supported"
        )
    return next(iter(options.values()))


@dataclass(slots=True)
class Objects:
    """What `--object` has defined, by id."""

    by_id: dict[str, dict[str, str]] = field(default_factory=dict)

    def add(self, text: str) -> None:
        """Read one `--object`.

        Raises:
            ConfigError: It is of a kind, or has a property, that is not supported.
        """
        options = parse_options(text, "qom-type")
        kind = options.get("qom-type", "")
        known = _OBJECT_OPTIONS.get(kind)
        if known is None:
            raise ConfigError(
                f"--object {kind} is not supported: {', '.join(_OBJECT_OPTIONS)} are"
            )
        for key in options.keys() - {"qom-type", "id"}:
            if key not in known:
                raise ConfigError(f"--object {kind}: {key}= is not supported")
        if kind == "secret" and options.get("format", "raw") != "raw":
            raise ConfigError("--object secret: only format=raw is supported")
        name = options.get("id")
        if not name:
            raise ConfigError(f"--object {kind} has no id=")
        if name in self.by_id:
            raise ConfigError(f"two objects have the id {name!r}")
        self.by_id[name] = options

    def tls(self, name: str) -> TlsConfig:
        """Return the credentials with an id.

        Raises:
            ConfigError: There are none, or they are not those of a server.
        """
        options = self.by_id.get(name, {})
        kind = options.get("qom-type", "")
        if not kind.startswith("tls-creds-"):
            raise ConfigError(f"no TLS credentials with id {name!r}")
        if options.get("endpoint") != "server":
            raise ConfigError(f"the TLS credentials {name!r} need endpoint=server")
        folder = options.get("dir")
        if folder is None:
            raise ConfigError(f"the TLS credentials {name!r} need dir=")
        verify = parse_switch("verify-peer", options.get("verify-peer", "on"))
        parse_switch("sanity-check", options.get("sanity-check", "on"))
        if kind == "tls-creds-psk":
            return TlsConfig.build(psk=os.path.join(folder, "keys.psk"))
        return TlsConfig.build(
            certificate=os.path.join(folder, "server-cert.pem"),
            key=os.path.join(folder, "server-key.pem"),
            ca=os.path.join(folder, "ca-cert.pem") if verify else None,
            verify_client=verify,
        )

    def with_secrets(self, image: ImageConfig) -> ImageConfig:
        """Return an image with the files of secrets, in place of their ids.

        Raises:
            ConfigError: There is no such secret, or it is not in a file.
        """
        files = []
        for name in image.secret_files:
            options = self.by_id.get(name, {})
            if options.get("qom-type") != "secret":
                raise ConfigError(f"no secret with id {name!r}")
            if "file" not in options:
                raise ConfigError(f"the secret {name!r} needs file=")
            files.append(options["file"])
        return replace(image, secret_files=tuple(files))

    def rule(self, name: str, credentials: str) -> AccessRule:
        """Return who may use the export by the authorization with an id.

        Raises:
            ConfigError: There is none.
        """
        options = self.by_id.get(name, {})
        if options.get("qom-type") != "authz-simple":
            raise ConfigError(f"no authorization with id {name!r}")
        identity = options.get("identity")
        if not identity:
            raise ConfigError(f"the authorization {name!r} needs identity=")
        if self.by_id[credentials]["qom-type"] == "tls-creds-psk":
            return AccessRule("read-write", psk_users=(identity,))
        return AccessRule("read-write", certificates=_subjects(name, identity))


def _subjects(name: str, identity: str) -> tuple[str, str]:
    """Return a distinguished name in both orders.

    GnuTLS writes it as it stands in the certificate, which begins with the country or
    the organisation; RFC 4514, and rules of this server, begin with the common name.
    """
    parts = re.findall(r"(?:\\.|[^,\\])+", identity)  # a comma may be escaped
    if "=" not in identity or ",".join(parts) != identity:
        raise ConfigError(
            f"the authorization {name!r}: identity={identity} is no distinguished"
            " name such as CN=client,,O=Example"
        )
    return identity, ",".join(reversed(parts))


_OBJECT_OPTIONS = {
    "tls-creds-x509": ("dir", "endpoint", "verify-peer", "sanity-check"),
    "tls-creds-psk": ("dir", "endpoint", "verify-peer"),
    "authz-simple": ("identity",),
    # no data=: everybody can see command lines
    "secret": ("file", "format"),
}
