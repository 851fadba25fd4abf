import asyncio
import types
from collections.abc import Awaitable, Coroutine, Generator
from typing import Any, TypeVar

import pytest

from nbdserve.server.inline import go_on

T = TypeVar("T")


def start(
    loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, T]
) -> tuple[bool, T | asyncio.Future[T]]:
    """Do as the session does."""
    try:
        waits_for = coroutine.send(None)
    except StopIteration as outcome:
        return True, outcome.value
    end = loop.create_future()

    def finished(result: T, failure: BaseException | None) -> None:
        if failure is None:
            end.set_result(result)
        else:
            end.set_exception(failure)

    go_on(loop, coroutine, waits_for, finished)
    return False, end


async def test_a_coroutine_that_need_not_wait_needs_no_task() -> None:
    async def instant() -> int:
        return 7

    before = asyncio.all_tasks()
    assert start(asyncio.get_running_loop(), instant()) == (True, 7)
    assert asyncio.all_tasks() == before


async def test_an_exception_of_the_first_step_comes_at_once() -> None:
    async def fails() -> None:
        raise OSError(5, "no")

    with pytest.raises(OSError, match="no"):
        start(asyncio.get_running_loop(), fails())


def suspended(coroutine: Coroutine[Any, Any, T]) -> asyncio.Future[T]:
    done, end = start(asyncio.get_running_loop(), coroutine)
    assert not done
    assert isinstance(end, asyncio.Future)
    return end


async def test_two_inline_waiters_of_one_future() -> None:
    future: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def wait(plus: int) -> int:
        return await future + plus

    tasks = [suspended(wait(plus)) for plus in (1, 2, 3)]
    ordinary = asyncio.create_task(wait(4))
    await asyncio.sleep(0)
    future.set_result(10)

    assert await asyncio.gather(*tasks, ordinary) == [11, 12, 13, 14]


async def test_a_future_that_is_done_at_once() -> None:
    future: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def wait() -> int:
        return await future

    end = suspended(wait())
    future.set_result(5)
    assert await end == 5


async def test_the_exception_of_what_is_awaited_arrives() -> None:
    future: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def wait() -> str:
        try:
            await future
        except OSError as error:
            return error.strerror or ""
        return "nothing"

    end = suspended(wait())
    await asyncio.sleep(0)
    future.set_exception(OSError(5, "told"))
    assert await end == "told"


async def test_who_waits_for_something_cancelled_sees_that() -> None:
    future: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def wait() -> str:
        try:
            await future
        except asyncio.CancelledError:
            return "cancelled"
        return "nothing"

    end = suspended(wait())
    future.cancel()
    assert await end == "cancelled"


async def test_an_exception_of_a_later_step_is_told() -> None:
    async def fails() -> None:
        await asyncio.sleep(0)
        raise OSError(5, "late")

    with pytest.raises(OSError, match="late"):
        await suspended(fails())


async def test_a_bare_yield_and_sleep_zero() -> None:
    @types.coroutine
    def bare() -> Generator[None]:
        yield

    async def several() -> int:
        await bare()
        await asyncio.sleep(0)
        await asyncio.sleep(0.001)
        return await asyncio.to_thread(lambda: 3)

    assert await suspended(several()) == 3


async def test_something_strange_that_is_yielded_is_an_error() -> None:
    @types.coroutine
    def strange() -> Generator[object]:
        yield "strange"

    async def wait() -> None:
        await strange()

    with pytest.raises(RuntimeError, match="strange"):
        await suspended(wait())


async def test_who_survives_its_strange_yield_goes_on() -> None:
    @types.coroutine
    def strange() -> Generator[object]:
        yield "strange"

    async def wait() -> int:
        try:
            await strange()
        except RuntimeError:
            await asyncio.sleep(0)
        return 4

    assert await suspended(wait()) == 4


async def test_locks_and_nested_tasks() -> None:
    lock = asyncio.Lock()
    order = []

    async def locked(number: int, inner: Awaitable[None]) -> None:
        async with lock:
            await inner
            order.append(number)

    tasks = [suspended(locked(n, asyncio.sleep(0.001))) for n in range(5)]
    await asyncio.gather(*tasks)
    assert order == [0, 1, 2, 3, 4]
