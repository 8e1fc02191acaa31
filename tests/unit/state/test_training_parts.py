"""Parts of real fine-tuning runs: adapters on a frozen base, averaged weights, stateful loaders."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

import dist_ckpt
from dist_ckpt.errors import IncompatibleError, UsageError
from dist_ckpt.state.model import ModelPart

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torchdata calls what torch has deprecated
    from torchdata.stateful_dataloader import StatefulDataLoader


class Adapted(nn.Module):
    """A frozen base with buffers, and a low-rank adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)).requires_grad_(False)
        self.down = nn.Linear(6, 2, bias=False)
        self.up = nn.Linear(2, 6)
        self.up.bias.requires_grad_(False)
        self.up.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        adapted: torch.Tensor = self.up(self.down(x)) * self.up.scale
        out: torch.Tensor = self.base(x) + adapted
        return out


def trained() -> tuple[Adapted, AdamW]:
    model = Adapted()
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad])
    model(torch.randn(4, 6)).sum().backward()
    optimizer.step()
    return model, optimizer


def test_of_an_adapter_only_what_is_trained_is_stored(tmp_path: Path) -> None:
    model, optimizer = trained()
    state = dist_ckpt.TrainState(trainable_only=True, model=model, optimizer=optimizer)
    # A frozen normalisation counts on in training mode.
    statistics = {f"base.1.{name}" for name, _ in model.base[1].named_buffers()}
    names = {"down.weight", "up.weight", "up.scale"} | statistics
    assert state.parts["model"].capture().tensors.keys() == names
    dist_ckpt.save(state, tmp_path)

    other, other_optimizer = trained()
    base = {name: value.clone() for name, value in other.base.state_dict().items()}
    dist_ckpt.load(
        dist_ckpt.TrainState(trainable_only=True, model=other, optimizer=other_optimizer), tmp_path
    )
    for name in names:
        assert torch.equal(other.state_dict()[name], model.state_dict()[name])
    for name, parameter in other.base.named_parameters():
        assert torch.equal(parameter, base[name])
    moments = other_optimizer.state[other.down.weight]["exp_avg"]
    assert torch.equal(moments, optimizer.state[model.down.weight]["exp_avg"])

    # Half a model is not taken for a whole one.
    with pytest.raises(IncompatibleError, match=r"missing .*model/base\.0\.bias"):
        dist_ckpt.load({"model": other, "optimizer": other_optimizer}, tmp_path)


def test_the_option_is_no_part() -> None:
    options: dict[str, Any] = {"trainable_only": nn.Linear(1, 1)}
    with pytest.raises(UsageError, match="trainable_only is an option"):
        dist_ckpt.TrainState(**options)


def test_averaged_weights_have_the_names_of_the_model() -> None:
    model, _ = trained()
    average = AveragedModel(model, use_buffers=True)
    average.update_parameters(model)
    names = ModelPart(average).capture().tensors.keys()
    assert names == ModelPart(model).capture().tensors.keys() | {"n_averaged"}
    captured = {name: t.clone() for name, t in ModelPart(average).capture().tensors.items()}
    assert captured["n_averaged"] == 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_loader_goes_on_with_the_next_batch(tmp_path: Path, workers: int) -> None:
    def loader() -> Any:
        return StatefulDataLoader(list(range(40)), batch_size=4, shuffle=True, num_workers=workers)

    first = loader()
    batches = iter(first)
    for _ in range(3):
        next(batches)
    state = dist_ckpt.TrainState(loader=first)
    assert state.parts["loader"].capture().per_rank
    dist_ckpt.save(state, tmp_path)
    expected = [batch.tolist() for batch in batches]
    second = loader()
    dist_ckpt.load(dist_ckpt.TrainState(loader=second), tmp_path)
    assert [batch.tolist() for batch in second] == expected


def test_a_loader_without_a_position_is_refused() -> None:
    data: Any = [1, 2, 3]
    with pytest.raises(UsageError, match="a plain DataLoader has no position to keep"):
        dist_ckpt.TrainState(loader=DataLoader(data))
