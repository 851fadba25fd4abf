"""Who a client is, and what it may do with an export.

An export that a client may not use is answered for exactly like one that does not
exist: names are secrets too.
"""

import pwd
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from ipaddress import IPv4Address, IPv6Address, ip_address

from nbdserve.config.access import AccessLevel, AccessRule
from nbdserve.errors import ConfigError


class Access(IntEnum):
    """What a client may do."""

    NONE = 0
    READ_ONLY = 1
    READ_WRITE = 2


_LEVELS: dict[AccessLevel, Access] = {
    "none": Access.NONE,
    "read-only": Access.READ_ONLY,
    "read-write": Access.READ_WRITE,
}


@dataclass(frozen=True, slots=True)
class Client:
    """What is known of a client, and can't be made up by it.

    Attributes:
        address: Of TCP; an IPv4 address mapped to IPv6 is the IPv4 address.
        uid: The user whose process connected to a Unix socket.
        tls: Whether the connection is encrypted.
        common_name: Of a verified certificate.
        subject: All of it, as `CN=name,O=organisation`.
        psk_user: Whose pre-shared key the client has.
    """

    address: IPv4Address | IPv6Address | None = None
    uid: int | None = None
    tls: bool = False
    common_name: str | None = None
    subject: str | None = None
    psk_user: str | None = None


#: A client of which nothing is known.
STRANGER = Client()


def client_address(host: str) -> IPv4Address | IPv6Address:
    """Return the address of a peer as rules compare it."""
    address = ip_address(host.partition("%")[0])
    return getattr(address, "ipv4_mapped", None) or address


@dataclass(frozen=True, slots=True)
class Policy:
    """What each client may do with one export.

    Attributes:
        rules: Tried in order; users are numbers. Without any, everybody may all.
            Whom none is for may nothing.
        tls_only: Whether the export exists only for encrypted connections.
    """

    rules: tuple[AccessRule, ...] = ()
    tls_only: bool = False

    @classmethod
    def of(cls, rules: Iterable[AccessRule], *, tls_only: bool = False) -> "Policy":
        """Look up the users of rules.

        Raises:
            ConfigError: There is no such user.
        """
        return cls(tuple(_with_uids(rule) for rule in rules), tls_only)

    def access_of(self, client: Client) -> Access:
        """Return what a client may do."""
        if self.tls_only and not client.tls:
            return Access.NONE
        if not self.rules:
            return Access.READ_WRITE
        for rule in self.rules:
            if _is_for(rule, client):
                return _LEVELS[rule.allow]
        return Access.NONE


#: Everybody may do everything.
OPEN = Policy()


def _with_uids(rule: AccessRule) -> AccessRule:
    return AccessRule(
        rule.allow,
        rule.certificates,
        rule.psk_users,
        rule.networks,
        tuple(user_id(user) for user in rule.users),
    )


def user_id(user: str | int) -> int:
    """Look up a user of this machine.

    Raises:
        ConfigError: There is none of that name.
    """
    if isinstance(user, int):
        return user
    try:
        return pwd.getpwnam(user).pw_uid
    except KeyError:
        raise ConfigError(f"there is no user {user!r} here") from None


def _is_for(rule: AccessRule, client: Client) -> bool:
    if rule.certificates and not any(
        # a common name must not pass for a whole subject
        name == (client.subject if "=" in name else client.common_name)
        for name in rule.certificates
    ):
        return False
    if rule.psk_users and client.psk_user not in rule.psk_users:
        return False
    if rule.users and client.uid not in rule.users:
        return False
    address = client.address
    return not rule.networks or (
        address is not None and any(address in network for network in rule.networks)
    )
