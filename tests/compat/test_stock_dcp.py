"""What stock `torch.distributed.checkpoint` wrote loads here, at any layout and world size."""

from __future__ import annotations

import os
import pickle  # noqa: TID251 - to write what must not be executed
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save as stock_save

import dist_ckpt
from dist_ckpt import TrainState
from dist_ckpt.errors import CheckpointError, IncompatibleError, IntegrityError
from dist_ckpt.testing.ranks import run_ranks
from tests.compat.stock import EPOCH, FORMS, name_of, save_all, scheduler_of, state_of
from tests.distributed.layouts import same_bits
from tests.distributed.nets import Net, build, clear, differences, weight_differences

SAVED = ("plain", "ddp", "fsdp")


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of stock checkpoints: plain ones of 1 rank, DDP and FSDP2 of 4."""
    root = tmp_path_factory.mktemp("stock")
    save_all(str(root), ("plain",))
    run_ranks(4, save_all, str(root), ("ddp", "fsdp"))
    return root


def load_all(root: str, layout: str, *, run: bool = False) -> list[str]:
    wrong = []
    training, expected = build(layout), build(layout)
    wanted, scheduler = scheduler_of(expected), scheduler_of(training)
    for saved in SAVED:
        for form in FORMS:
            clear(training)
            scheduler.last_epoch = 0
            state = state_of(training, scheduler, form)
            report = dist_ckpt.load(state, f"{root}/{name_of(saved, form, run=run)}")
            found = list(differences(training, expected))
            if form != "app":
                found += ["scheduler"] * (scheduler.state_dict() != wanted.state_dict())
                found += ["epoch"] * (state["epoch"] != EPOCH)
            wrong += [f"{saved} {form} into {layout}: {name}" for name in found]
            assert (report.step, report.verified, report.missing) == (0, run, ())
        clear(training)
        url = f"{root}/{name_of(saved, 'nested', run=run)}"
        report = dist_ckpt.load_weights(training.model, url)
        assert report.parts == ("model",)
        wrong += [f"{saved}: {n}" for n in weight_differences(training.net, expected.net)]
    return wrong


def load_both(root: str, layout: str) -> list[str]:
    return load_all(root, layout) + load_all(root, layout, run=True)


def test_one_process_loads_them_all(stock: Path) -> None:
    assert load_both(str(stock), "plain") == []


@pytest.mark.parametrize(
    ("world_size", "layout", "load"), [(2, "ddp", load_all), (3, "fsdp", load_both)]
)
def test_several_ranks_load_them_all(
    world_size: int, layout: str, load: Callable[[str, str], list[str]], stock: Path
) -> None:
    for rank, wrong in enumerate(run_ranks(world_size, load, str(stock), layout)):
        assert wrong == [], f"on rank {rank}"


class Evil:
    """Runs a program when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.witness}",)


class Own:
    """A class that only this program knows."""


