"""Directories and files in the layouts that trainers have: Hugging Face, PEFT, Megatron, Lightning.

They are written here with torch alone, as those libraries write them.
"""

from __future__ import annotations

import io
import json
import pickle  # noqa: TID251 - to write what must not be executed
import random
import warnings
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_saver import save as stock_save
from torch.optim import AdamW
from torch.optim.lr_scheduler import StepLR

import dist_ckpt
from dist_ckpt.errors import IncompatibleError, IntegrityError
from tests.distributed.layouts import same_bits


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of saving alone
        yield


class Language(nn.Module):
    """A model whose head is its embedding, or has its own weights."""

    def __init__(self, *, seed: int = 0, tied: bool = True) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(10, 4)
        self.inner = nn.Linear(4, 4)
        self.head = nn.Linear(4, 10, bias=False)
        if tied:
            self.head.weight = self.embed.weight


class Shared(Language):
    """The same with two parameters in one memory."""

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__(seed=seed)
        self.head.weight = nn.Parameter(self.embed.weight.data)


class Lit(nn.Module):
    """What holds the model as an attribute."""

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__()
        self.model = Language(seed=seed)


def same(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(same_bits(one, other) for one, other in pairs)


def without_head(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items() if k != "head.weight"}


def hugging_face(model: nn.Module, place: Path) -> None:
    save_file(without_head(model), place / "model.safetensors", metadata={"format": "pt"})


def hugging_face_sharded(model: nn.Module, place: Path) -> None:
    weight_map = {}
    for number, (name, tensor) in enumerate(without_head(model).items()):
        weight_map[name] = f"model-{number}.safetensors"
        save_file({name: tensor}, place / weight_map[name])
    index = {"metadata": {}, "weight_map": weight_map}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))


def by_save_model(model: nn.Module, place: Path) -> None:
    save_model(model, str(place / "model.safetensors"))


def by_stock(model: nn.Module, place: Path) -> None:
    stock_save({"model": without_head(model)}, checkpoint_id=place)


def by_trainer(model: nn.Module, place: Path) -> None:
    torch.save(without_head(model), place / "pytorch_model.bin")
    torch.save({"state": {}, "param_groups": []}, place / "optimizer.pt")
    torch.save(Namespace(lr=1), place / "training_args.bin")


TIED = (hugging_face, hugging_face_sharded, by_save_model, by_stock, by_trainer)


@pytest.mark.parametrize("write", TIED)
def test_a_name_that_is_filled_under_another_one_is_not_missing(
    write: Callable[[nn.Module, Path], None], tmp_path: Path
) -> None:
    saved = Language()
    write(saved, tmp_path)
    for model in (Language(seed=1), Shared(seed=1), Lit(seed=1).model):
        assert dist_ckpt.load_weights(model, tmp_path).missing == ()
        assert same(saved, model)
    tensors = Language(seed=1)
    dist_ckpt.load_weights(tensors.state_dict(), tmp_path)
    assert same(saved, tensors)
    held = Language(seed=1)
    dist_ckpt.load({"model": held.state_dict(), "rng": None}, tmp_path)
    assert same(saved, held)
    with torch.device("meta"):
        blank = Language()
    dist_ckpt.load_weights(blank, tmp_path)
    assert same(saved, blank)
    assert blank.head.weight is blank.embed.weight


def test_without_a_tie_it_is_missing_unless_the_file_says_whose_it_is(tmp_path: Path) -> None:
    saved = Language()
    hugging_face(saved, tmp_path)
    with pytest.raises(IncompatibleError, match=r"missing in the checkpoint: model/head\.weight$"):
        dist_ckpt.load_weights(Language(tied=False), tmp_path)
    by_save_model(saved, tmp_path)
    apart = Language(seed=1, tied=False)
    dist_ckpt.load_weights(apart, tmp_path)
    assert same(saved, apart)
    assert apart.head.weight.data_ptr() != apart.embed.weight.data_ptr()


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "net."])
@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", "module"])
def test_prefixes_that_all_names_have(key: str, prefix: str, tmp_path: Path) -> None:
    saved = Lit()
    state = {prefix + name: tensor for name, tensor in saved.state_dict().items()}
    url = tmp_path / "last.ckpt"
    torch.save({key: state, "epoch": 4, "global_step": 9, "callbacks": {"a": {"best": 1.0}}}, url)
    model, whole = Language(seed=1), Lit(seed=1)
    found = {"model": model, "epoch": 0, "global_step": 0, "rng": None}
    report = dist_ckpt.load(found, url, strict=False)
    assert same(saved.model, model)
    assert (found["epoch"], found["global_step"]) == (4, 9)
    assert key == "model" or any(repr(key) in note for note in report.notes)
    dist_ckpt.load_weights(whole, url)
    assert same(saved, whole)
    # The other way round: the program has the prefix, and the file has not.
    torch.save(Language().state_dict(), url)
    dist_ckpt.load_weights(whole, url)
    assert same(Language(), whole.model)


