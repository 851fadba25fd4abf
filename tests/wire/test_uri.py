import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserve.errors import ConfigError
from nbdserve.wire.uri import NbdUri, parse_uri


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # the table of doc/uri.md
        ("nbd://example.com/disk", NbdUri("disk", "example.com")),
        ("nbd+unix:///disk?socket=sock", NbdUri("disk", socket_path="sock")),
        ("nbd://example.com/", NbdUri("", "example.com")),
        ("nbd://example.com", NbdUri("", "example.com")),
        ("nbd://example.com//disk", NbdUri("/disk", "example.com")),
        ("nbd://example.com/hello%20world", NbdUri("hello world", "example.com")),
        # and beyond
        ("nbd://127.0.0.1:10810/a/b", NbdUri("a/b", "127.0.0.1", 10810)),
        ("nbd://[::1]:10810", NbdUri("", "::1", 10810)),
        ("nbd://[fe80::1%25eth0]/x", NbdUri("x", "fe80::1%eth0")),
        ("nbds://host/%E2%98%83", NbdUri("\N{SNOWMAN}", "host", tls=True)),
        (
            "nbds://me@host/x?tls-type=psk&tls-hostname=other&tls-verify-peer=0",
            NbdUri(
                "x",
                "host",
                tls=True,
                user="me",
                tls_type="psk",
                tls_hostname="other",
                tls_verify_peer=False,
            ),
        ),
        (
            "nbds+unix:///?socket=/run/a+b%20c.sock",
            NbdUri("", socket_path="/run/a+b c.sock", tls=True),
        ),
        ("nbd+unix:///?socket=%00/abstract", NbdUri(socket_path="\0/abstract")),
        ("nbd+unix:///?socket=/run/%ff", NbdUri(socket_path="/run/\udcff")),
        ("nbd://host/x?x-private=1", NbdUri("x", "host")),
        ("nbd://host/a%2Fb%3Fc%23d", NbdUri("a/b?c#d", "host")),
    ],
)
def test_uris(text: str, expected: NbdUri) -> None:
    assert parse_uri(text) == expected
    assert parse_uri(str(expected)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("http://host/", "an NBD URI begins with"),
        ("disk.qcow2", "an NBD URI begins with"),
        ("", "an NBD URI begins with"),
        ("nbd:host:10809", "the host is missing"),
        ("nbd:///disk", "the host is missing"),
        ("nbd://host:port/", "not a URI"),
        ("nbd://host:99999/", "not a URI"),
        ("nbd://[::1/", "not a URI"),
        ("nbd+unix:///disk", r"\?socket=PATH is missing"),
        ("nbd+unix:///disk?socket=", r"\?socket=PATH is missing"),
        ("nbd+unix://host/disk?socket=x", "has no host"),
        ("nbd://host/disk?socket=x", r"needs nbd\+unix://"),
        ("nbd://host/disk?sokcet=x", "unknown parameter 'sokcet'"),
        ("nbd://host/a#b", "%23"),
        ("nbd://host/%ff", "not UTF-8"),
        ("nbd://host/a%00b", "no NUL"),
        ("nbd://host/" + 4097 * "x", "at most 4096 bytes"),
    ],
)
def test_what_is_no_nbd_uri_is_said_so(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as problem:
        parse_uri(text)
    assert str(problem.value).startswith(text)


def test_uris_are_short_where_they_can_be() -> None:
    assert str(NbdUri(host="127.0.0.1")) == "nbd://127.0.0.1:10809"
    assert str(NbdUri("disk", "::1", 1)) == "nbd://[::1]:1/disk"
    assert str(NbdUri("a b", socket_path="/s")) == "nbd+unix:///a%20b?socket=/s"
    assert str(NbdUri(host="127.0.0.1", port=0)) == "nbd://127.0.0.1:0"


NAMES = st.text(
    st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=40
)


@given(NAMES, st.integers(0, 65535), st.booleans())
def test_any_name_survives_a_uri(name: str, port: int, tls: bool) -> None:
    uri = NbdUri(name, "host", port, tls=tls)
    assert parse_uri(str(uri)) == uri


@given(NAMES.filter(bool), NAMES)
def test_any_socket_survives_a_uri(path: str, name: str) -> None:
    uri = NbdUri(name, socket_path=path)
    assert parse_uri(str(uri)) == uri


@given(st.text(max_size=60))
def test_garbage_is_a_uri_or_a_config_error(text: str) -> None:
    for candidate in (text, "nbd://" + text, "nbd+unix:///?socket=" + text):
        try:
            uri = parse_uri(candidate)
        except ConfigError:
            continue
        assert uri.host or uri.socket_path
