"""Each changing call of a run fails once: its request gets the errno, and nothing else happens.

What was flushed stays, memory and file agree, later requests work; after a failed sync
nothing is acknowledged any more. Crashes after the fault lose no more than others do.
"""

import asyncio
import errno
import os

import pytest

from nbdserve.errors import ImageError
from tests.crash.conftest import MakeImage
from tests.crash.disk import Acknowledged, Fault, Faulted
from tests.crash.examine import TOTAL, Effort, Examiner, ViolationError
from tests.crash.flavours import Image
from tests.crash.workload import Plan, Run, record

_FULL = bool(os.environ.get("NBDSERVE_FULL"))
_SEEDS = 2 if _FULL else 1
#: One call in so many fails in the quick run, each one in the full run.
_STRIDE = 1 if _FULL else 24

pytestmark = [pytest.mark.crash, pytest.mark.timeout(3600 if _FULL else 120)]

#: errno, how much of a write arrives all the same, and how many calls in a row fail.
FAULTS = {
    "EIO": (errno.EIO, 0.0, 1),
    "ENOSPC": (errno.ENOSPC, 0.0, 1),
    "short": (errno.EIO, 0.5, 1),
    "whole": (errno.EIO, 1.0, 1),
    "full for a while": (errno.ENOSPC, 0.3, 6),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    "name",
    [
        "v3-filled",
        "v1-backed",
        "v3-512-many-blocks",
        "v3-512-table-grows",
        "v3-snapshot",
        "v2-compressed",
        "v3-backed",
        "sub-backed",
        "v3-data",
        "v3-data-raw",
        "v3-bitmaps",
        "v3-luks",
        "v1-aes",
    ],
)
def test_each_call_fails(name: str, fault: str, image_of: MakeImage) -> None:
    error, part, lasting = FAULTS[fault]
    image = image_of(name)
    for seed in range(_SEEDS):
        calls = asyncio.run(record(image, Plan(seed, requests=20))).disk.calls
        first = (seed + list(FAULTS).index(fault)) % _STRIDE
        for at in range(first, calls, _STRIDE):
            what = Fault(at, error, part, lasting)
            try:
                asyncio.run(_one(image, Plan(seed, requests=20, fault=what), seed))
            except BaseException as problem:
                TOTAL.violations.append(f"{name} {fault} call {at} seed {seed}")
                problem.add_note(f"{name}, {fault}, call {at}, seed {seed}")
                raise


async def _one(image: Image, plan: Plan, seed: int) -> None:
    assert plan.fault is not None
    run = await record(image, plan)
    _judge_errors(run, plan.fault)
    _judge_acknowledgements(run)
    examiner = Examiner(image, TOTAL, Effort(2, 5000, 200, 1 << 30), seed)
    try:
        await examiner.kills(run)
        await examiner.power_cuts(run)
    finally:
        examiner.close()


def _judge_errors(run: Run, fault: Fault) -> None:
    """Requests fail with the errno of the fault, or with EIO after a failed sync."""
    for error in run.errors:
        if isinstance(error, ImageError):
            raise ViolationError("a fault was taken for corruption") from error
        assert isinstance(error, OSError)
        wanted = {fault.error}
        if "flush" in run.disk.hit:
            wanted.add(errno.EIO)
        if error.errno not in wanted:
            raise ViolationError(f"a request got {error}") from error
    if "flush" not in run.disk.hit and not run.closed and not run.errors:
        raise ViolationError("closing failed, and nobody knows why")


def _judge_acknowledgements(run: Run) -> None:
    """After a failed sync nothing is acknowledged, whenever it began."""
    failed = False
    for event in run.events:
        if isinstance(event, Faulted) and event.kind == "flush":
            failed = True
        elif isinstance(event, Acknowledged) and failed:
            request = run.requests[event.request]
            raise ViolationError(f"{request.text or request.kind} after a failed sync")
