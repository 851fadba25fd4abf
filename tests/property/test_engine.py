"""Random requests, several in flight, against a bytearray, on every kind of disk.

Each example opens a disk in memory, runs batches of requests on a storage that
waits at its whim, reopens now and then, and ends with what qemu-img finds in the file.
NBDSERVE_FULL=1 runs many more examples, new ones each time.
"""

import asyncio
import os
import random
from pathlib import Path

import pytest
import uvloop
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from nbdserve.block.device import BlockDevice
from nbdserve.formats.chain import driver_with
from nbdserve.formats.crypto.secret import Secret
from nbdserve.formats.mapped.image import MappedImage
from nbdserve.formats.mapped.opening import EngineOptions
from nbdserve.formats.mapped.redo import RedoLog
from nbdserve.formats.open import drivers
from nbdserve.storage.base import Buffer, Storage
from nbdserve.storage.faults import WrappedStorage
from nbdserve.storage.memory import MemoryStorage
from tests.helpers.encrypted import PASSPHRASE, Qemu
from tests.helpers.tools import run
from tests.property.disks import DATA_FILE, DISKS, SNAPSHOT, Prepared
from tests.property.oracle import Operation, Oracle

FULL = bool(os.environ.get("NBDSERVE_FULL"))
EXAMPLES = 60 if FULL else 7
#: An example that hangs has a deadlock; the slowest takes a few seconds.
HANG_S = 50.0

pytestmark = [pytest.mark.interop, pytest.mark.timeout(1800 if FULL else 60)]


class WhimsicalStorage(WrappedStorage):
    """Does some calls at once, and lets others wait a few turns of the loop."""

    def __init__(self, inner: Storage, generator: random.Random) -> None:
        super().__init__(inner)
        self._generator = generator

    def try_read(self, offset: int, view: memoryview) -> bool:
        return self._generator.random() < 0.5 and super().try_read(offset, view)

    def try_write(self, offset: int, data: Buffer) -> bool:
        return self._generator.random() < 0.5 and super().try_write(offset, data)

    async def _suspend(self) -> None:
        for _ in range(self._generator.choice((0, 1, 1, 2, 7))):
            await asyncio.sleep(0)


class Example:
    """One disk, opened perhaps several times, and what it should have."""

    def __init__(self, prepared: Prepared, knobs: "Knobs") -> None:
        self.prepared = prepared
        self.knobs = knobs
        self.oracle = Oracle(bytearray(prepared.model))
        self.content = prepared.layers[0].content
        self.data_file = prepared.data_file
        self.generator = random.Random(knobs.seed)
        self.options = EngineOptions(
            table_cache=knobs.table_cache,
            commit_interval_s=knobs.commit_interval_s,
            secrets=(Secret(PASSPHRASE),) if prepared.encrypted else (),
        )

    async def run(self, sessions: list[list[list[Operation]]]) -> None:
        for session in sessions:
            memory = MemoryStorage(self.content, name="top")
            data = MemoryStorage(self.data_file or b"", name="data file")
            device = await self.open(memory, data)
            try:
                for batch in session:
                    await self.run_batch(device, batch)
            finally:
                await device.close()
            self.content = memory.content()
            if self.data_file is not None:
                self.data_file = data.content()

    async def open(self, memory: MemoryStorage, data: MemoryStorage) -> BlockDevice:
        device: BlockDevice | None = None
        table = drivers(self.options)
        for layer in reversed(self.prepared.layers[1:]):
            below = MemoryStorage(layer.content, read_only=True, name="backing")
            device = await table[layer.fmt].open(
                WhimsicalStorage(below, self.generator),
                read_only=True,
                backing=device,
                writethrough=False,
            )
        driver = table[self.prepared.layers[0].fmt]
        if self.data_file is not None:
            driver = driver_with(driver, WhimsicalStorage(data, self.generator))
        top = await driver.open(
            WhimsicalStorage(memory, self.generator),
            read_only=False,
            backing=device,
            writethrough=self.knobs.writethrough,
        )
        if self.knobs.redo and isinstance(top, MappedImage):
            top.use_redo(RedoLog(self.prepared.folder / "example.redo"))
        return top

    async def run_batch(self, device: BlockDevice, batch: list[Operation]) -> None:
        self.oracle.begin(batch)
        await asyncio.gather(*(self.do(device, each) for each in batch))
        self.oracle.settle(await device.read(0, device.size))

    async def do(self, device: BlockDevice, operation: Operation) -> None:
        offset, length = operation.offset, operation.length
        match operation.kind:
            case "write" | "fua":
                await device.write(
                    offset, operation.data(), fua=operation.kind == "fua"
                )
            case "zero" | "zero-data":
                unmap = operation.kind == "zero"
                await device.write_zeroes(offset, length, may_unmap=unmap)
            case "trim":
                await device.trim(offset, length)
            case "flush":
                await device.flush()
            case "cache":
                await device.cache(offset, length)
            case "status":
                extents = await device.block_status(offset, length)
                assert sum(each.length for each in extents) == length
            case _:
                buffer = bytearray(length)
                holes = await device.read_into(offset, memoryview(buffer))
                self.oracle.judge_read(offset, bytes(buffer))
                for start, size in holes:
                    assert not any(buffer[start : start + size])

    async def judge_status(self) -> None:
        """What is said to be zero reads as zeros; nothing is left out."""
        data = MemoryStorage(self.data_file or b"")
        device = await self.open(MemoryStorage(self.content), data)
        try:
            extents = await device.block_status(0, device.size)
            position = 0
            for extent in extents:
                end = position + extent.length
                if extent.zero:
                    assert not any(self.oracle.content[position:end]), hex(position)
                position = end
            assert position == device.size
        finally:
            await device.close()

    def judge_with_qemu(self) -> None:
        prepared = self.prepared
        fmt = prepared.layers[0].fmt
        path = prepared.folder / "result"
        path.write_bytes(self.content)
        if self.data_file is not None:
            (prepared.folder / DATA_FILE).write_bytes(self.data_file)
        expected = prepared.folder / "expected"
        expected.write_bytes(self.oracle.content)
        if prepared.encrypted:
            self.judge_encrypted(Qemu(path, image_format=fmt))
            return
        run("qemu-img", "compare", "-f", fmt, "-F", "raw", path, expected)
        if fmt != "qcow2":
            return
        run("qemu-img", "check", path)
        if prepared.snapshot is not None:
            expected.write_bytes(prepared.snapshot)
            out = prepared.folder / "snapshot"
            run("qemu-img", "convert", "-l", SNAPSHOT, "-O", "raw", path, out)
            assert out.read_bytes() == prepared.snapshot
            run("qemu-img", "snapshot", "-a", SNAPSHOT, path)
            run("qemu-img", "compare", "-f", fmt, "-F", "raw", path, expected)
            run("qemu-img", "check", path)

    def judge_encrypted(self, qemu: Qemu) -> None:
        assert qemu.content() == self.oracle.content
        if qemu.format != "qcow2":
            return
        qemu.check()
        if self.prepared.snapshot is not None:
            words = [*qemu.object, "--image-opts", qemu.options]
            run("qemu-img", "snapshot", "-a", SNAPSHOT, *words)
            assert qemu.content() == self.prepared.snapshot
            qemu.check()


