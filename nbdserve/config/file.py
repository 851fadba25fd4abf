"""The configuration file: TOML, read strictly.

A key that nobody knows is an error with its line and a near match, since what is
spelled wrongly would otherwise silently not be in force (an access rule, say).
"""

import re
import tomllib
from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Annotated, Any, Final, NoReturn, TypeVar, get_args, get_type_hints

import msgspec

from nbdserve.config.access import AccessLevel, AccessRule, parse_network
from nbdserve.config.model import (
    MOST_WORKERS,
    CacheMode,
    FileConfig,
    ImageConfig,
    ImageFormat,
    OpenMode,
    TcpAddress,
    VsockAddress,
    parse_mode,
    parse_path,
    parse_socket_path,
)
from nbdserve.config.spelling import did_you_mean
from nbdserve.config.tls import TlsChoice, TlsConfig
from nbdserve.errors import ConfigError

_UNKNOWN: Final = re.compile(r"Object contains unknown field `(.*?)`(?: - at `(.*)`)?")
_CHOICE: Final = re.compile("Invalid enum value '(.*)'", re.DOTALL)
_OTHER: Final = re.compile(r"(.*?)(?: - at `(.*)`)?", re.DOTALL)
#: Ten thousand exports are 0.8 MiB. Reading that much takes half a second, finding the line
#: of a mistake in it two.
_MAX_LENGTH: Final = 4 << 20

_Path = Sequence[str | int]
_Parsed = TypeVar("_Parsed")


class _Strict(msgspec.Struct, forbid_unknown_fields=True, rename="kebab", kw_only=True):
    """A table in which every key has a meaning."""


class _Access(_Strict):
    allow: AccessLevel
    certificate: str | list[str] | None = None
    psk_user: str | list[str] | None = None
    network: str | list[str] | None = None
    user: str | int | list[str | int] | None = None


class _Export(_Strict):
    path: str
    name: str | None = None
    format: ImageFormat | None = None
    read_only: bool = False
    description: str = ""
    cache: CacheMode = "writeback"
    allow_backing: list[str] = []
    allow_data_file: list[str] = []
    secret_file: str | list[str] | None = None
    snapshot: str | None = None
    allocation_depth: bool = False
    bitmaps: list[str] = []
    tls_only: bool = False
    access: list[_Access] = []


class _Tls(_Strict):
    mode: TlsChoice | None = None
    certificates: str | None = None
    cert: str | None = None
    key: str | None = None
    ca: str | None = None
    verify_client: bool = False
    psk: str | None = None


class _File(_Strict):
    listen: list[str] = []
    unix: list[str] = []
    unix_mode: str | None = None
    vsock: list[str] = []
    state_dir: str | None = None
    workers: Annotated[int, msgspec.Meta(ge=1, le=MOST_WORKERS)] | None = None
    open: OpenMode | None = None
    control: str | None = None
    tls: _Tls = msgspec.field(default_factory=_Tls)
    limits: dict[str, int | float | str] = {}
    export: list[_Export] = []


#: The keys of each table, for near matches.
_KEYS: Final[Mapping[tuple[str, ...], type[msgspec.Struct]]] = {
    (): _File,
    ("tls",): _Tls,
    ("export",): _Export,
    ("export", "access"): _Access,
}


