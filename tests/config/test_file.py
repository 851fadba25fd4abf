"""The configuration file: what it means, and where it complains."""

import re
from ipaddress import ip_network
from pathlib import Path

import pytest

from nbdserve.config.access import AccessRule
from nbdserve.config.file import read_config
from nbdserve.config.model import FileConfig, TcpAddress, VsockAddress
from nbdserve.errors import ConfigError
from nbdserve.exports.access import user_id
from nbdserve.server.limits import NAMES, Limits, changed

EXAMPLE = Path(__file__).parents[2] / "deploy/nbdserve.example.toml"


def judge(limit: tuple[str, str]) -> None:
    changed(Limits(), [limit])


def read(tmp_path: Path, text: str) -> FileConfig:
    path = tmp_path / "nbdserve.toml"
    path.write_text(text)
    return read_config(str(path), NAMES, judge, user_id)


def test_the_example_is_understood() -> None:
    config = read_config(str(EXAMPLE), NAMES, judge, user_id)
    assert [image.name for image in config.images] == ["web", "installer"]
    assert config.listen == (
        TcpAddress("127.0.0.1", 10809),
        TcpAddress("::1", 10809),
    )
    assert config.unix_mode == 0o660
    web = config.images[0]
    assert web.tls_only
    assert web.access == (
        AccessRule(
            "read-write",
            certificates=("web.example.org",),
            networks=(ip_network("192.0.2.0/24"), ip_network("2001:db8::/32")),
        ),
        AccessRule("read-only", users=("root",)),
    )
    assert changed(Limits(), config.limits) == Limits()


def test_the_example_documents_every_key() -> None:
    text = EXAMPLE.read_text()
    keys = {
        key
        for table in ("_File", "_Export", "_Tls", "_Access")
        for key in getattr(
            __import__("nbdserve.config.file", fromlist=[table]), table
        ).__struct_encode_fields__
    }
    for key in {*keys, *NAMES}:
        assert re.search(rf"^(# )?(\[+(export\.)?)?{key}( =|\])", text, re.MULTILINE), (
            key
        )


def test_an_empty_file_says_nothing(tmp_path: Path) -> None:
    assert read(tmp_path, "") == FileConfig()


def test_one_value_needs_no_list(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        'vsock = ["1:2", "3"]\n[[export]]\npath = "/a/b.img"\n'
        '[[export.access]]\nallow = "none"\nuser = 1000\npsk-user = "x"\n',
    )
    assert config.vsock == (VsockAddress(1, 2), VsockAddress(None, 3))
    (image,) = config.images
    assert image.name == "b"
    assert image.access == (AccessRule("none", psk_users=("x",), users=(1000,)),)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("lisen = []", "line 1: unknown key 'lisen': did you mean listen?"),
        (
            '# text\n\n[[export]]\npath = "a"\n\n[[export]]\npath = "b"\nread_only = 1\n',
            "line 8: unknown key 'read_only': did you mean read-only?",
        ),
        (
            (
                '[[export]]\npath = "a"\n[[export.access]]\nallow = "none"\n\n'
                "# text\nnetwrk = [\n '::/0',\n]\n"
            ),
            "line 7: unknown key 'netwrk': did you mean network?",
        ),
        ('tls = {mode = "off", zzz = 1}', "line 1: unknown key 'zzz'"),
        ("[limits]\nconections = 1", "line 2: unknown key 'conections': did you mean"),
        ("[limits]\n\nconnections = 0", "line 3: the limit connections can't be 0"),
        ('listen = [\n"1:2:3"]', "line 1: '1:2:3' is not HOST:PORT"),
        ("listen = 3", "line 1: listen: Expected array, got int"),
        ('\n[[export]]\nname = "x"', "line 2: missing required field path"),
        (
            '[[export]]\npath = "a"\nformat = "vdi"',
            "line 3: format: 'vdi' is not one of raw, qcow",
        ),
        ('open = "starts"', "'starts' is not one of start, use: did you mean start?"),
        (
            '[[export]]\npath = "a"\n[[export.access]]\n\nallow = "rw"',
            "line 5: allow: 'rw' is not one of none, read-only, read-write",
        ),
        ('listen = "::1"', 'line 1: listen: Expected array, got str: write ["..."]'),
        (
            '[[export]]\npath = "a"\n[[export.access]]\nallow = "none"\nuser = "none"',
            "line 5: there is no user 'none' here",
        ),
        (
            '[[export]]\npath = "a"\n\n[[export]]\npath = "b/a.img"\n',
            "line 5: two exports are named 'a'",
        ),
        (
            '[[export]]\npath = "a"\n[[export]]\npath = "b"\nname = "a"',
            "line 5: two exports are named 'a'",
        ),
        ("a = \n", "(at line 1, column 5)"),
        ('[tls]\nmode = "require"', "line 1: --tls require needs"),
        ('[tls]\npsk = "a"\ncert = "b"\nkey = "c"', "exclude each other"),
        ('[[export]]\npath = ""', "line 2: '' names no image"),
        (
            '[[export]]\npath = "a"\naccess = [{allow = "none", network = "10.0.0.1/8"}]',
            "line 3: '10.0.0.1/8' is not a network",
        ),
        (
            '[[export]]\npath = "a"\naccess = [{allow = "read-write", certificate = []}]',
            "line 3: an empty list would be met by everybody",
        ),
        ('unix-mode = "rw"', "line 1: 'rw' are no permissions"),
        ('listen = [""]', "line 1: '' is not HOST:PORT"),
        ('unix = [""]', "line 1: '' is no path"),
        (f'unix = ["/{"x" * 107}"]', "too long for a Unix socket"),
        ('\ncontrol = ""', "line 2: '' is no path"),
        ('state-dir = ""', "line 1: '' is no path"),
        ('[tls]\nmode = "off"\nca = ""', "line 3: '' is no path"),
        ('[[export]]\npath = "a"\nsecret-file = ""', "line 3: '' is no path"),
        ('[[export]]\npath = "a"\nallow-backing = [""]', "line 3: '' is no path"),
    ],
)
def test_a_mistake_has_its_line(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read(tmp_path, text)
    assert complaint in str(refused.value)
    assert str(refused.value).startswith(f"{tmp_path}/nbdserve.toml")
    assert "\n" not in str(refused.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_config(str(tmp_path / "none"), NAMES, judge, user_id)
    (tmp_path / "latin").write_bytes(b"# \xff")
    with pytest.raises(ConfigError, match="is not UTF-8"):
        read_config(str(tmp_path / "latin"), NAMES, judge, user_id)


def test_a_mistake_in_a_long_file_is_found_soon(tmp_path: Path) -> None:
    entries = "".join(f'[[export]]\npath = "{n}"\n' for n in range(3000))
    with pytest.raises(ConfigError, match="line 6002: unknown key 'pth'"):
        read(tmp_path, f'{entries}[[export]]\npth = "x"\npath = "y"\n')