def test_a_beginning_that_only_some_names_have_is_none(tmp_path: Path) -> None:
    url = tmp_path / "weights.pt"
    torch.save({**Lit().state_dict(), "loss.weight": torch.ones(2)}, url)
    with pytest.raises(IncompatibleError, match="rename= maps names"):
        dist_ckpt.load_weights(Language(), url)


def test_of_two_that_may_be_meant_none_is_taken(tmp_path: Path) -> None:
    url = tmp_path / "weights.pt"
    weights = Language().state_dict()
    torch.save({"state_dict": weights, "model_state_dict": weights, "step": 1}, url)
    with pytest.raises(IncompatibleError, match="missing in the checkpoint: model"):
        dist_ckpt.load_weights(Language(), url)
    model = Language(seed=1)
    dist_ckpt.load_weights(model, url, rename={"state_dict": "model"})
    assert same(Language(), model)


def test_a_scheduler_by_another_name(tmp_path: Path) -> None:
    model = Language()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3)
    scheduler.last_epoch = 5
    url = tmp_path / "last.pt"
    torch.save(
        {"optimizer_state_dict": optimizer.state_dict(), "lr_scheduler": scheduler.state_dict()},
        url,
    )
    fresh = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3)
    state = {"model": model, "optimizer": optimizer, "scheduler": fresh}
    dist_ckpt.load(state, url, only=["optimizer", "scheduler"])
    assert fresh.last_epoch == 5