class Knobs:
    """How the engine is set up in one example."""

    def __init__(
        self,
        seed: int,
        redo: bool = False,
        writethrough: bool = False,
        tiny: bool = False,
        eager: bool = False,
    ) -> None:
        self.seed = seed
        self.redo = redo
        self.writethrough = writethrough
        self.table_cache = 1 if tiny else 32 << 20
        self.commit_interval_s = 0.001 if eager else 1.0

    def __repr__(self) -> str:
        return f"Knobs({vars(self)})"


KINDS = ["write", "write", "write", "fua", "zero", "zero-data", "trim", "read"]
RARE_KINDS = ["status", "cache", "flush"]


@st.composite
def operations(draw: st.DrawFn, size: int, cluster_size: int) -> Operation:
    """Requests around a few places, so that they meet."""
    kind = draw(st.sampled_from([*KINDS, *KINDS, *RARE_KINDS]))
    grain = draw(st.sampled_from([cluster_size, 4096, 512, 1]))
    most = min(size, max(4 * cluster_size, 200_000))
    near = draw(st.integers(0, 3)) * (size // 4)
    offset = near + draw(st.integers(0, max(most // grain // 2, 1))) * grain
    offset = min(offset, size - 1)
    length = draw(st.integers(1, max(most // grain // 2, 1))) * grain
    if draw(st.booleans()):
        length = min(length, draw(st.sampled_from([512, 4096, cluster_size])))
    length = min(length, size - offset)
    return Operation(kind, offset, length, draw(st.integers(0, 1 << 32)))


@pytest.fixture
def prepared(
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> Prepared:
    name: str = request.param
    return DISKS[name](tmp_path)


@pytest.mark.parametrize("prepared", DISKS, indirect=True)
def test_requests_in_flight_against_a_model(prepared: Prepared) -> None:
    size = len(prepared.model)
    batch = st.lists(operations(size, prepared.cluster_size), min_size=1, max_size=12)
    session = st.lists(batch, min_size=1, max_size=5)

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=not FULL,
        database=None,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(
        sessions=st.lists(session, min_size=1, max_size=2),
        knobs=st.builds(
            Knobs,
            st.integers(0, 1 << 32),
            st.booleans(),
            st.sampled_from([False, False, False, True]),
            st.booleans(),
            st.booleans(),
        ),
        on_uvloop=st.booleans(),
    )
    def check(
        sessions: list[list[list[Operation]]], knobs: Knobs, on_uvloop: bool
    ) -> None:
        example = Example(prepared, knobs)
        factory = uvloop.new_event_loop if on_uvloop else asyncio.new_event_loop

        async def bounded() -> None:
            async with asyncio.timeout(HANG_S):
                await example.run(sessions)
                await example.judge_status()

        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(bounded())
        example.judge_with_qemu()

    check()


@pytest.mark.parametrize(
    ("prepared", "kind"),
    [("v3-2M", "zero-data"), ("v3-2M", "zero"), ("data-file", "zero-data")],
    indirect=["prepared"],
)
async def test_no_sector_is_in_two_pieces(prepared: Prepared, kind: str) -> None:
    """Long zeroes that begin anywhere, and writes, end sector by sector as one of them."""
    size = len(prepared.model)
    batch = [
        Operation("write", 0, size, 1),
        Operation(kind, 1, size - 2, 0),
        Operation("write", 0, size, 2),
        Operation(kind, 3, size - 3, 0),
    ]
    for seed in range(4):
        example = Example(prepared, Knobs(seed))
        await example.run([[batch[seed % 2 :], batch]])
