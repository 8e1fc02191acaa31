"""One of two hosts is lost at any moment of a save or of a restore: the job goes on at half size.

Two ranks on each, FSDP2, checkpoints on S3. A host is lost by SIGKILL of all that runs on it, or by
its cable: then nobody is told, and what runs there goes on without a network.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_ckpt.ranks.channels import SILENCE_SECONDS
from dist_ckpt.repository import Repository
from dist_ckpt.storage.resolve import resolve
from dist_ckpt.testing.ranks import run_ranks
from tests.crash.node_loss import MOMENTS, SAVE_EVERY, Life, Loss, train
from tests.services.hosts import Hosts
from tests.services.proxy import FaultProxy
from tests.services.s3 import S3Service

KILLED = [Loss(moment, "killed") for moment in MOMENTS]
CUT = [Loss(moment, "cut") for moment in MOMENTS]


@pytest.fixture
def s3_for_hosts(
    cables: Hosts, s3_service: S3Service, monkeypatch: pytest.MonkeyPatch
) -> Iterator[S3Service]:
    """The S3 server, where both hosts reach it."""
    with FaultProxy(s3_service.endpoint, cables.outside) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield s3_service


@pytest.mark.parametrize(
    "losses",
    [
        pytest.param([KILLED[0], CUT[1], KILLED[2]], id="some"),
        pytest.param(KILLED, id="killed", marks=pytest.mark.soak),
        pytest.param(CUT, id="cut", marks=pytest.mark.soak),
    ],
)
def test_a_host_is_lost(
    losses: list[Loss], cables: Hosts, s3_for_hosts: S3Service, s3_name: str, tmp_path: Path
) -> None:
    url = s3_for_hosts.url(s3_name)
    lives = []
    reported = 0
    for loss in losses:
        life, reported = lose(loss, url, reported, cables, tmp_path)
        lives.append(life)
        if loss.how == "cut":
            cables.mend(loss.host)
    half_until = reported + SAVE_EVERY + 1
    whole_until = half_until + SAVE_EVERY
    half = run_ranks(2, train, url, half_until, cables, 1 - losses[-1].host)[0]
    whole = run_ranks(4, train, url, whole_until, cables)[0]
    assert (half.resumed, whole.resumed) == (reported, reported + SAVE_EVERY)
    repository = Repository(resolve(url))
    assert all(repository.verify(step).ok for step in repository.steps())

    # The same sizes from the same steps on, and nothing lost.
    calm = str(tmp_path / "calm")
    stretches = ((4, reported), (2, half_until), (4, whole_until))
    planned = [run_ranks(size, train, calm, upto)[0] for size, upto in stretches]
    assert [half.losses, whole.losses] == [each.losses for each in planned[1:]], "in every bit"
    for life in lives:
        shared = life.losses.keys() & planned[0].losses.keys()
        assert all(life.losses[step] == planned[0].losses[step] for step in shared), "in every bit"
    # One rank with the whole batch: only the order differs in which numbers are added up.
    reference = run_ranks(1, train, str(tmp_path / "reference"), whole_until)[0].losses
    for step, value in {**half.losses, **whole.losses}.items():
        expected = float.fromhex(reference[step])
        assert math.isclose(float.fromhex(value), expected, rel_tol=1e-4), step


def lose(loss: Loss, url: str, reported: int, hosts: Hosts, folder: Path) -> tuple[Life, int]:
    """Go on at full size until a host is lost; return what a survivor did, and the newest step."""
    upto = reported + 2 * SAVE_EVERY  # the first save is reported, the second is struck
    found = run_ranks(
        *(4, train, url, upto, hosts, 0, (loss, str(folder))),
        expect_killed=loss.ranks,
        # Survivors that still connect to the lost ones, for a load, wait until these count as gone.
        timeout_seconds=2 * SILENCE_SECONDS,
    )
    first, second = (life for life in found if life is not None)
    for life in (first, second):
        assert life.error, f"{loss}: each survivor has an error"
        assert life.resumed in (reported, -1)
    newest = max(Repository(resolve(url)).steps(), default=0)
    saved = 0 if loss.moment.during == "restore" else SAVE_EVERY
    assert reported + saved <= newest <= upto, f"{loss}: at most one interval is lost"
    return first, newest