def save(state: dict[str, Any], root: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of saving alone
        stock_save(state, checkpoint_id=root)
    return root


def small(root: Path) -> Path:
    return save({"model": Net("value").state_dict(), "epoch": EPOCH}, root)


def refused(kind: type[CheckpointError], url: Path, *words: str) -> None:
    """Check that a load says these words and changes nothing."""
    net, expected = Net("other"), Net("other")
    with pytest.raises(kind) as caught:
        dist_ckpt.load_weights(net, url)
    for word in words:
        assert word in str(caught.value)
    assert list(weight_differences(net, expected)) == []


def test_metadata_that_calls_something_is_refused_and_not_executed(tmp_path: Path) -> None:
    url, witness = small(tmp_path / "stock"), tmp_path / "witness"
    (url / ".metadata").write_bytes(pickle.dumps(Evil(witness)))
    refused(IntegrityError, url, ".metadata", "posix.system", "not admitted")
    metadata = pickle.loads((small(tmp_path / "other") / ".metadata").read_bytes())  # noqa: S301
    metadata.planner_data["epoch"] = Evil(witness)  # deep inside of a true one
    (url / ".metadata").write_bytes(pickle.dumps(metadata))
    refused(IntegrityError, url, "posix.system")
    assert not witness.exists()


@pytest.mark.parametrize("name", ["../secret.distcp", "/etc/passwd", "a/../../b", "", "a\x7f"])
def test_metadata_names_only_files_beside_it(name: str, tmp_path: Path) -> None:
    url = small(tmp_path / "stock")
    metadata = pickle.loads((url / ".metadata").read_bytes())  # noqa: S301
    for info in metadata.storage_data.values():
        info.relative_path = name
    (url / ".metadata").write_bytes(pickle.dumps(metadata))
    refused(IntegrityError, url, repr(name), "no file of it")


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_cut_file_is_refused(share: float, tmp_path: Path) -> None:
    url = small(tmp_path / "stock")
    (file,) = url.glob("*.distcp")
    data = file.read_bytes()
    file.write_bytes(data[: int(share * len(data))])
    refused(IntegrityError, url, file.name)
    file.unlink()
    refused(IntegrityError, url, file.name)


def test_what_is_no_metadata_is_refused(tmp_path: Path) -> None:
    url = small(tmp_path / "stock")
    whole = (url / ".metadata").read_bytes()
    for data in (b"", b"junk", whole[:-100], pickle.dumps({"a": 1})):
        (url / ".metadata").write_bytes(data)
        refused(IntegrityError, url, ".metadata")


def test_metadata_that_claims_too_much_is_refused(tmp_path: Path) -> None:
    url = small(tmp_path / "stock")
    metadata = pickle.loads((url / ".metadata").read_bytes())  # noqa: S301
    name = "model.blocks.0.up.bias"
    kept = metadata.state_dict_metadata[name]
    kept.size = torch.Size([1 << 60])
    (url / ".metadata").write_bytes(pickle.dumps(metadata))
    refused(IntegrityError, url)
    kept.chunks[0].sizes = torch.Size([1 << 60])
    (url / ".metadata").write_bytes(pickle.dumps(metadata))
    refused(IntegrityError, url, "blocks.0.up.bias")


def test_a_value_that_must_be_executed_is_named_only_when_it_is_wanted(tmp_path: Path) -> None:
    net, expected = Net("other"), Net("value")
    url = save({"model": expected.state_dict(), "own": Own()}, tmp_path)
    dist_ckpt.load_weights(net, url)
    assert list(weight_differences(net, expected)) == []
    with pytest.raises(IncompatibleError, match=r"cannot be read: .*own: .*Own[^\n]*$"):
        dist_ckpt.load(TrainState(rng=None, model=net, own={"a": 1}), url)
    with dist_ckpt.open_checkpoint(url) as opened:
        assert "own" in opened.parts
        with pytest.raises(IncompatibleError, match=r"cannot be read: .*own: .*Own[^\n]*$"):
            opened.read_values("own")


PERMUTED = {
    "transposed": torch.arange(15.0).reshape(5, 3).t(),
    "channels_last": torch.arange(2 * 3 * 4 * 5)
    .reshape(2, 3, 4, 5)
    .to(memory_format=torch.channels_last),
    "rounded": torch.randn(4, 1, 6).bfloat16().permute(2, 1, 0),
    "thin": torch.arange(4.0).reshape(4, 1).t(),
}


def test_tensors_with_their_dimensions_in_another_order_load(tmp_path: Path) -> None:
    torch.save(PERMUTED, tmp_path / "weights.pt")
    for url in (save(dict(PERMUTED), tmp_path / "stock"), tmp_path / "weights.pt"):
        found = {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in PERMUTED.items()}
        dist_ckpt.load_weights(found, url)
        for name, tensor in PERMUTED.items():
            assert same_bits(found[name], tensor), name
        with dist_ckpt.open_checkpoint(url) as opened:
            expected = PERMUTED["transposed"][1:3, 2:4]
            assert same_bits(opened["model/transposed"][1:3, 2:4], expected)


def test_a_tensor_with_gaps_between_its_elements_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "gaps.pt"
    torch.save({"every_other": torch.arange(10.0)[::2]}, path)
    refused(IncompatibleError, path, "gaps.pt", "do not fill one run")
