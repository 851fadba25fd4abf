"""No power cut and no kill loses anything that it must not, on any kind of image."""

import asyncio
import os
import random
from itertools import count

import pytest

from tests.crash.conftest import MakeImage
from tests.crash.examine import TOTAL, Effort, Examiner, ViolationError
from tests.crash.flavours import FLAVOURS, Image
from tests.crash.guest import MismatchError
from tests.crash.workload import Plan, record

_FULL = bool(os.environ.get("NBDSERVE_FULL"))
#: Distinct states of each flavour.
STATES = 11_000 if _FULL else 1_050
#: Every so often a short run, of which all subsets are tried where up to 12 are pending.
SHORT_RUN = 6
ALL_SUBSETS = 4096 if _FULL else 256

pytestmark = [pytest.mark.crash, pytest.mark.timeout(900 if _FULL else 120)]


async def one_run(image: Image, seed: int) -> None:
    """Record a run, then examine what crashes leave of it."""
    if seed % SHORT_RUN == SHORT_RUN - 1:
        plan = Plan(seed, requests=4, workers=2, redo=seed % 4 != 1)
        effort = Effort(per_event=ALL_SUBSETS)
    else:
        plan = Plan(seed, workers=1 + seed % 4, redo=seed % 3 != 0)
        # those of compaction are long, and of large files
        few = 4 if image.flavour.compacting else 10
        effort = Effort(per_event=24 if _FULL else few)
    run = await record(image, plan)
    assert not run.errors
    examiner = Examiner(image, TOTAL, effort, seed)
    try:
        await examiner.kills(run)
        await examiner.power_cuts(run)
    finally:
        examiner.close()


@pytest.mark.parametrize("name", FLAVOURS)
def test_crash_loses_nothing(name: str, image_of: MakeImage) -> None:
    image = image_of(name)
    before = TOTAL.distinct
    for seed in count():
        if TOTAL.distinct - before >= STATES:
            break
        try:
            asyncio.run(one_run(image, seed))
        except (ViolationError, MismatchError) as error:
            TOTAL.violations.append(f"{name} seed {seed}: {error}")
            raise


async def one_restart(image: Image, seed: int) -> None:
    """Kill the server, let another one go on, then cut the power."""
    chance = random.Random(seed)
    first = await record(image, Plan(seed, close=False, redo=seed % 3 != 0))
    examiner = Examiner(image, TOTAL, Effort(4, 5000, 400, 1 << 30), seed)
    try:
        for _ in range(3):
            at = chance.randrange(len(first.events))
            plan = Plan(chance.randrange(1 << 30), requests=6, redo=seed % 3 != 0)
            both = await examiner.restart(first, at, plan)
            assert not both.errors
            await examiner.kills(both)
            await examiner.power_cuts(both)
    finally:
        examiner.close()


@pytest.mark.parametrize("name", ["v3", "v1", "v3-backed", "v1-backed", "v3-snapshot"])
def test_what_a_killed_server_left_is_flushed_by_the_next(
    name: str, image_of: MakeImage
) -> None:
    image = image_of(name)
    for seed in range(40 if _FULL else 5):
        try:
            asyncio.run(one_restart(image, seed))
        except (ViolationError, MismatchError) as error:
            TOTAL.violations.append(f"{name} restart seed {seed}: {error}")
            raise
