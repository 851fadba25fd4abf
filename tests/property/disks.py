"""The disks that the model test runs on: made by qemu tools once, loaded for each example.

Sizes are small and odd on purpose: with clusters of 512 bytes, 1 MiB has many L2
tables and refcount blocks, with 2 MiB clusters most of a write is copying.
"""

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.helpers.encrypted import Qemu, create_luks
from tests.helpers.engine import convert, make
from tests.helpers.tools import run

KIB = 1 << 10
MIB = 1 << 20
SNAPSHOT = "before"


@dataclass(frozen=True)
class Layer:
    """One file of a chain, from the top down."""

    fmt: str
    content: bytes


@dataclass(frozen=True)
class Prepared:
    """A disk to begin with.

    Attributes:
        layers: The files of the chain, the top image first.
        model: What a guest reads.
        folder: Where the backing files are, for qemu-img to find.
        cluster_size: Bytes, of the top image.
        snapshot: What the internal snapshot has, if there is one.
        data_file: What the external data file has, if there is one. qemu-img looks for
            it as `DATA_FILE` in the folder.
        encrypted: Whether the top image is.
    """

    layers: list[Layer]
    model: bytes
    folder: Path
    cluster_size: int
    snapshot: bytes | None = None
    data_file: bytes | None = None
    encrypted: bool = False


DATA_FILE = "data.raw"
Build = Callable[[Path], Prepared]


