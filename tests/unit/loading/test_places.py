"""What a person may point at."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_ckpt.errors import NotFound, UsageError
from dist_ckpt.loading.opened import locate, open_source, place_name
from dist_ckpt.storage.local import LocalStore
from tests.unit.repository.runs import new_store, save


def test_a_run_and_one_of_its_steps(tmp_path: Path) -> None:
    save(LocalStore(tmp_path), 1, 2)
    inside = tmp_path / "step-0000000001"
    assert locate(tmp_path, None).step is None
    for text in (str(inside), f"{inside}/", f"file://{inside}"):
        found = locate(text, None)
        assert found.step == 1
        assert found.store.url == LocalStore(tmp_path).url
    assert open_source(locate(inside, None)).step == 1
    assert open_source(locate(tmp_path, None)).step == 2
    assert open_source(locate(tmp_path, 1)).step == 1
    assert locate(inside, 1).step == 1
    with pytest.raises(UsageError, match="is the checkpoint of step 1, not of step 2"):
        locate(inside, 2)


def test_a_relative_step_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(LocalStore(tmp_path), 1)
    monkeypatch.chdir(tmp_path)
    found = locate("step-0000000001", None)
    assert (found.step, found.text) == (1, ".")
    assert open_source(found).step == 1


def test_a_run_may_have_the_name_of_a_step_directory(tmp_path: Path) -> None:
    run = tmp_path / "step-0000000005"
    save(LocalStore(run), 3)
    found = locate(run, None)
    assert (found.step, open_source(found).step) == (None, 3)


def test_a_step_that_was_never_committed_is_not_taken_for_one(tmp_path: Path) -> None:
    save(LocalStore(tmp_path), 1)
    with pytest.raises(NotFound, match=r"step-0000000009 is no run"):
        open_source(locate(tmp_path / "step-0000000009", None))


def test_a_store_is_itself() -> None:
    store = new_store()
    save(store, 4)
    found = locate(store, None)
    assert (found.store, found.step, found.text) == (store, None, None)
    assert place_name(store) == store.url
    with pytest.raises(UsageError, match="unknown scheme"):
        place_name("nowhere://x")
    with pytest.raises(UsageError, match="a path, a URL or a Store, not 5"):
        place_name(5)  # type: ignore[arg-type]
