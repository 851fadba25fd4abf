"""The crash tests prove themselves: each planted fault is found, and nothing without one."""

import asyncio

import pytest

from nbdserve.errors import ImageError
from tests.crash.conftest import MakeImage
from tests.crash.examine import Effort, Examiner, Tally, ViolationError
from tests.crash.guest import MismatchError
from tests.crash.planted import PLANTED
from tests.crash.workload import Plan, record

pytestmark = [pytest.mark.crash, pytest.mark.timeout(120)]

_EFFORT = Effort(per_event=16, qemu=1 << 30, recover=1 << 30, cut_again=1 << 30)
_SEEDS = 25


@pytest.mark.replaces
@pytest.mark.parametrize("name", PLANTED)
def test_planted_fault_is_found(
    name: str, image_of: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = PLANTED[name]
    planted.plant(monkeypatch)

    async def crash(flavour: str, seed: int) -> None:
        image = image_of(flavour)
        if planted.live:
            await record(image, Plan(seed, requests=200, workers=6))
            return
        run = await record(image, Plan(seed, redo=planted.redo))
        if run.errors:
            raise ViolationError(f"requests fail: {run.errors[0]}")
        examiner = Examiner(image, Tally(), _EFFORT, seed)
        try:
            if planted.restart:
                at = seed * 7 % len(run.events)
                run = await examiner.restart(run, at, Plan(seed, requests=6))
            await examiner.kills(run)
            await examiner.power_cuts(run)
        finally:
            examiner.close()

    for seed in range(_SEEDS * 10 if planted.live else _SEEDS):
        for flavour in planted.flavours:
            try:
                asyncio.run(crash(flavour, seed))
            except (ViolationError, MismatchError, ImageError):
                return
    pytest.fail(f"{name} is not found in {_SEEDS} runs of {planted.flavours}")


@pytest.mark.parametrize(
    "flavour",
    ["v3-filled", "v1", "v2", "v3-512-snapshot", "v3-512-aes", "sub-snapshot"],
)
def test_busy_runs_read_right(flavour: str, image_of: MakeImage) -> None:
    """Without a fault the many busy runs find nothing."""
    image = image_of(flavour)
    for seed in range(40):
        asyncio.run(record(image, Plan(seed, requests=200, workers=6)))
