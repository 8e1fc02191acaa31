"""The same on several ranks and on S3: sizes, layouts, kills, and trainers of other libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import dist_ckpt
from dist_ckpt import Run
from dist_ckpt.testing.ranks import run_ranks
from tests.integrations.training import (
    SAMPLES,
    equal,
    net,
    train_and_tell,
    train_until_killed,
    weights,
)
from tests.services.s3 import S3Service

pytestmark = [
    pytest.mark.soak,
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
]

LONG = 600.0
# Four samples a step, by as many ranks as there are.
BY_RANKS: dict[int, dict[str, Any]] = {
    n: {"per_device_train_batch_size": 4 // n} for n in (1, 2, 4)
}
SHARDED: dict[str, Any] = {
    "fsdp": True,
    "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["GPT2Block"]},
}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def train(n: int, out: object, resume: Any = None, **settings: Any) -> list[tuple[Any, Any]]:
    chosen = {**BY_RANKS[n], **settings}
    return run_ranks(n, train_and_tell, str(out), resume, chosen, timeout_seconds=LONG)


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_two_ranks_one_killed_go_on_bit_by_bit(layout: str, tmp_path: Path) -> None:
    settings = {**BY_RANKS[2], **(SHARDED if layout == "fsdp2" else {})}
    whole = train(2, tmp_path / "whole", **settings)
    out = str(tmp_path / "run")
    run_ranks(2, train_until_killed, out, 8, settings, expect_killed={0, 1}, timeout_seconds=LONG)
    assert Run(out).steps() == [2, 4, 6]
    resumed = train(2, out, True, **settings)
    assert [told for told, _ in resumed] == [told for told, _ in whole]
    fresh = net()
    dist_ckpt.load_weights(fresh, out)
    straight = net()
    dist_ckpt.load_weights(straight, tmp_path / "whole")
    assert equal(weights(fresh), weights(straight))


@pytest.mark.timeout(1500)
def test_two_ranks_then_one_then_four_take_each_sample_once(tmp_path: Path) -> None:
    out = tmp_path / "run"
    whole, _ = train(1, tmp_path / "whole")[0]
    first = train(2, out, max_steps=2, lr_scheduler_type="constant")
    second = train(1, out, True, max_steps=4, lr_scheduler_type="constant")
    third = train(4, out, True, max_steps=6, lr_scheduler_type="constant")
    told = third[0][0]
    assert list(told) == [1, 2, 3, 4, 5, 6]
    assert told[1] == pytest.approx(whole[1], rel=0.2), "it is the same training"
    seen = [index for _, by_rank in (*first, *second, *third) for index in by_rank]
    assert sorted(seen) == list(range(SAMPLES))


@pytest.mark.timeout(1500)
def test_sharded_by_two_goes_on_whole_by_one(tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(2, out, max_steps=4, **SHARDED)
    ((told, _),) = train(1, out, True)
    assert list(told) == list(range(1, 13))
    assert train(2, out, True, num_train_epochs=3, **SHARDED)[0][0].keys() == set(range(1, 19))


@pytest.mark.timeout(1500)
def test_s3(s3_service: S3Service, s3_name: str, tmp_path: Path) -> None:
    url = s3_service.url(s3_name)
    settings = {**BY_RANKS[2], "save_total_limit": 2}
    whole = train(2, tmp_path / "whole", **settings)
    run_ranks(2, train_until_killed, url, 8, settings, expect_killed={0, 1}, timeout_seconds=LONG)
    resumed = train(2, url, True, **settings)
    assert [told for told, _ in resumed] == [told for told, _ in whole]
    # The two newest, and what the run went on from: a job that is started again may want that.
    assert Run(url).steps() == [6, 10, 12]
