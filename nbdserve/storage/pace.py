"""When to make a system call on the event loop, and when in a thread.

A thread costs 25 to 100 us, a buffered 4 KiB write 2 us: so calls run on the loop
while they are quick. But no flag asks ext4 whether a buffered write would wait, so
the only way to know is to measure.

A write (`FileStorage.try_write` and `write`) is made in a thread

- if it is longer than 4 MiB (`INLINE_LIMIT`), or has to be durable when it returns;
- if writes to this file have been throttled, that is, have slept for 100 ms together lately (`Pace`): then for
  0.1 s, and up to 3.2 s if the next attempt on the loop is slow again. So a throttled image holds up the
  clients of others for about 100 ms, in sleeps of 10 to 16 ms, before each such pause.
"""

#: A call that took longer than this waited for something: 4 KiB written to the page
#: cache takes 2 us (p99 7 us), 1 MiB 350 us, the largest inline call (4 MiB) 1.4 ms.
STALL_S = 0.003

#: How much waiting may add up before calls move to threads. A writer whom the kernel
#: throttles (balance_dirty_pages) sleeps inside the call: measured on ext4 with 8 MiB
#: of dirty pages allowed (bdi strict_limit), 10 to 16 ms at a time, in one of 1,700
#: 4 KiB writes and one of 8 1 MiB writes; the kernel's own limit is 200 ms (MAX_PAUSE).
#: So several sleeps in a row move the writes. One wait for the journal to commit (40 to
#: 80 ms, measured beside an fdatasync of 500 MiB) does not: it is over when it is noticed. Other stalls of
#: a few ms (a page that must be read before a part of it is written; being scheduled out)
#: count when they come close together.
BUDGET_S = 0.100

#: Waiting is forgiven at this rate: at most 2 % of the time is spent in stalls.
FORGIVEN = 0.02

#: How long calls stay in threads before the next attempt on the loop, the first time. A
#: thread for each 4 KiB write costs more than half of the throughput (measured: 20,000
#: copying writes a second became 4,000), so one hiccup of the journal must not be
#: paid for long. Where it was no hiccup the pause doubles each time.
PAUSE_S = 0.1
LONGEST_PAUSE_S = 3.2


class Pace:
    """Decides for one kind of call on one file.

    The owner times each inline call with `time.perf_counter` and reports those above
    `STALL_S`. That pair of readings costs 0.1 us.

    Attributes:
        resume_at_s: Calls run in threads while `time.perf_counter()` is below this.
    """

    __slots__ = ("_pause_s", "_stalled_at_s", "_stalled_s", "resume_at_s")

    def __init__(self) -> None:
        self.resume_at_s = 0.0
        self._pause_s = PAUSE_S
        self._stalled_s = 0.0
        self._stalled_at_s = 0.0

    def stalled(self, start_s: float, end_s: float) -> None:
        """Account for an inline call that was slower than `STALL_S`."""
        forgiven_s = (start_s - self._stalled_at_s) * FORGIVEN
        self._stalled_s = max(0.0, self._stalled_s - forgiven_s) + end_s - start_s
        self._stalled_at_s = end_s
        if self._stalled_s > BUDGET_S:
            self._stalled_s = 0.0
            if end_s - self.resume_at_s < LONGEST_PAUSE_S:
                self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
            else:
                self._pause_s = PAUSE_S
            self.resume_at_s = end_s + self._pause_s
