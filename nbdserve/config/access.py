"""Who may do what with an export, as the operator put it."""

from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Literal

from nbdserve.errors import ConfigError

AccessLevel = Literal["none", "read-only", "read-write"]


@dataclass(frozen=True, slots=True)
class AccessRule:
    """What clients get that meet every condition of it; the first such rule counts.

    A condition is met by any of its alternatives, and one without alternatives by
    everybody.

    Attributes:
        allow: What they get.
        certificates: Subjects of verified client certificates: the common name, or
            all of it as in `CN=backup,O=Example`.
        psk_users: Names from the file of pre-shared keys.
        networks: Where TCP clients come from.
        users: Names or numbers of the users on this machine whose processes connect
            to a Unix socket.
    """

    allow: AccessLevel
    certificates: tuple[str, ...] = ()
    psk_users: tuple[str, ...] = ()
    networks: tuple[IPv4Network | IPv6Network, ...] = ()
    users: tuple[str | int, ...] = ()


def parse_network(text: str) -> IPv4Network | IPv6Network:
    """Read `192.0.2.0/24`, `2001:db8::/32` or one address.

    Raises:
        ConfigError: It is no network.
    """
    try:
        return ip_network(text)
    except ValueError as problem:
        raise ConfigError(f"{text!r} is not a network: {problem}") from problem
