"""Several buffers filled as one: the same bytes as in one buffer, and none around them touched."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dist_ckpt.storage.base import Scatter


def views_of(memory: bytearray, sizes: list[int]) -> list[memoryview]:
    """Return views of these sizes, with a byte that is nobody's before each."""
    views, start = [], 1
    for size in sizes:
        views.append(memoryview(memory)[start : start + size])
        start += size + 1
    return views


@given(st.lists(st.integers(0, 5), max_size=6), st.data())
def test_a_write_goes_where_it_would_in_one_buffer(sizes: list[int], data: st.DataObject) -> None:
    memory = bytearray(b"." * (sum(sizes) + len(sizes) + 1))
    views = views_of(memory, sizes)
    scatter = Scatter(views)
    assert scatter.nbytes == sum(sizes)
    start = data.draw(st.integers(0, sum(sizes)))
    stop = data.draw(st.integers(start, sum(sizes)))
    scatter.write(start, bytes(range(1, stop - start + 1)))
    expected = bytearray(b"." * sum(sizes))
    expected[start:stop] = bytes(range(1, stop - start + 1))
    assert b"".join(views) == expected
    assert memory.count(b".") == len(memory) - (stop - start)


@given(st.lists(st.integers(0, 5), max_size=6), st.data())
def test_a_cut_is_of_the_same_bytes(sizes: list[int], data: st.DataObject) -> None:
    memory = bytearray(range(sum(sizes) + len(sizes) + 1))
    views = views_of(memory, sizes)
    start = data.draw(st.integers(0, sum(sizes)))
    stop = data.draw(st.integers(start, sum(sizes)))
    found = Scatter(views).cut(start, stop)
    assert b"".join(found) == b"".join(views)[start:stop]
    assert all(view.nbytes for view in found)