class Adapted(nn.Module):
    """A layer with adapters as PEFT has them, under the names that it gives a whole model."""

    def __init__(self, *adapters: str, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        layer = nn.Module()
        layer.base_layer = nn.Linear(4, 4)
        for name in ("lora_A", "lora_B"):
            setattr(layer, name, nn.ModuleDict({a: nn.Linear(4, 4, bias=False) for a in adapters}))
        layer.lora_embedding_A = nn.ParameterDict({a: torch.rand(2) for a in adapters})
        head = nn.Module()
        head.original_module = nn.Linear(4, 2)
        head.modules_to_save = nn.ModuleDict({a: nn.Linear(4, 2) for a in adapters})
        for each in (layer.base_layer, head.original_module):
            each.requires_grad_(requires_grad=False)
        self.base_model = nn.Module()
        self.base_model.model = nn.ModuleDict({"layer": layer, "head": head})

    @property
    def frozen(self) -> torch.Tensor:
        """What is under the adapters."""
        return self.get_parameter("base_model.model.layer.base_layer.weight")

    def adapter(self, name: str) -> dict[str, torch.Tensor]:
        """Return the tensors of one adapter by the names that PEFT stores."""
        found = {}
        for key, tensor in self.state_dict().items():
            if name in key.split("."):
                short = key.replace(f".modules_to_save.{name}", "").replace(f".{name}", "")
                found[short] = tensor
        return found


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_an_adapter_folder_loads_into_the_model_that_has_the_adapter(
    kind: str, tmp_path: Path
) -> None:
    stored = Adapted("default").adapter("default")
    assert len(stored) == 5
    if kind == "bin":
        torch.save(stored, tmp_path / "adapter_model.bin")
    else:
        save_file(stored, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    for names, chosen in (
        (("default",), "default"),
        (("mine",), "mine"),
        (("b", "default"), "default"),
    ):
        model = Adapted(*names, seed=1)
        base = model.frozen.clone()
        for url in (tmp_path, tmp_path / f"adapter_model.{kind}"):
            report = dist_ckpt.load_weights(model, url)
            assert len(report.loaded) == 5
            assert report.missing == ()
        found = model.adapter(chosen)
        assert all(same_bits(found[name], tensor) for name, tensor in stored.items())
        assert same_bits(model.frozen, base)
        tensors = Adapted(*names, seed=2)
        dist_ckpt.load_weights(dict(tensors.state_dict()), tmp_path)
        trained = dist_ckpt.TrainState(rng=None, trainable_only=True, model=tensors)
        dist_ckpt.load(trained, tmp_path)
        assert all(same_bits(tensors.adapter(chosen)[n], tensor) for n, tensor in stored.items())
    with pytest.raises(IncompatibleError, match=r"adapters a, b.*rename="):
        dist_ckpt.load_weights(Adapted("a", "b"), tmp_path)
    with pytest.raises(IncompatibleError, match="get_peft_model"):
        dist_ckpt.load_weights(Language(), tmp_path)


def megatron(place: Path) -> dict[str, torch.Tensor]:
    """Write a directory as Megatron-Core's torch_dist has it: names without a tree, and a plan."""
    tensors = {
        "decoder.layers.mlp.weight": torch.rand(2, 4, 4),
        "embedding.word_embeddings.weight": torch.rand(8, 4),
        "optimizer.state.exp_avg.decoder.layers.mlp.weight": torch.rand(2, 4, 4),
    }
    extra = {"decoder.layers._extra_state/shard_0_2": [io.BytesIO(b"scales")]}
    stock_save({**tensors, **extra}, checkpoint_id=place)
    metadata = pickle.loads((place / ".metadata").read_bytes())  # noqa: S301
    item = WriteItem(MetadataIndex("decoder.layers.mlp.weight"), WriteItemType.SHARD)
    metadata.planner_data = None
    metadata.all_local_plans = [SavePlan([item])]
    (place / ".metadata").write_bytes(pickle.dumps(metadata))
    common = {"iteration": 30, "checkpoint_version": 3.0, "args": Namespace(hidden_size=4)}
    torch.save({**common, "optimizer": {"param_groups": [{"lr": 0.1}]}}, place / "common.pt")
    (place / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    return tensors


def test_a_directory_of_megatron(tmp_path: Path) -> None:
    tensors = megatron(tmp_path)
    weights = {name: torch.zeros_like(t) for name, t in tensors.items() if "exp_avg" not in name}
    report = dist_ckpt.load_weights(weights, tmp_path, skip=["model/*_extra_state*"])
    assert report.step == 30
    assert all(same_bits(tensors[name], tensor) for name, tensor in weights.items())
    with dist_ckpt.open_checkpoint(tmp_path) as opened:
        assert set(opened.parts) >= {"model", "optimizer", "iteration", "args"}
        (buffer,) = opened.read_values("model")["decoder.layers._extra_state/shard_0_2"]
        assert buffer.getvalue() == b"scales"
        assert opened.read_values("iteration") == {"value": 30}
        moments = opened.read_values("optimizer")["value"]
        assert moments["param_groups"] == [{"lr": 0.1}]
    model = Language()
    state = {"model": model, "optimizer": torch.optim.AdamW(model.parameters()), "rng": None}
    with pytest.raises(IncompatibleError, match=r"skip=\['optimizer'\]"):
        dist_ckpt.load(state, tmp_path, only=["optimizer"])


def test_other_names_than_those_of_plans_are_refused(tmp_path: Path) -> None:
    megatron(tmp_path)
    path = tmp_path / ".metadata"
    plans = b"torch.distributed.checkpoint.planner"
    # Of the same length, so that the stream stays one.
    path.write_bytes(path.read_bytes().replace(plans, b"os.path".ljust(len(plans), b"x")))
    with pytest.raises(IntegrityError, match="not admitted"):
        dist_ckpt.open_checkpoint(tmp_path)


def test_what_lightning_keeps_beside_its_directory(tmp_path: Path) -> None:
    stock_save({"state_dict": Lit().state_dict()}, checkpoint_id=tmp_path)
    torch.save({"epoch": 2, "global_step": 40, "loops": {"fit": {"n": 1}}}, tmp_path / "meta.pt")
    state = {"model": Language(seed=1), "epoch": 0, "loops": {}, "rng": None}
    report = dist_ckpt.load(state, tmp_path, strict=False)
    assert (report.step, state["epoch"], state["loops"]) == (40, 2, {"fit": {"n": 1}})
    model = state["model"]
    assert isinstance(model, Language)
    assert same(Language(), model)


def test_lists_and_numbered_keys_of_a_file_come_back(tmp_path: Path) -> None:
    url = tmp_path / "values.pt"
    nested = {"a": [torch.ones(2), {"b": 1}], 0: torch.zeros(1), 1: torch.ones(1)}
    torch.save({"nested": nested, "tail": (1, 2)}, url)
    with dist_ckpt.open_checkpoint(url) as opened:
        found = opened.read_values("nested")["value"]
    assert list(found) == ["a", 0, 1]
    assert same_bits(found["a"][0], torch.ones(2))
    assert found["a"][1] == {"b": 1}
    assert isinstance(found[0], torch.Tensor)


@pytest.mark.parametrize("model_key", ["model", "state_dict", "net"])
def test_tensors_and_lists_beside_a_model_are_parts_of_their_own(
    model_key: str, tmp_path: Path
) -> None:
    saved = Language()
    optimizer = torch.optim.SGD(saved.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    schedule.last_epoch = 7
    noise = torch.get_rng_state()
    file = tmp_path / "one.pt"
    torch.save(
        {
            model_key: saved.state_dict(),
            "torch_rng": noise,
            "lr_schedulers": [schedule.state_dict()],
            "global_step": 9,
        },
        file,
    )
    model = Language(seed=1)
    assert dist_ckpt.load_weights(model, file).unexpected == ()
    assert same(saved, model)
    with dist_ckpt.open_checkpoint(file) as opened:
        assert torch.equal(opened.read_values("torch_rng")["value"], noise)
    fresh = torch.optim.lr_scheduler.StepLR(torch.optim.SGD(model.parameters(), lr=0.5), 2)
    dist_ckpt.load({"scheduler": fresh}, file, only=["scheduler"])
    assert fresh.last_epoch == 7


def test_what_accelerate_writes(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    optimizer = AdamW(model.parameters(), lr=0.1)
    scheduler = StepLR(optimizer, 2)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    scheduler.step()
    drawn: dict[str, Any] = {"step": 1, "random_state": random.getstate()}
    drawn |= {"numpy_random_seed": np.random.get_state(), "cpu": torch.get_rng_state()}
    save_file(model.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.bin")
    torch.save(scheduler.state_dict(), tmp_path / "scheduler.bin")
    torch.save(drawn, tmp_path / "random_states_0.pkl")
    fresh = nn.Linear(3, 2)
    other = AdamW(fresh.parameters(), lr=0.5)
    following = StepLR(other, 2)
    dist_ckpt.load_weights(fresh, tmp_path)
    state = {"model": fresh, "optimizer": other, "rng": None}
    dist_ckpt.load(state, tmp_path / "optimizer.bin", only=["optimizer"])
    dist_ckpt.load({"scheduler": following, "rng": None}, tmp_path / "scheduler.bin")
    assert same(fresh, model)
    moments = optimizer.state[model.weight]["exp_avg"]
    assert torch.equal(other.state[fresh.weight]["exp_avg"], moments)
    assert following.state_dict() == scheduler.state_dict()
    with dist_ckpt.open_checkpoint(tmp_path / "random_states_0.pkl") as opened:
        assert opened.read_values("random_state")["value"] == random.getstate()
        found: Any = opened.read_values("numpy_random_seed")["value"]
    np.testing.assert_array_equal(found[1], drawn["numpy_random_seed"][1])


@pytest.mark.parametrize("rate", [torch.tensor(0.1), 0.1], ids=["tensor", "number"])
def test_a_flat_optimizer_whose_rate_is_a_tensor(rate: Any, tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    optimizer = AdamW(model.parameters(), lr=torch.tensor(0.1))
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    saved: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=flat)
    torch.save({"model": model.state_dict(), "optimizer": saved}, tmp_path / "last.pt")
    fresh = nn.Linear(3, 2)
    other = AdamW(fresh.parameters(), lr=rate * 5)
    dist_ckpt.load({"model": fresh, "optimizer": other, "rng": None}, tmp_path / "last.pt")
    found = other.param_groups[0]["lr"]
    assert type(found) is type(rate)
    assert float(found) == pytest.approx(0.1)
    saved["param_groups.bias.lr"] = torch.tensor(0.2)
    torch.save({"model": model.state_dict(), "optimizer": saved}, tmp_path / "last.pt")
    with pytest.raises(IncompatibleError, match=r"param_groups.weight\[bias\]"):
        dist_ckpt.load({"model": fresh, "optimizer": other, "rng": None}, tmp_path / "last.pt")


def test_the_model_file_of_deepspeed(tmp_path: Path) -> None:
    """As `engine.save_checkpoint` writes it: the model beside what the engine keeps."""
    saved, loaded = nn.Linear(3, 2), nn.Linear(3, 2)
    shapes = [OrderedDict((name, each.shape) for name, each in saved.named_parameters())]
    engine: dict[str, Any] = {
        "optimizer": None,
        "param_shapes": shapes,
        "shared_params": {},
        "skipped_steps": 0,
    }
    engine |= {"sparse_tensor_module_names": set(), "global_steps": 5, "ds_version": "0.19.8"}
    path = tmp_path / "mp_rank_00_model_states.pt"
    torch.save({"module": saved.state_dict(), "buffer_names": [], **engine, "epoch": 3}, path)
    dist_ckpt.load_weights(loaded, path)
    assert torch.equal(loaded.weight, saved.weight)
