"""Turnstiles and pins: who waits for whom, and what cancelling a waiter does."""

import asyncio

import pytest

from nbdserve.formats.mapped.waits import Pins, Turnstile


async def turn() -> None:
    """Let everything that is ready run."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_everyone_who_waits_at_a_turnstile_wakes_when_it_is_left() -> None:
    turnstile: Turnstile[int] = Turnstile()
    assert 7 not in turnstile
    assert not turnstile
    turnstile.enter(7)
    assert 7 in turnstile
    assert turnstile
    assert 8 not in turnstile
    waiters = [asyncio.create_task(turnstile.wait(7)) for _ in range(3)]
    await turn()
    assert not any(waiter.done() for waiter in waiters)
    turnstile.leave(7)
    assert 7 not in turnstile
    await asyncio.gather(*waiters)


async def test_a_cancelled_waiter_takes_nobody_with_it() -> None:
    turnstile: Turnstile[str] = Turnstile()
    turnstile.enter("x")
    first = asyncio.create_task(turnstile.wait("x"))
    second = asyncio.create_task(turnstile.wait("x"))
    await turn()
    first.cancel()
    await turn()
    assert first.cancelled()
    assert not second.done()
    turnstile.leave("x")
    await second


async def test_pins_are_drained_at_once_if_there_are_none() -> None:
    pins = Pins()
    await asyncio.wait_for(pins.drained(), 5)
    pins.leave(pins.enter())
    await asyncio.wait_for(pins.drained(), 5)


async def test_drained_waits_for_what_began_before_and_for_nothing_else() -> None:
    pins = Pins()
    old = [pins.enter(), pins.enter()]
    drained = asyncio.create_task(pins.drained())
    await turn()
    younger = pins.enter()
    pins.leave(old[0])
    await turn()
    assert not drained.done()
    pins.leave(old[1])
    await asyncio.wait_for(drained, 5)
    pins.leave(younger)


async def test_a_younger_pin_that_ends_first_wakes_nobody() -> None:
    pins = Pins()
    old = pins.enter()
    first = asyncio.create_task(pins.drained())
    await turn()
    middle = pins.enter()
    second = asyncio.create_task(pins.drained())
    await turn()
    pins.leave(pins.enter())
    pins.leave(middle)
    await turn()
    assert not first.done()
    assert not second.done(), "the oldest pin is under way"
    pins.leave(old)
    await asyncio.wait_for(asyncio.gather(first, second), 5)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
async def test_each_generation_wakes_in_its_turn(order: tuple[int, int, int]) -> None:
    pins = Pins()
    held: list[int] = []
    drained: list[asyncio.Task[None]] = []
    for _ in range(3):
        held.append(pins.enter())
        drained.append(asyncio.create_task(pins.drained()))
        await turn()
    left: set[int] = set()
    for number in order:
        pins.leave(held[number])
        left.add(number)
        await turn()
        for each in range(3):
            assert drained[each].done() == (set(range(each + 1)) <= left)


async def test_a_cancelled_waiter_for_pins_is_forgotten() -> None:
    pins = Pins()
    pin = pins.enter()
    first = asyncio.create_task(pins.drained())
    second = asyncio.create_task(pins.drained())
    await turn()
    first.cancel()
    await turn()
    pins.leave(pin)
    await asyncio.wait_for(second, 5)
