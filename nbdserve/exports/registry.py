"""Which exports there are."""

from collections.abc import Iterator
from itertools import islice

from nbdserve.errors import ConfigError
from nbdserve.exports.access import STRANGER, Access, Client
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

    def remove(self, export: Export) -> None:
        """Offer an export no longer; its clients and its disk are the caller's."""
        del self._exports[export.name]
        export.retired = True

    @property
    def has_tls_only(self) -> bool:
        """Whether some export exists for encrypted connections only."""
        return any(export.policy.tls_only for export in self._exports.values())

    def visible_to(self, client: Client) -> Iterator[Export]:
        """Go through the exports that a client may use, in the order they were added."""
        for export in self:
            if export.policy.access_of(client) is not Access.NONE:
                yield export

    def find(self, name: str, client: Client = STRANGER) -> Export | None:
        """Return the export that a client means, if there is one that it may use.

        Names match exactly. "" is "the default export" (doc/proto.md,
        NBD_OPT_EXPORT_NAME): the one of that name, or else the only one. Exports that
        the client may not use don't exist for it in any respect.
        """
        export = self._exports.get(name)
        if export is not None and export.policy.access_of(client) is not Access.NONE:
            return export
        visible = () if name else tuple(islice(self.visible_to(client), 2))
        return visible[0] if len(visible) == 1 else None

    def get(self, name: str) -> Export | None:
        """Return the export of exactly that name, whoever may use it."""
        return self._exports.get(name)

    def __iter__(self) -> Iterator[Export]:
        """Go through the exports in the order in which they were added."""
        return iter(list(self._exports.values()))

    def __len__(self) -> int:
        """Return how many exports there are."""
        return len(self._exports)
