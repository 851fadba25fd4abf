"""Certificates for tests of TLS: an authority, a server's, clients', and wrong ones."""

import datetime
from dataclasses import dataclass
from pathlib import Path

import trustme

_LONG_AGO = datetime.datetime(2001, 1, 1, tzinfo=datetime.UTC)


@dataclass(frozen=True)
class Certificates:
    """A folder as qemu, libnbd and nbdserve look for it, and further ones.

    Attributes:
        server: ca-cert.pem, server-cert.pem, server-key.pem.
        clients: Name -> a folder with ca-cert.pem, client-cert.pem, client-key.pem;
            "nobody" has no certificate.
    """

    server: Path
    clients: dict[str, Path]


def make_certificates(folder: Path) -> Certificates:
    """Make all of them; keys are elliptic, so that it takes no time."""
    ours, other = trustme.CA(), trustme.CA()
    server = folder / "server"
    server.mkdir()
    made = Certificates(server, {})
    renew(made, ours)
    (folder / "ca.pem").write_bytes(ours.cert_pem.bytes())
    clients = {
        "alice": ours.issue_cert("alice@example.org", common_name="alice"),
        "bob": ours.issue_cert("bob@example.org", common_name="bob"),
        "expired": ours.issue_cert(
            "old@example.org", common_name="alice", not_after=_LONG_AGO
        ),
        "foreign": other.issue_cert("eve@example.org", common_name="alice"),
        "nobody": None,
    }
    for name, certificate in clients.items():
        made.clients[name] = path = folder / name
        path.mkdir()
        (path / "ca-cert.pem").write_bytes(ours.cert_pem.bytes())
        if certificate is not None:
            chain = b"".join(part.bytes() for part in certificate.cert_chain_pems)
            (path / "client-cert.pem").write_bytes(chain)
            (path / "client-key.pem").write_bytes(certificate.private_key_pem.bytes())
    made.clients["self-signed"] = path = folder / "self-signed"
    path.mkdir()
    (path / "ca-cert.pem").write_bytes(ours.cert_pem.bytes())
    (path / "client-cert.pem").write_bytes(other.cert_pem.bytes())
    (path / "client-key.pem").write_bytes(other.private_key_pem.bytes())
    made.clients["stranger"] = path = folder / "stranger"
    path.mkdir()
    (path / "ca-cert.pem").write_bytes(other.cert_pem.bytes())
    return made


def make_wrong_files(folder: Path) -> dict[str, tuple[str, str, str]]:
    """Make certificates and keys that can't be used, in the current folder.

    Returns:
        What is wrong -> the certificate, the key, and what to say of them.
    """
    authority = trustme.CA()
    for name, kind in (("a", "ECDSA"), ("b", "ECDSA"), ("rsa", "RSA")):
        issued = authority.issue_cert("localhost", key_type=trustme.KeyType[kind])
        issued.private_key_pem.write_to_path(str(folder / f"{name}.key"))
        issued.cert_chain_pems[0].write_to_path(str(folder / f"{name}.pem"))
    (folder / "text").write_text("nothing of the kind")
    for name in ("a.pem", "a.key"):
        lines = (folder / name).read_text().splitlines()
        (folder / f"broken-{name}").write_text("\n".join([*lines[:2], *lines[3:]]))
    return {
        "another key": ("a.pem", "b.key", "b.key is not the key of a.pem"),
        "another kind of key": ("a.pem", "rsa.key", "rsa.key is not the key of a.pem"),
        "no certificate": ("text", "a.key", "text is not PEM with a certificate"),
        "a key instead": ("a.key", "a.key", "a.key is not PEM with a certificate"),
        "no key": ("a.pem", "text", "text is not PEM with a private key"),
        "a certificate instead": (
            "a.pem",
            "a.pem",
            "a.pem is not PEM with a private key",
        ),
        "a broken certificate": (
            "broken-a.pem",
            "a.key",
            "broken-a.pem: a certificate",
        ),
        "a broken key": (
            "a.pem",
            "broken-a.key",
            "broken-a.key: the private key can't",
        ),
        "nothing": ("none", "a.key", "none: No such file or directory"),
    }


def renew(certificates: Certificates, authority: trustme.CA) -> None:
    """Give the server a certificate of an authority."""
    issued = authority.issue_cert("localhost", "127.0.0.1")
    chain = b"".join(part.bytes() for part in issued.cert_chain_pems)
    (certificates.server / "server-cert.pem").write_bytes(chain)
    key = issued.private_key_pem.bytes()
    (certificates.server / "server-key.pem").write_bytes(key)
    (certificates.server / "ca-cert.pem").write_bytes(authority.cert_pem.bytes())
