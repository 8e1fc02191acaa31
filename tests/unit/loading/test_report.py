"""How a load is told to people."""

from __future__ import annotations

from dataclasses import replace

from dist_ckpt.loading.loader import LoadReport

REPORT = LoadReport(
    url="/runs/17",
    step=500,
    save_id="c000001-0123456789abcdef",
    parts=("model", "optimizer"),
    loaded=("model/a", "model/b", "optimizer/state.a.exp_avg"),
    missing=(),
    unexpected=(),
    casts=(),
    nbytes_wanted=3 << 30,
    nbytes_read=1 << 20,
    nbytes_exchanged=2000,
    exchanged=True,
    exchange_reason="3.0 GiB are wanted by several ranks",
    verified=True,
    seconds=1.25,
    seconds_by_phase={"choose": 0.25, "read": 1.0},
    saved_world_size=8,
    world_size=4,
)


def test_all_of_a_plain_load() -> None:
    assert str(REPORT).splitlines() == [
        "loaded step 500 of /runs/17 (c000001-0123456789abcdef), saved by 8 ranks, by 4 now",
        "  3 tensors of model, optimizer: 3.0 GiB, verified",
        "  1.0 MiB read, 2.0 KiB received (3.0 GiB are wanted by several ranks)",
        "  1.25 s: choose 0.25, read 1.00",
    ]
    assert REPORT.tensors == 3


def test_what_is_out_of_the_ordinary_gets_lines_of_its_own() -> None:
    names = tuple(f"model/{number}" for number in range(7))
    odd = replace(
        REPORT,
        missing=names,
        casts=("model/a: stored float32[2], wanted bfloat16[2]",),
        verified=False,
        saved_world_size=0,
        refused={510: "file x is missing"},
        nbytes_read=12,
    )
    text = str(odd)
    assert "saved by an unknown number of ranks" in text
    assert "NOT verified" in text
    assert "12 B read" in text
    assert text.splitlines()[-3:] == [
        "  missing: model/0, model/1, model/2, model/3, model/4 and 2 more",
        "  casts: model/a: stored float32[2], wanted bfloat16[2]",
        "  passed over step 510: file x is missing",
    ]