def read_config(
    path: str,
    limits: Collection[str],
    judge_limit: Callable[[tuple[str, str]], object],
    judge_user: Callable[[str | int], object],
) -> FileConfig:
    """Read a configuration file.

    Args:
        path: Of the file.
        limits: The names of limits.
        judge_limit: Refuses a name and a value by a ConfigError.
        judge_user: Refuses a user of this machine, a name or a number, in the same way.

    Raises:
        ConfigError: It can't be read, or something in it is wrong: one line, with the
            line of the file.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(_MAX_LENGTH + 1)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8") from error
    if len(text) > _MAX_LENGTH:
        raise ConfigError(f"{path}: is longer than {_MAX_LENGTH} characters")
    return _Reader(path, text, judge_user).read(limits, judge_limit)


class _Reader:
    """One file, and how to complain about it."""

    def __init__(
        self, path: str, text: str, judge_user: Callable[[str | int], object]
    ) -> None:
        self._path = path
        self._text = text
        self._judge_user = judge_user

    def read(
        self,
        limits: Collection[str],
        judge_limit: Callable[[tuple[str, str]], object],
    ) -> FileConfig:
        try:
            tables = tomllib.loads(self._text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{self._path}: {error}") from error
        try:
            file = msgspec.convert(tables, _File)
        except msgspec.ValidationError as error:
            self._explain(str(error))
        settings = tuple((name, str(value)) for name, value in file.limits.items())
        for setting in settings:
            name = setting[0]
            if name not in limits:
                self._refuse(("limits", name), _unknown(name, limits))
            self._judged(("limits", name), setting, judge_limit)
        images = tuple(
            self._image(number, export) for number, export in enumerate(file.export)
        )
        self._require_names(file, images)
        return FileConfig(
            images=images,
            listen=self._each(("listen",), file.listen, TcpAddress.parse),
            unix=self._each(("unix",), file.unix, parse_socket_path),
            unix_mode=self._optional("unix-mode", file.unix_mode, parse_mode),
            vsock=self._each(("vsock",), file.vsock, VsockAddress.parse),
            tls=self._tls(file.tls),
            limits=settings,
            state_dir=self._optional("state-dir", file.state_dir, parse_path),
            workers=file.workers,
            open=file.open,
            control=self._optional("control", file.control, parse_socket_path),
        )

    def _tls(self, tls: _Tls) -> dict[str, Any]:
        for key in ("certificates", "cert", "key", "ca", "psk"):
            path = getattr(tls, key)
            if path is not None:
                self._judged(("tls", key), path, parse_path)
        given = {
            "certificate" if key == "cert" else key: value
            for key, value in msgspec.structs.asdict(tls).items()
            if value
        }
        self._judged(("tls",), given, lambda keywords: TlsConfig.build(**keywords))
        return given

    def _image(self, number: int, export: _Export) -> ImageConfig:
        at: _Path = ("export", number)
        path = self._judged((*at, "path"), export.path, ImageConfig.from_path)
        rules = tuple(
            self._rule((*at, "access", index), rule)
            for index, rule in enumerate(export.access)
        )

        def build(name: str) -> ImageConfig:
            return ImageConfig(
                name=name,
                path=export.path,
                format=export.format,
                read_only=export.read_only,
                description=export.description,
                cache=export.cache,
                allow_backing=self._each(
                    (*at, "allow-backing"), export.allow_backing, parse_path
                ),
                allow_data_file=self._each(
                    (*at, "allow-data-file"), export.allow_data_file, parse_path
                ),
                secret_files=self._each(
                    (*at, "secret-file"), _listed(export.secret_file), parse_path
                ),
                snapshot=export.snapshot,
                allocation_depth=export.allocation_depth,
                bitmaps=tuple(export.bitmaps),
                tls_only=export.tls_only,
                access=rules,
            )

        name = path.name if export.name is None else export.name
        return self._judged(at, name, build)

    def _require_names(self, file: _File, images: Sequence[ImageConfig]) -> None:
        """Refuse two exports of one name."""
        first: dict[str, ImageConfig] = {}
        for number, image in enumerate(images):
            if first.setdefault(image.name, image) is image:
                continue
            key = "path" if file.export[number].name is None else "name"
            text = f"two exports are named {image.name!r}: give one another name"
            self._refuse(("export", number, key), text)

    def _rule(self, at: _Path, rule: _Access) -> AccessRule:
        for key, value in msgspec.structs.asdict(rule).items():
            if value == []:
                text = "an empty list would be met by everybody: leave it out"
                self._refuse((*at, key.replace("_", "-")), text)
        for user in _listed(rule.user):
            self._judged((*at, "user"), user, self._judge_user)
        return AccessRule(
            allow=rule.allow,
            certificates=tuple(_listed(rule.certificate)),
            psk_users=tuple(_listed(rule.psk_user)),
            networks=self._each((*at, "network"), _listed(rule.network), parse_network),
            users=tuple(_listed(rule.user)),
        )

    # Complaints

    def _judged(
        self, at: _Path, value: Any, parse: Callable[[Any], _Parsed]
    ) -> _Parsed:
        """Parse a value; a complaint about it gets its line."""
        try:
            return parse(value)
        except ConfigError as error:
            self._refuse(at, str(error))

    def _optional(
        self, key: str, value: str | None, parse: Callable[[str], _Parsed]
    ) -> _Parsed | None:
        return None if value is None else self._judged((key,), value, parse)

    def _each(
        self, at: _Path, values: Sequence[str], parse: Callable[[str], _Parsed]
    ) -> tuple[_Parsed, ...]:
        return tuple(self._judged(at, value, parse) for value in values)

    def _explain(self, complaint: str) -> NoReturn:
        """Say where a complaint of msgspec is from."""
        if found := _UNKNOWN.fullmatch(complaint):
            at = _path(found[2])
            tables = tuple(part for part in at if isinstance(part, str))
            known = _KEYS[tables].__struct_encode_fields__
            self._refuse((*at, found[1]), _unknown(found[1], known))
        found = _OTHER.fullmatch(complaint)
        text, at = (found[1], _path(found[2])) if found else (complaint, [])
        key = f"{at[-1]}: " if at and isinstance(at[-1], str) else ""
        text = text.replace("`", "").replace("Object m", "m")
        if found := _CHOICE.fullmatch(text):
            choices = _choices(at)
            hint = did_you_mean(found[1], choices)
            text = f"'{found[1]}' is not one of {', '.join(choices)}{hint}"
        elif text == "Expected array, got str":
            text += ': write ["..."]'
        self._refuse(at, key + text)

    def _refuse(self, at: _Path, text: str) -> NoReturn:
        line = self._line_of(at)
        raise ConfigError(f"{self._path}, line {line}: {text}")

    def _line_of(self, at: _Path) -> int:
        """Return the line on which the value at a path begins.

        It is the one that has to be added to a beginning of the file before the parser
        finds the value: then this can't disagree with the parser.
        """
        lines = self._text.splitlines(keepends=True)

        def reaches(number: int) -> bool:
            # a beginning that ends inside of a value of several lines can't be parsed
            for end in range(number, len(lines) + 1):
                try:
                    return _holds(tomllib.loads("".join(lines[:end])), at)
                except tomllib.TOMLDecodeError:
                    continue
            return False

        numbers = range(1, len(lines) + 1)
        found = bisect_left(numbers, 1, key=lambda number: int(reaches(number)))
        return numbers[found] if found < len(numbers) else 1


def _holds(value: Any, at: _Path) -> bool:
    """Tell whether there is a value at a path."""
    for part in at:
        if isinstance(part, str):
            if not isinstance(value, dict) or part not in value:
                return False
        elif not isinstance(value, list) or part >= len(value):
            return False
        value = value[part]
    return True


def _path(text: str | None) -> list[str | int]:
    """Read a path as msgspec writes it: `$.export[1].access`."""
    parts = re.findall(r"\.([^.\[]+)|\[(\d+)\]", text or "")
    return [name or int(number) for name, number in parts]


def _choices(at: _Path) -> list[str]:
    """Return the words that a key takes."""
    tables = tuple(part for part in at[:-1] if isinstance(part, str))
    hints = get_type_hints(_KEYS[tables])
    return _words(hints[str(at[-1]).replace("-", "_")])


def _words(kind: Any) -> list[str]:
    """Return the strings in a type such as `Literal["a", "b"] | None`."""
    found: list[str] = []
    for part in get_args(kind):
        found += [part] if isinstance(part, str) else _words(part)
    return found


def _unknown(name: str, known: Collection[str]) -> str:
    return f"unknown key {name!r}{did_you_mean(name, known)}"


def _listed(value: Any) -> list[Any]:
    """Return what may be given alone, or not at all, as a list."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