def noise(size: int, *, seed: int = 5) -> bytes:
    """Return data in which random, compressible and empty stretches take turns."""
    generator = random.Random(seed)
    pieces: list[bytes] = []
    left = size
    while left:
        length = min(generator.choice([512, 4 * KIB, 20 * KIB, 70 * KIB]), left)
        kind = generator.randrange(3)
        if kind == 0:
            pieces.append(bytes(length))
        elif kind == 1:
            pieces.append(generator.randbytes(length))
        else:
            pieces.append((generator.randbytes(16) * (length // 16 + 1))[:length])
        left -= length
    return b"".join(pieces)


def cluster_size_of(fmt: str, options: str) -> int:
    """Return the cluster size that these options of qemu-img ask for."""
    for option in options.split(","):
        name, _, value = option.partition("=")
        if name == "cluster_size":
            unit = {"k": KIB, "M": MIB}.get(value[-1])
            return int(value[:-1]) * unit if unit else int(value)
    return 4 * KIB if fmt == "qcow" else 64 * KIB


def raw(size: int, folder: Path) -> Prepared:
    """A raw file, of any size."""
    return Prepared([Layer("raw", noise(size))], noise(size), folder, 4096)


def empty(fmt: str, options: str, size: int, folder: Path) -> Prepared:
    """An image nobody has written to yet."""
    content = make(folder, size, fmt=fmt, options=options).read_bytes()
    cluster_size = cluster_size_of(fmt, options)
    return Prepared([Layer(fmt, content)], bytes(size), folder, cluster_size)


def filled(
    fmt: str, options: str, size: int, folder: Path, *, compressed: bool = False
) -> Prepared:
    """An image with content."""
    data = noise(size)
    path = convert(folder, data, fmt=fmt, options=options, compressed=compressed)
    cluster_size = cluster_size_of(fmt, options)
    return Prepared([Layer(fmt, path.read_bytes())], data, folder, cluster_size)


def over(
    fmt: str,
    options: str,
    size: int,
    backing: str,
    folder: Path,
    *,
    backing_size: int | None = None,
    compressed: bool = False,
    depth: int = 1,
) -> Prepared:
    """An image over one or more backing files, the deepest of which has content."""
    data = noise(backing_size or size)
    base = folder / "base"
    if backing == "raw":
        base.write_bytes(data)
    else:
        made = convert(folder, data, fmt=backing, compressed=compressed)
        shutil.move(made, base)
    layers = [Layer(backing, base.read_bytes())]
    model = bytearray(data[:size].ljust(size, b"\0"))
    below, below_format = base, backing
    for number in range(1, depth + 1):
        top = number == depth
        path = folder / f"layer-{number}"
        argv = ["qemu-img", "create", "-q", "-f", fmt if top else "qcow2"]
        if top and options:
            argv += ["-o", options]
        run(*argv, "-b", below, "-F", below_format, path, str(size))
        if not top:
            offset = 40 * KIB * number
            run("qemu-io", "-f", "qcow2", "-c", f"write -P {number} {offset} 90k", path)
            model[offset : offset + 90 * KIB] = bytes([number]) * 90 * KIB
        below, below_format = path, "qcow2"
        layers.insert(0, Layer(fmt if top else "qcow2", path.read_bytes()))
    return Prepared(layers, bytes(model), folder, cluster_size_of(fmt, options))


def over_with_snapshot(options: str, size: int, folder: Path) -> Prepared:
    """An overlay of which a snapshot shares clusters that are there in part."""
    prepared = over("qcow2", options, size, "raw", folder)
    path = folder / "layer-1"
    model = bytearray(prepared.model)
    for number, command in enumerate(("write -P 0x21 50k 9k", "write -P 0x22 300k 2k")):
        run("qemu-io", "-f", "qcow2", "-c", command, path)
        offset, length = (50 * KIB, 9 * KIB) if not number else (300 * KIB, 2 * KIB)
        model[offset : offset + length] = bytes([0x21 + number]) * length
    run("qemu-img", "snapshot", "-c", SNAPSHOT, path)
    layers = [Layer("qcow2", path.read_bytes()), *prepared.layers[1:]]
    return Prepared(layers, bytes(model), folder, prepared.cluster_size, bytes(model))


def with_snapshot(options: str, size: int, folder: Path) -> Prepared:
    """An image most of whose clusters and tables an internal snapshot shares."""
    data = bytearray(noise(size))
    path = convert(folder, bytes(data), options=options)
    run("qemu-img", "snapshot", "-c", SNAPSHOT, path)
    snapshot = bytes(data)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 0x5a 100k 50k", path)
    data[100 * KIB : 150 * KIB] = b"\x5a" * 50 * KIB
    layer = Layer("qcow2", path.read_bytes())
    cluster_size = cluster_size_of("qcow2", options)
    return Prepared([layer], bytes(data), folder, cluster_size, snapshot)


def with_data_file(
    options: str, size: int, folder: Path, *, below: bool = False
) -> Prepared:
    """An image whose data file has old bytes wherever nothing is mapped."""
    data = folder / DATA_FILE
    path, model = folder / "image", bytearray(size)
    argv = [
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        f"data_file={data},{options}",
    ]
    layers = []
    if below:
        model[:] = noise(size)
        base = folder / "base"
        base.write_bytes(model)
        layers.append(Layer("raw", bytes(model)))
        run(*argv, "-b", base, "-F", "raw", path)
    else:
        run(*argv, path, str(size))
    if "raw=on" not in options:
        data.write_bytes(b"old" * (size // 3))
    run("qemu-io", "-f", "qcow2", "-c", "write -P 5 128k 100k", path)
    model[128 * KIB : 228 * KIB] = b"\x05" * (100 * KIB)
    layers.insert(0, Layer("qcow2", path.read_bytes()))
    cluster_size = cluster_size_of("qcow2", options)
    return Prepared(
        layers, bytes(model), folder, cluster_size, data_file=data.read_bytes()
    )


def encrypted(
    cluster_size: int,
    folder: Path,
    *,
    compat: int = 3,
    over: bool = False,
    sub: bool = False,
) -> Prepared:
    """A LUKS image, perhaps over a raw file, perhaps with a snapshot."""
    size = ODD
    qemu = Qemu(folder / "luks")
    create_luks(
        qemu.path, size, compat=compat, cluster_size=cluster_size, extended_l2=sub
    )
    layers, model = [], bytearray(size)
    snapshot = None
    if over:
        base = folder / "base"
        base.write_bytes(noise(700 * KIB))
        model[: 700 * KIB] = noise(700 * KIB)
        words = ["-u", "-b", str(base), "-F", "raw", *qemu.object]
        run("qemu-img", "rebase", *words, "--image-opts", qemu.options)
        layers.append(Layer("raw", base.read_bytes()))
    else:
        qemu.io("write -P 7 10k 200k")
        model[10 * KIB : 210 * KIB] = b"\7" * 200 * KIB
        words = [*qemu.object, "--image-opts", qemu.options]
        run("qemu-img", "snapshot", "-c", SNAPSHOT, *words)
        snapshot = bytes(model)
    layers.insert(0, Layer("qcow2", qemu.path.read_bytes()))
    return Prepared(
        layers, bytes(model), folder, cluster_size, snapshot, encrypted=True
    )


def legacy(fmt: str, options: str, folder: Path) -> Prepared:
    """An image with the encryption of before LUKS."""
    qemu = Qemu(folder / "aes", image_format=fmt)
    qemu.create(ODD, "aes", options)
    qemu.io("write -P 7 10k 200k")
    model = bytearray(ODD)
    model[10 * KIB : 210 * KIB] = b"\7" * 200 * KIB
    layers = [Layer(fmt, qemu.path.read_bytes())]
    cluster_size = cluster_size_of(fmt, options)
    return Prepared(layers, bytes(model), folder, cluster_size, encrypted=True)


ODD = MIB + 3 * 512

DISKS: dict[str, Build] = {
    "raw": partial(raw, MIB + 777),
    "qcow": partial(empty, "qcow", "", ODD),
    "qcow-filled": partial(filled, "qcow", "", ODD),
    "qcow-compressed": partial(filled, "qcow", "", ODD, compressed=True),
    "qcow-over-raw": partial(over, "qcow", "", ODD, "raw"),
    "qcow-over-qcow2": partial(over, "qcow", "", ODD, "qcow2"),
    "qcow-over-shorter": partial(
        over, "qcow", "", ODD, "raw", backing_size=700 * KIB + 512
    ),
    "v2": partial(empty, "qcow2", "compat=0.10", 3 * MIB),
    "v2-512": partial(filled, "qcow2", "compat=0.10,cluster_size=512", ODD),
    "v2-over-raw": partial(over, "qcow2", "compat=0.10", ODD, "raw"),
    "v2-over-shorter": partial(
        over, "qcow2", "compat=0.10", ODD, "raw", backing_size=700 * KIB + 512
    ),
    "v2-compressed": partial(filled, "qcow2", "compat=0.10", ODD, compressed=True),
    "v2-snapshot": partial(with_snapshot, "compat=0.10,cluster_size=4k", ODD),
    "v3": partial(empty, "qcow2", "", 3 * MIB),
    "v3-filled": partial(filled, "qcow2", "lazy_refcounts=on", ODD),
    "v3-512": partial(empty, "qcow2", "cluster_size=512", ODD),
    "v3-1k": partial(filled, "qcow2", "cluster_size=1k", ODD),
    "v3-4k": partial(empty, "qcow2", "cluster_size=4k", ODD),
    "v3-2M": partial(empty, "qcow2", "cluster_size=2M", 9 * MIB),
    "v3-preallocated": partial(
        empty, "qcow2", "preallocation=metadata,cluster_size=4k", ODD
    ),
    **{
        f"refcount-{bits}": partial(
            empty, "qcow2", f"refcount_bits={bits},cluster_size=512", ODD
        )
        for bits in (1, 2, 4, 8, 32, 64)
    },
    "over-raw": partial(over, "qcow2", "", ODD, "raw"),
    "over-raw-512": partial(over, "qcow2", "cluster_size=512", ODD, "raw"),
    "over-raw-2M": partial(over, "qcow2", "cluster_size=2M", 5 * MIB, "raw"),
    "over-qcow": partial(over, "qcow2", "cluster_size=4k", ODD, "qcow"),
    "over-zlib": partial(over, "qcow2", "", ODD, "qcow2", compressed=True),
    "over-shorter": partial(
        over, "qcow2", "", ODD, "raw", backing_size=700 * KIB + 512
    ),
    "over-longer": partial(
        over, "qcow2", "cluster_size=16k", ODD, "qcow2", backing_size=2 * MIB
    ),
    "chain-of-3": partial(over, "qcow2", "refcount_bits=8", ODD, "qcow", depth=3),
    "zlib": partial(filled, "qcow2", "cluster_size=16k", ODD, compressed=True),
    "zstd": partial(filled, "qcow2", "compression_type=zstd", ODD, compressed=True),
    "zstd-512": partial(
        filled,
        "qcow2",
        "compression_type=zstd,cluster_size=512",
        300 * KIB,
        compressed=True,
    ),
    "data-file": partial(with_data_file, "data_file_raw=off", ODD),
    "data-file-512": partial(with_data_file, "cluster_size=512", ODD),
    "data-file-subclusters": partial(
        with_data_file, "cluster_size=16k,extended_l2=on", ODD
    ),
    "data-file-subclusters-over-raw": partial(
        with_data_file, "cluster_size=32k,extended_l2=on", ODD, below=True
    ),
    "data-file-raw": partial(with_data_file, "cluster_size=4k,data_file_raw=on", ODD),
    "data-file-over-raw": partial(with_data_file, "cluster_size=16k", ODD, below=True),
    "snapshot": partial(with_snapshot, "", ODD),
    "snapshot-512": partial(with_snapshot, "cluster_size=512", ODD),
    "luks": partial(encrypted, 64 * KIB),
    "luks-4k": partial(encrypted, 4 * KIB),
    "luks-512-v2-over-shorter": partial(encrypted, 512, compat=2, over=True),
    "luks-sub": partial(encrypted, 32 * KIB, sub=True),
    "luks-sub-over-shorter": partial(encrypted, 32 * KIB, over=True, sub=True),
    "luks-over-shorter": partial(encrypted, 64 * KIB, over=True),
    "sub-aes": partial(legacy, "qcow2", "extended_l2=on"),
    "aes-4k": partial(legacy, "qcow2", "cluster_size=4k"),
    "qcow-aes": partial(legacy, "qcow", ""),
    "snapshot-refcount-2": partial(
        with_snapshot, "cluster_size=4k,refcount_bits=2", ODD
    ),
    "sub": partial(empty, "qcow2", "extended_l2=on", ODD),
    "sub-16k": partial(filled, "qcow2", "extended_l2=on,cluster_size=16k", ODD),
    "sub-2M": partial(over, "qcow2", "extended_l2=on,cluster_size=2M", 5 * MIB, "raw"),
    "sub-preallocated": partial(
        empty, "qcow2", "extended_l2=on,preallocation=metadata", ODD
    ),
    "sub-over-qcow2": partial(over, "qcow2", "extended_l2=on", ODD, "qcow2"),
    "sub-over-shorter": partial(
        over,
        "qcow2",
        "extended_l2=on,cluster_size=16k",
        ODD,
        "raw",
        backing_size=700 * KIB + 512,
    ),
    "sub-over-zlib": partial(
        over,
        "qcow2",
        "extended_l2=on,cluster_size=32k",
        ODD,
        "qcow2",
        backing_size=2 * MIB,
        compressed=True,
    ),
    "sub-zstd": partial(
        filled, "qcow2", "extended_l2=on,compression_type=zstd", ODD, compressed=True
    ),
    "sub-over-snapshot": partial(over_with_snapshot, "extended_l2=on", ODD),
    "sub-snapshot": partial(with_snapshot, "extended_l2=on,cluster_size=32k", ODD),
}
