"""Who may do what."""

import os
from ipaddress import IPv4Address, ip_address

import pytest

from nbdserve.config.access import AccessRule, parse_network
from nbdserve.errors import ConfigError
from nbdserve.exports.access import OPEN, Access, Client, Policy, client_address


def test_without_rules_everybody_may_all() -> None:
    assert OPEN.access_of(Client()) is Access.READ_WRITE


def test_the_first_rule_whose_conditions_are_all_met_counts() -> None:
    inside = parse_network("10.0.0.0/8")
    policy = Policy.of(
        [
            AccessRule("none", certificates=("bad",)),
            AccessRule("read-write", certificates=("ann", "bad"), networks=(inside,)),
            AccessRule("read-only", certificates=("ann",)),
            AccessRule("read-write", psk_users=("pat",)),
        ]
    )
    near, far = ip_address("10.1.2.3"), ip_address("11.1.2.3")
    ann = "ann", "CN=ann,O=x"
    assert policy.access_of(Client(near, None, True, *ann)) is Access.READ_WRITE
    assert policy.access_of(Client(far, None, True, *ann)) is Access.READ_ONLY
    assert policy.access_of(Client(near, None, True, "bad", "CN=bad")) is Access.NONE
    assert policy.access_of(Client(near)) is Access.NONE
    assert policy.access_of(Client(psk_user="pat")) is Access.READ_WRITE
    assert policy.access_of(Client(ip_address("::1"), None, True, *ann)) is (
        Access.READ_ONLY
    )


def test_users_and_whole_subjects() -> None:
    policy = Policy.of(
        [
            AccessRule("read-write", users=("root",)),
            AccessRule("read-only", users=(1234,)),
            AccessRule("read-only", certificates=("CN=a,O=b",)),
        ]
    )
    assert policy.access_of(Client(uid=0)) is Access.READ_WRITE
    assert policy.access_of(Client(uid=1234)) is Access.READ_ONLY
    assert policy.access_of(Client(uid=os.getpid() + 70000)) is Access.NONE
    assert policy.access_of(Client(common_name="a", subject="CN=a,O=b")) is (
        Access.READ_ONLY
    )
    with pytest.raises(ConfigError, match="no user 'no such user'"):
        Policy.of([AccessRule("none", users=("no such user",))])


def test_an_export_for_encrypted_connections_only() -> None:
    policy = Policy.of([], tls_only=True)
    assert policy.access_of(Client()) is Access.NONE
    assert policy.access_of(Client(tls=True)) is Access.READ_WRITE


def test_mapped_addresses_are_what_they_stand_for() -> None:
    assert client_address("::ffff:10.1.2.3") == IPv4Address("10.1.2.3")
    assert client_address("fe80::1%eth0") == ip_address("fe80::1")


def test_a_common_name_does_not_pass_for_a_subject() -> None:
    policy = Policy.of([AccessRule("read-write", certificates=("CN=backup,O=Us",))])
    honest = Client(tls=True, common_name="backup", subject="CN=backup,O=Us")
    sly = Client(
        tls=True, common_name="CN=backup,O=Us", subject="CN=CN=backup\\,O=Us,O=They"
    )
    assert policy.access_of(honest) is Access.READ_WRITE
    assert policy.access_of(sly) is Access.NONE
