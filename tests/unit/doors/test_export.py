"""Weights that go out are read by the programs whose formats they are, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

import dist_ckpt
from dist_ckpt.doors import image
from dist_ckpt.doors.export import aliases_of, parse_bytes
from dist_ckpt.doors.placing import NOTE
from dist_ckpt.errors import (
    AlreadyExists,
    ErrorKind,
    IncompatibleError,
    IntegrityError,
    NotFound,
    StorageError,
    UsageError,
)
from dist_ckpt.events import Event, WorkProgressed, subscribe
from dist_ckpt.format.names import step_dir
from dist_ckpt.storage.local import LocalStore
from dist_ckpt.storage.memory import MemoryStore
from dist_ckpt.storage.meter import MeterStore
from dist_ckpt.testing.stores import Fail, FaultyStore, Flip, Rule
from tests.unit.doors.models import check_equal, load_torch, saved

Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def several_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image, "WINDOW_BYTES", 4096)


def test_safetensors(tmp_path: Path) -> None:
    run, wanted = saved(tmp_path)
    report = dist_ckpt.export(run, tmp_path / "out" / "weights.safetensors")
    check_equal(load_file(tmp_path / "out" / "weights.safetensors"), wanted)
    assert report.url == str(tmp_path / "out" / "weights.safetensors")
    assert (report.step, report.tensors) == (5, len(wanted))
    assert "read back" in str(report)


def test_a_store_whose_url_only_its_owner_can_open_is_a_destination(tmp_path: Path) -> None:
    class Mine(MemoryStore):
        @property
        def url(self) -> str:
            return f"mine://bucket/{step_dir(5)}/exports"

    run, _ = saved(tmp_path)
    there = Mine("of-somebody")
    dist_ckpt.export(run, there)
    assert "model.safetensors" in there.list_children()


def test_a_run_and_its_own_folders_are_no_place_for_an_export(tmp_path: Path) -> None:
    run, _ = saved(tmp_path)
    before = sorted(Path(run).rglob("*"))
    step = Path(run) / step_dir(5)
    alone, link = tmp_path / "alone", tmp_path / "link"
    shutil.copytree(step, alone)
    link.symlink_to(step)
    for out in (run, step, step / "w.safetensors", link / "w.safetensors", LocalStore(step)):
        with pytest.raises(UsageError, match=r"is a run|among the files of the run"):
            dist_ckpt.export(run, out)
    with pytest.raises(UsageError, match="is the checkpoint of step 5"):
        dist_ckpt.export(run, alone / "w.safetensors")
    with pytest.raises(UsageError, match="among the files of the run"):
        dist_ckpt.average([run, run], step)
    with pytest.raises(UsageError, match="is a folder of runs"):
        dist_ckpt.average([run, run], Path(run).parent)
    assert sorted(Path(run).rglob("*")) == before
    # Beside them a file lies where it was put, and a folder called so by others is any folder.
    dist_ckpt.export(run, Path(run) / "best.safetensors")
    dist_ckpt.export(run, tmp_path / step_dir(5) / "claims" / "w.safetensors")


def test_torch(tmp_path: Path) -> None:
    run, wanted = saved(tmp_path)
    dist_ckpt.export(run, tmp_path / "weights.pt", format="torch")
    check_equal(load_torch(tmp_path / "weights.pt", mmap=True), wanted)
    found = load_torch(tmp_path / "weights.pt")
    check_equal(found, wanted)
    assert found["lm_head.weight"].data_ptr() == found["embed.weight"].data_ptr(), "a tie"


def test_stock_dcp(tmp_path: Path) -> None:
    run, wanted = saved(tmp_path)
    dist_ckpt.export(run, tmp_path / "stock", format="dcp")
    found = {name: torch.zeros_like(tensor) for name, tensor in wanted.items()}
    with pytest.warns(UserWarning, match="single process"):
        dcp_load(found, checkpoint_id=tmp_path / "stock")
    check_equal(found, wanted)
    assert sorted(os.listdir(tmp_path / "stock")) == [".metadata", "__0_0.distcp"]


def test_dtypes_that_torch_has_no_class_of_memory_for(tmp_path: Path) -> None:
    wanted = {
        "f8": torch.randn(9).to(torch.float8_e4m3fn),
        "c": torch.randn(3).to(torch.complex128),
    }
    dist_ckpt.save({"model": wanted}, tmp_path / "run")
    dist_ckpt.export(tmp_path / "run", tmp_path / "a.pt", format="torch")
    found = load_torch(tmp_path / "a.pt")
    assert torch.equal(found["f8"].view(torch.uint8), wanted["f8"].view(torch.uint8))
    assert torch.equal(found["c"], wanted["c"])
    with pytest.raises(IncompatibleError, match=r"c has the dtype complex128.*'torch' or 'dcp'"):
        dist_ckpt.export(tmp_path / "run", tmp_path / "a.safetensors")


def like(folder: Path, **config: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", **config}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "merges.txt").write_text("a b")
    (folder / "optimizer.bin").write_text("not this")
    return folder


@pytest.mark.parametrize("max_shard", [None, 800])
def test_hugging_face(max_shard: int | None, tmp_path: Path) -> None:
    run, wanted = saved(tmp_path)
    out = tmp_path / "hf"
    report = dist_ckpt.export(
        run, out, format="hf", max_shard=max_shard, like=like(tmp_path / "like")
    )
    weights = sorted(name for name in os.listdir(out) if name.endswith(".safetensors"))
    found: Tensors = {}
    for name in weights:
        found |= load_file(out / name)
    # As transformers stores it: the embedding, to which the head is tied again.
    assert report.aliases == {"lm_head.weight": "embed.weight"}
    check_equal(found, {name: wanted[name] for name in wanted if name != "lm_head.weight"})
    beside = {"config.json", "merges.txt", "tokenizer.json"}
    if max_shard is None:
        assert weights == ["model.safetensors"]
    else:
        count = len(weights)
        assert weights[0] == f"model-00001-of-{count:05}.safetensors"
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == set(weights)
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
        beside.add("model.safetensors.index.json")
    assert set(os.listdir(out)) == beside | set(weights)
    with safe_open(out / weights[0], "pt") as file:
        assert file.metadata()["format"] == "pt"
    # Ours knows the name that was left out.
    with dist_ckpt.open_checkpoint(out) as opened:
        assert torch.equal(opened["model/lm_head.weight"].read(), wanted["embed.weight"])


def test_a_cast_is_said_by_the_configuration(tmp_path: Path) -> None:
    run, wanted = saved(tmp_path)
    config = like(tmp_path / "like", torch_dtype="float32")
    dist_ckpt.export(run, tmp_path / "hf", format="hf", like=config, dtype="bf16")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    found = load_file(tmp_path / "hf" / "model.safetensors")
    assert torch.equal(found["embed.weight"], wanted["embed.weight"].bfloat16())
    assert found["ids"].dtype == torch.uint16, "only what is floating is cast"


@pytest.mark.parametrize(
    ("group", "kept"),
    [
        (("lm_head.weight", "transformer.wte.weight"), "transformer.wte.weight"),
        (("decoder.embed_tokens.weight", "lm_head.weight", "shared.weight"), "shared.weight"),
        (("a.weight", "b.weight"), "a.weight"),
        (("decoder.weight", "lm_head.weight"), "decoder.weight"),
    ],
)
def test_of_tied_names_the_embedding_is_kept(group: tuple[str, ...], kept: str) -> None:
    assert aliases_of([group]) == {name: kept for name in group if name != kept}


def test_names_are_mapped_by_patterns(tmp_path: Path) -> None:
    run, wanted = saved(tmp_path)
    rename = {"layers.*.weight": "h.*.w", "embed": "wte", "lm_head.*": "head.*"}
    dist_ckpt.export(run, tmp_path / "a.safetensors", rename=rename)
    names = load_file(tmp_path / "a.safetensors").keys()
    assert {"h.0.w", "h.1.w", "wte.weight", "head.weight", "layers.0.bias"} <= names
    assert len(names) == len(wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rename": {"layer.*": "h.*"}}, r"'layer\.\*' matches no name \(did you mean 'layers\."),
        ({"rename": {"*": "x.*", "embed": "wte"}}, "'embed' is of no use: 'embed.weight' goes by"),
        ({"rename": {"*": "../*"}}, "makes '../.*: no name"),
        ({"rename": {"embed.weight": ""}}, "no name"),
        ({"rename": {"layers.*.bias": "bias"}}, "gets the name of another tensor"),
        ({"rename": {"half": "a*"}}, "more \\* than that"),
        ({"dtype": "int8"}, "need scales, which no cast makes"),
        ({"dtype": "float8_e4m3fn"}, "need scales, which no cast makes"),
        ({"format": "onnx"}, "one of safetensors, hf, torch, dcp, not 'onnx'"),
        ({"max_shard": "5GB"}, "max_shard goes with format='hf'"),
        ({"rename": ["a", "b"]}, "rename maps patterns to names, as a dict"),
        ({"format": "hf", "max_shard": "five"}, "'five' is no size"),
        ({"formt": "hf"}, "unknown option 'formt' \\(did you mean 'format'"),
        ({"part": "epoch"}, "has no tensors"),
        ({"part": "modle"}, "no part 'modle' \\(did you mean 'model'"),
        ({"step": 6}, "no checkpoint of step 6"),
        ({"format": "hf", "like": "nowhere"}, "has no config.json to copy"),
    ],
)
def test_what_makes_no_sense_is_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    run, _ = saved(tmp_path)
    with pytest.raises((UsageError, NotFound), match=message):
        dist_ckpt.export(run, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "kind"), [("w.pt", "safetensors"), ("w.safetensors", "torch"), ("w.bin", "hf")]
)
def test_the_file_of_another_format_becomes_no_folder(name: str, kind: Any, tmp_path: Path) -> None:
    run, _ = saved(tmp_path)
    with pytest.raises(UsageError, match=f"{name} has the ending of format="):
        dist_ckpt.export(run, tmp_path / name, format=kind)
    assert not (tmp_path / name).exists()


def test_values_beyond_the_dtype_are_refused(tmp_path: Path) -> None:
    dist_ckpt.save({"model": {"w": torch.tensor([1.0, 1e6])}}, tmp_path / "run")
    with pytest.raises(IncompatibleError, match=r"w of .* has values beyond torch.float16"):
        dist_ckpt.export(tmp_path / "run", tmp_path / "a.safetensors", dtype="float16")
    assert not (tmp_path / "a.safetensors").exists()
    dist_ckpt.export(tmp_path / "run", tmp_path / "a.safetensors", dtype=torch.bfloat16)
    dist_ckpt.save({"model": {"w": torch.tensor([3.4e38])}}, tmp_path / "wide")
    with pytest.raises(IncompatibleError, match=r"become infinite: do not cast$"):
        dist_ckpt.export(tmp_path / "wide", tmp_path / "b.safetensors", dtype="bfloat16")


@pytest.mark.parametrize("kind", ["safetensors", "hf", "torch", "dcp"])
def test_where_nothing_came_of_it_the_place_is_free_again(kind: Any, tmp_path: Path) -> None:
    for step in (1, 2):
        dist_ckpt.save({"model": {"w": torch.full((9,), step)}}, tmp_path / "run", step=step)
    data = next((tmp_path / "run" / step_dir(2)).glob("*/*.safetensors"))
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match="ends at byte"):
        dist_ckpt.export(tmp_path / "run", tmp_path / "out", format=kind)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
    assert dist_ckpt.export(tmp_path / "run", tmp_path / "out", format=kind, step=1).step == 1


def test_a_source_without_floating_tensors_has_nothing_to_cast(tmp_path: Path) -> None:
    dist_ckpt.save({"model": {"ids": torch.arange(3)}}, tmp_path / "run")
    with pytest.raises(UsageError, match="no floating tensor in 'model' to cast"):
        dist_ckpt.export(tmp_path / "run", tmp_path / "a.safetensors", dtype="bf16")


@pytest.mark.parametrize("kind", ["safetensors", "torch", "dcp", "hf"])
def test_what_exists_is_refused_unless_it_is_what_would_be_made(kind: Any, tmp_path: Path) -> None:
    run, _ = saved(tmp_path)
    out = tmp_path / "out"
    first = dist_ckpt.export(run, out, format=kind)
    assert dist_ckpt.export(run, out, format=kind) == first
    before = {path: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(AlreadyExists):
        dist_ckpt.export(run, out, format=kind, rename={"low": "other"})
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    run, _ = saved(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "diary.txt").write_text("mine")
    with pytest.raises(AlreadyExists, match="is not empty"):
        dist_ckpt.export(run, tmp_path / "out", format="hf")
    assert os.listdir(tmp_path / "out") == ["diary.txt"]


def test_another_export_that_was_cut_off_is_not_gone_on_with(tmp_path: Path) -> None:
    run, _ = saved(tmp_path)
    full = StorageError("no room", kind=ErrorKind.STORAGE_FULL)
    store = FaultyStore(LocalStore(tmp_path / "out"), [Rule("put", Fail(full), ".metadata")])
    with pytest.raises(StorageError, match="no room") as failed:
        dist_ckpt.export(run, store, format="dcp")
    assert failed.value.kind is ErrorKind.STORAGE_FULL
    assert (tmp_path / "out" / NOTE).exists()
    with pytest.raises(AlreadyExists, match="was cut off and was another one"):
        dist_ckpt.export(run, tmp_path / "out", format="dcp", dtype="bf16")
    dist_ckpt.export(run, tmp_path / "out", format="dcp")
    assert sorted(os.listdir(tmp_path / "out")) == [".metadata", "__0_0.distcp"]


def test_what_reads_otherwise_than_it_was_written_is_told_and_removed(tmp_path: Path) -> None:
    run, _ = saved(tmp_path)
    store = FaultyStore(LocalStore(tmp_path / "out"), [Rule("read_into", Flip(9), nth=2)])
    with pytest.raises(IntegrityError, match="reads otherwise than it was written"):
        dist_ckpt.export(run, store)
    assert list(LocalStore(tmp_path / "out").list_entries()) == []


def test_a_disk_is_read_once_as_it_is_written(tmp_path: Path) -> None:
    weights = {"w": torch.randn(3, 1 << 20), "v": torch.randn(1001)}
    dist_ckpt.save({"model": weights}, tmp_path / "run", ranks="alone")
    store = MeterStore(LocalStore(tmp_path / "out"))
    told: list[Event] = []
    unsubscribe = subscribe(told.append)
    dist_ckpt.export(tmp_path / "run", store)
    unsubscribe()
    if not store.capabilities.direct_io:
        pytest.skip(f"{tmp_path} takes no direct transfers")
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    usage = store.usage().operations
    assert usage["read_into"].count == 1, "the last window, whose last sector is not whole"
    progress = [each for each in told if isinstance(each, WorkProgressed)]
    read = [each.nbytes_done for each in progress if each.doing == "reading back"]
    assert (read[-1], max(read)) == (size, size)


def test_a_damaged_source_leaves_nothing(tmp_path: Path) -> None:
    run, _ = saved(tmp_path)
    (shard,) = run.glob("*/*/model.r00000.safetensors")
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)
    with pytest.raises(IntegrityError, match="differs from its digest"):
        dist_ckpt.export(run, tmp_path / "a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()


def test_a_store_in_memory_and_the_checkpoints_of_others(tmp_path: Path) -> None:
    _, wanted = saved(tmp_path)
    torch.save({"model_state_dict": wanted}, tmp_path / "old.pt")
    store = MemoryStore(f"export-{tmp_path.name}")
    dist_ckpt.export(tmp_path / "old.pt", store, format="hf")
    with dist_ckpt.open_checkpoint(store) as opened:
        found = {name: opened[f"model/{name}"].read() for name in wanted}
    check_equal(found, wanted)


def test_the_step_is_chosen(tmp_path: Path) -> None:
    for step, loss in ((1, 0.1), (2, 0.3)):
        state = {"model": {"w": torch.tensor([float(step)])}}
        dist_ckpt.save(state, tmp_path / "run", step=step, metrics={"loss": loss})
    chosen: dict[str, tuple[float, dict[str, Any]]] = {
        "latest": (2.0, {"step": "latest"}),
        "best": (1.0, {"step": "best", "metric": "loss"}),
        "first": (1.0, {"step": 1}),
    }
    for name, (value, options) in chosen.items():
        out = tmp_path / f"{name}.safetensors"
        dist_ckpt.export(tmp_path / "run", out, **options)
        assert load_file(out)["w"].item() == value


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("5GB", 5 * 10**9), ("1.5 MiB", 3 << 19), ("12", 12), (7, 7), ("2k", 2000)],
)
def test_sizes(text: object, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize(
    ("kind", "name"),
    [("safetensors", "a.safetensors"), ("torch", "a.pt"), ("dcp", "a"), ("hf", "a")],
)
def test_out_in_and_out_again_is_the_same(kind: Any, name: str, tmp_path: Path) -> None:
    run, _ = saved(tmp_path)
    first, again = tmp_path / "first" / name, tmp_path / "again" / name
    dist_ckpt.export(run, first, format=kind)
    dist_ckpt.import_(first, tmp_path / "imported", step=5)
    dist_ckpt.export(tmp_path / "imported", again, format=kind)
    files = [first] if first.is_file() else sorted(first.iterdir())
    for file in files:
        other = tmp_path / "again" / file.relative_to(tmp_path / "first")
        assert file.read_bytes() == other.read_bytes(), file


def test_a_file_of_safetensors_itself_goes_through(tmp_path: Path) -> None:
    _, wanted = saved(tmp_path)
    plain = {name: tensor.clone() for name, tensor in wanted.items()}
    save_file(plain, tmp_path / "in.safetensors")
    dist_ckpt.export(tmp_path / "in.safetensors", tmp_path / "out.pt", format="torch")
    check_equal(load_torch(tmp_path / "out.pt"), wanted)
