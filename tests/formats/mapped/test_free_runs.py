import itertools

from hypothesis import given
from hypothesis import strategies as st

from nbdserve.formats.mapped.free_runs import FreeRuns


@given(st.lists(st.integers(0, 60), unique=True), st.integers(1, 8), st.integers(0, 70))
def test_runs_join_and_are_taken(
    clusters: list[int], contiguous: int, wanted: int
) -> None:
    free = FreeRuns()
    for cluster in clusters:
        free.add(cluster, 1)
    runs = sorted(free.runs())

    assert [c for s, n in runs for c in range(s, s + n)] == sorted(clusters)
    assert all(a + n < b for (a, n), (b, _) in itertools.pairwise(runs))
    for start, count in runs:
        assert free.last_before(start + count) == start

    taken = free.take(wanted, contiguous)

    assert all(count >= contiguous for _, count in taken)
    assert sum(count for _, count in taken) <= wanted
    left = {c for s, n in free.runs() for c in range(s, s + n)}
    out = {c for s, n in taken for c in range(s, s + n)}
    assert left | out == set(clusters)
    assert not left & out


def test_nothing_ends_there() -> None:
    free = FreeRuns()
    free.add(3, 2)
    assert free.last_before(9) == 9
