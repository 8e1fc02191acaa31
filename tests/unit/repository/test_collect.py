"""What is deleted, in which order, and what never is (commit-v1, section 6)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_ckpt.errors import ErrorKind, FencedError, NotFound, StorageError
from dist_ckpt.format.names import manifest_key, new_save_id, step_dir
from dist_ckpt.format.whole import encode_whole
from dist_ckpt.repository import Repository, keep
from dist_ckpt.repository.history import collect_garbage, delete_checkpoint
from dist_ckpt.storage.local import LocalStore
from dist_ckpt.storage.s3 import S3Store
from dist_ckpt.storage.s3_client import Client
from dist_ckpt.testing.stores import CrashStore, Fail, FaultyStore, Operation, Rule
from tests.unit.repository.runs import MODEL, commit, keys, manifest_of, new_store, put_files, save
from tests.unit.storage.fake_s3 import FakeS3

FOREIGN = (
    "notes.txt",
    "step-0000000001/README",
    "step-0000000001/plots/loss.png",
    "step-1/manifest.json",
    "step-0000000001/c000001-zzzzzzzzzzzzzzzz/index.msgpack",
    "claims/old.json",
)


def test_retention_keeps_what_the_policy_keeps() -> None:
    store = new_store()
    claim = save(store, 1, 2, 3, 4)
    gone = Repository(store).retain(keep.latest(2), claim=claim, protected={1})
    assert dict(gone) == {2: "not kept by keep.latest(2)"}
    assert Repository(store).steps() == [1, 3, 4]
    assert not [key for key in keys(store) if key.startswith(step_dir(2))]
    for step in (1, 3, 4):
        assert Repository(store).verify(step).ok


def test_a_job_that_was_replaced_deletes_nothing() -> None:
    store = new_store()
    old = save(store, 1, 2)
    Repository(store).claim()
    before = keys(store)
    with pytest.raises(FencedError):
        Repository(store).retain(keep.latest(1), claim=old, protected=())
    assert keys(store) == before


def test_the_manifest_goes_first_then_the_data_then_the_index() -> None:
    store = CrashStore(new_store())
    save(store, 1)
    delete_checkpoint(store, 1)
    deleted = [key for kind, key in store.operations if kind == "delete"]
    assert deleted[0] == manifest_key(1)
    assert [key.rsplit("/", 1)[1] for key in deleted[1:]] == [
        "extra.r00000.safetensors",
        "model.r00000.safetensors",
        "index.msgpack",
    ]


@given(st.integers(1, 4))
def test_a_deletion_that_fails_leaves_no_half_a_checkpoint(nth: int) -> None:
    inner = new_store()
    claim = save(inner, 1, 2)
    store = FaultyStore(inner, [Rule("delete", Fail(StorageError("down"), after=True), nth=nth)])
    with pytest.raises(StorageError):
        Repository(store).retain(keep.latest(1), claim=claim, protected=())
    assert Repository(inner).steps() == [2]
    # What remains is garbage that the owner removes next time.
    Repository(inner).collect(claim=claim, in_flight=())
    assert not [key for key in keys(inner) if key.startswith(step_dir(1))]


def test_foreign_files_are_never_deleted() -> None:
    store = new_store()
    claim = save(store, 1, 2)
    attempt = Repository(store).begin(3, claim)
    put_files(attempt, b"dead")
    inside = f"step-0000000003/{attempt.save_id}/core.dump"
    for key in (*FOREIGN, inside):
        store.put(key, [b"mine"])
    Repository(store).retain(keep.latest(1), claim=claim, protected=())
    Repository(store).collect(claim=claim, in_flight=())
    left = set(keys(store))
    assert left >= {*FOREIGN, inside}
    assert Repository(store).steps() == [2]
    assert left - {*FOREIGN, inside} == {
        key for key in left if key.startswith((step_dir(2), "claims/00"))
    }


def test_garbage_is_what_no_manifest_names_and_nobody_is_writing() -> None:
    store = new_store()
    repository = Repository(store)
    old = repository.claim()
    dead = repository.begin(5, old)
    put_files(dead, b"dead")
    loser = repository.begin(1, old)
    put_files(loser, b"lost the race")
    own = repository.claim()
    save(store, 1, claim=own)
    writing, given_up = repository.begin(6, own), repository.begin(6, own)
    put_files(writing, b"now")
    put_files(given_up, b"failed")
    removed = repository.collect(claim=own, in_flight={writing.save_id})
    assert removed == [
        f"step-0000000001/{loser.save_id}/",
        f"step-0000000005/{dead.save_id}/",
        f"step-0000000006/{given_up.save_id}/",
    ]
    attempts = {key.split("/")[1] for key in keys(store) if key.startswith("step-")}
    assert attempts == {"manifest.json", repository.open(1).manifest.save_id, writing.save_id}
    assert repository.verify(1).ok


def test_attempts_of_a_newer_claim_are_left_alone() -> None:
    store = new_store()
    repository = Repository(store)
    own, newer = repository.claim(), repository.claim()
    attempt = repository.begin(5, newer)
    put_files(attempt, b"the new owner writes this")
    assert repository.collect(claim=own, in_flight=()) == []
    commit_files = [key for key in keys(store) if attempt.save_id in key]
    assert len(commit_files) == 2


@pytest.mark.parametrize("manifest", [b"{", b'{"format": 99}'], ids=["damaged", "newer"])
def test_the_files_of_a_manifest_that_cannot_be_read_are_left(manifest: bytes) -> None:
    store = new_store()
    claim = save(store, 1)
    store.put(manifest_key(1), [manifest], mode="replace")
    before = keys(store)
    assert Repository(store).collect(claim=claim, in_flight=()) == []
    assert keys(store) == before


def test_the_files_of_a_manifest_that_is_listed_and_not_found_are_left() -> None:
    inner = new_store()
    claim = save(inner, 1, 2)
    lost = Rule("read_into", Fail(NotFound("404")), key=manifest_key(1), nth=None)
    before = keys(inner)
    repository = Repository(FaultyStore(inner, [lost]))
    assert repository.collect(claim=claim, in_flight=()) == []
    # Nor does it count for a policy, or is deleted by one.
    assert repository.retain(keep.latest(1), claim=claim) == {}
    assert keys(inner) == before
    assert Repository(inner).verify(1).ok


@pytest.mark.parametrize("operation", ["list_children", "read_into"])
def test_an_outage_deletes_nothing(operation: Operation) -> None:
    inner = new_store()
    claim = save(inner, 1)
    store = FaultyStore(inner, [Rule(operation, Fail(StorageError("down")), nth=None)])
    before = keys(inner)
    with pytest.raises(StorageError):
        Repository(store).collect(claim=claim, in_flight=())
    assert keys(inner) == before


def test_an_attempt_that_commits_while_garbage_is_looked_for_stays() -> None:
    inner = new_store()
    repository = Repository(inner)
    claim = repository.claim()
    attempt = repository.begin(1, claim)

    class CommitsMeanwhile(FaultyStore):
        def list_children(self, prefix: str = "") -> list[str]:
            found = super().list_children(prefix)
            if attempt.save_id + "/" in found:
                commit_rest()
            return found

    index = put_files(attempt, b"abc")

    def commit_rest() -> None:
        if not repository.steps():
            attempt.commit(encode_whole(index), manifest_of(attempt, index))

    Repository(CommitsMeanwhile(inner, [])).collect(claim=claim, in_flight=())
    assert repository.verify(1).ok


def test_save_ids_alone_tell_whose_an_attempt_is() -> None:
    store = new_store()
    claim = save(store, 1)
    foreign = f"step-0000000002/{new_save_id(claim)}x/model.r00000.safetensors"
    store.put(foreign, [b"not ours"])
    Repository(store).collect(claim=claim, in_flight=())
    assert foreign in keys(store)
    assert commit(Repository(store).begin(2, claim)).step == 2


# ---------------------------------------------------------------- unfinished objects


LEFT = ".tmp-0123456789abcdef"


def litter(root: Path, *folders: str) -> list[Path]:
    paths = [root / folder / LEFT for folder in folders]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    return paths


def test_what_is_old_goes_with_what_was_left_unfinished_in_it(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "run")
    claim = save(store, 1)
    old, young = (f"step-0000000005/{new_save_id(claim)}" for _ in range(2))
    for folder in (old, young):
        store.put(f"{folder}/model.r00000.safetensors", [b"half"])
    left = litter(tmp_path / "run", old, young)
    for path in (tmp_path / "run" / old).iterdir():
        os.utime(path, (1, 1))
    swept = collect_garbage(store, claim=claim, in_flight=(), before=1000)
    assert swept == [f"{old}/"]
    assert [path.exists() for path in left] == [False, True]


def test_unfinished_files_go_only_where_ours_lie(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "run")
    claim = save(store, 1, 2)
    committed = f"step-0000000002/{Repository(store).open(2).manifest.save_id}"
    dead, alive, newer = new_save_id(claim), new_save_id(claim), new_save_id(claim + 1)
    ours = litter(
        tmp_path / "run", "claims", "step-0000000001", committed, f"step-0000000005/{dead}"
    )
    theirs = litter(
        tmp_path / "run",
        "",  # dist_ckpt puts nothing beside the steps
        "cache",
        "claims/old",
        "step-0000000001/plots",
        f"{committed}/cache",
        "step-5",
        "step-0000000005/c000001-zzzzzzzzzzzzzzzz",
        "nested/claims",
        f"nested/step-0000000001/{dead}",
        f"step-0000000005/{alive}",
        f"step-0000000005/{newer}",
    )
    behind = litter(tmp_path / "elsewhere", dead)
    (tmp_path / "run" / "step-0000000009").symlink_to(tmp_path / "elsewhere")
    Repository(store).collect(claim=claim, in_flight={alive})
    assert [path for path in ours if path.exists()] == []
    assert [path for path in (*theirs, *behind) if not path.exists()] == []
    assert Repository(store).verify(2).ok


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeS3:
    fake = FakeS3()

    async def send(_: Client, name: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        return await fake.send(name, parameters)

    monkeypatch.setattr(Client, "send", send)
    return fake


def uploads_of(fake: FakeS3, *keys: str) -> None:
    for key in keys:
        fake.uploads[key] = {"Key": f"run/{key}", "parts": {}, "begun": fake.now}


def test_uploads_go_only_when_they_are_of_dead_attempts(fake: FakeS3) -> None:
    """Also with an age of nothing: what is in flight has no age at which it may be aborted."""
    store = S3Store("bucket", "run", storage_options={"abandoned_seconds": 0})
    claim = Repository(store).claim()
    dead, alive, newer = new_save_id(claim), new_save_id(claim), new_save_id(claim + 1)
    ours = [f"step-0000000005/{dead}/{name}" for name in (MODEL, "index.msgpack")]
    theirs = [
        "video.mp4",
        "step-0000000005/left",
        f"step-0000000005/{dead}/core.dump",
        f"step-0000000005/{dead}/deeper/{MODEL}",
        f"nested/step-0000000005/{dead}/{MODEL}",
        f"step-0000000005/{alive}/{MODEL}",
        f"step-0000000005/{newer}/{MODEL}",
        "step-0000000005/manifest.json",
    ]
    uploads_of(fake, *ours, *theirs)
    Repository(store).collect(claim=claim, in_flight={alive})
    assert sorted(fake.uploads) == sorted(theirs)


# ---------------------------------------------------------------- what may not be deleted


def denied(operation: Operation, key: str) -> Rule:
    error = StorageError("denied", kind=ErrorKind.PERMISSION)
    return Rule(operation, Fail(error), key=key, nth=None)


@pytest.mark.parametrize(
    "rule",
    [
        denied("delete", manifest_key(1)),
        denied("size", f"{step_dir(1)}/*/pin.json"),
        denied("read_into", manifest_key(1)),
    ],
    ids=lambda rule: f"{rule.operation} {rule.key}",
)
def test_a_step_that_may_not_be_touched_keeps_no_other(
    rule: Rule, caplog: pytest.LogCaptureFixture
) -> None:
    inner = new_store()
    claim = save(inner, 1, 2, 3, 4)
    store = FaultyStore(inner, [rule])
    for _ in range(3):
        Repository(store).retain(keep.latest(2), claim=claim, protected=())
    assert Repository(inner).steps() == [1, 3, 4]
    assert caplog.text.count("denied") == 1, "said once"


def test_a_linked_step_keeps_no_other_and_nothing_behind_it_goes(tmp_path: Path) -> None:
    theirs = LocalStore(tmp_path / "theirs")
    save(theirs, 1)
    run = tmp_path / "run"
    store = LocalStore(run)
    claim = save(store, 2, 3, 4)
    (run / step_dir(1)).symlink_to(tmp_path / "theirs" / step_dir(1))
    before = keys(theirs)
    assert Repository(store).steps() == [1, 2, 3, 4], "it is listed like any other"
    gone = Repository(store).retain(keep.latest(1), claim=claim, protected=())
    assert list(gone) == [2, 3]
    Repository(store).collect(claim=claim, in_flight=())
    assert keys(theirs) == before
    assert Repository(theirs).verify(1).ok
