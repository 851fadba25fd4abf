"""Which exports there are."""

from collections.abc import Iterator

from nbdserve.errors import ConfigError
from nbdserve.exports.export import Export


class Registry:
    """The exports of a server by name."""

    def __init__(self) -> None:
        self._exports: dict[str, Export] = {}

    def add(self, export: Export) -> None:
        """Offer an export.

        Raises:
            ConfigError: There is one of that name.
        """
        if export.name in self._exports:
            raise ConfigError(f"there are two exports named {export.name!r}")
        self._exports[export.name] = export

    def find(self, name: str) -> Export | None:
        """Return the export that a client means, if there is one.

        Names match exactly. "" is "the default export" (doc/proto.md,
        NBD_OPT_EXPORT_NAME): the one of that name, or else the only one.
        """
        export = self._exports.get(name)
        if export is None and not name and len(self._exports) == 1:
            (export,) = self._exports.values()
        return export

    def __iter__(self) -> Iterator[Export]:
        """Go through the exports in the order in which they were added."""
        return iter(self._exports.values())

    def __len__(self) -> int:
        """Return how many exports there are."""
        return len(self._exports)
