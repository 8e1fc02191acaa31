"""How far a save is: bytes are counted once, never become fewer, and are told now and then."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dist_ckpt.saving.handle import ProgressMeter, SaveProgress
from tests.unit.ranks.rounds import on_every_rank

MIB = 1 << 20


def metered() -> tuple[ProgressMeter, list[SaveProgress]]:
    told: list[SaveProgress] = []
    return ProgressMeter(told.append), told


@given(
    files=st.lists(st.lists(st.integers(0, 40), max_size=12), max_size=5),
    again=st.lists(st.integers(0, 40), max_size=12),
)
def test_bytes_are_counted_once_and_never_fall(files: list[list[int]], again: list[int]) -> None:
    meter, told = metered()
    meter.enter("staging")
    meter.staged(sum(map(sum, files)))
    meter.enter("writing")
    for pieces in files:
        watch = meter.file(sum(pieces))
        # What a store sends again after a failure is shown again.
        for nbytes in (*pieces[:3], *again[:3], *pieces):
            watch(nbytes)
    meter.enter("committing")
    total = sum(map(sum, files))
    assert meter.now == SaveProgress("committing", total, total)
    done = [each.nbytes_done for each in told]
    assert done == sorted(done)
    assert all(each.nbytes_done <= each.nbytes_total or each.phase == "staging" for each in told)


def test_it_is_told_at_every_phase_and_not_much_more_often() -> None:
    meter, told = metered()
    meter.enter("staging")
    meter.staged(1000 * MIB)
    meter.enter("writing")
    watches = [meter.file(500 * MIB) for _ in range(2)]
    # Two files are written side by side.
    on_every_rank([lambda watch=watch: [watch(MIB) for _ in range(500)] for watch in watches])  # type: ignore[misc]
    meter.enter("committing")
    meter.enter("done")
    assert list(dict.fromkeys(each.phase for each in told)) == [
        "staging",
        "writing",
        "committing",
        "done",
    ]
    assert 10 <= len(told) <= 20
    assert told[-1] == meter.now == SaveProgress("done", 1000 * MIB, 1000 * MIB)


def test_what_leaves_before_all_is_staged_is_counted_too() -> None:
    meter, told = metered()
    meter.enter("staging")
    meter.file(10)(10)
    assert meter.now == SaveProgress("staging", 10, 10)
    meter.staged(30)
    meter.enter("writing")
    meter.file(20)(20)
    assert meter.now == SaveProgress("writing", 30, 30)
    assert [each.phase for each in told] == ["staging", "writing", "writing"]
