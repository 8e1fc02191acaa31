"""The trainer of torchtitan itself, as far as it runs without a GPU: its steps, model and loss.

What it does in its `__init__` and once after its first step asks CUDA for the device, whatever the
config says; a test holds where. All else is torchtitan's own, on ranks that shard by FSDP2 on gloo.
"""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import IterableDataset

import dist_ckpt
from dist_ckpt import events
from dist_ckpt.testing.ranks import run_ranks

pytestmark = [pytest.mark.soak, pytest.mark.filterwarnings("ignore")]

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("torchtitan")
    # One of its modules of kernels imports this on any machine.
    pytest.importorskip("triton")
    from torchtitan.components.dataloader import ParallelAwareDataloader
    from torchtitan.components.loss import CrossEntropyLoss
    from torchtitan.distributed import ParallelDims
    from torchtitan.distributed.utils import get_spmd_context, set_pg_timeouts
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.models.common.config_utils import decoder_vocab_size
    from torchtitan.models.llama3 import model_registry
    from torchtitan.models.llama3.config_registry import llama3_debugmodel
    from torchtitan.trainer import Trainer

    from dist_ckpt.integrations.torchtitan import DistCkptManager

SECONDS = 600.0
TOKENS, BATCH = 16, 2


class Rows(IterableDataset[tuple[dict[str, torch.Tensor], torch.Tensor]]):
    """Tokens and what follows each of them, an endless stream that can be gone on with."""

    def __init__(self, rank: int, vocabulary: int) -> None:
        self.next = 0
        self.rank = rank
        self.vocabulary = vocabulary

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        while True:
            self.next += 1
            seeded = torch.Generator().manual_seed(1000 * self.rank + self.next)
            row = torch.randint(self.vocabulary, (TOKENS + 1,), generator=seeded)
            yield {"input": row[:-1]}, row[1:]

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


class Noted:
    """What the trainer tells its metrics, which look at the memory of a GPU."""

    def __init__(self) -> None:
        self.ntokens_since_last_log = 0
        self.data_loading_times: list[float] = []
        self.losses: dict[int, tuple[float, float]] = {}

    def should_log(self, step: int) -> bool:
        return True

    def log(self, step: int, average: float, worst: float, norm: float, **extra: Any) -> None:
        self.losses[step] = (average, norm)

    def close(self) -> None:
        pass


def config_for(run: str, batch: int = BATCH) -> Any:
    """Return the config of a small Llama 3 that saves into a run."""
    config = llama3_debugmodel()
    config.model_spec = model_registry("debugmodel")
    for layer in config.model_spec.model.layers:
        # The others are kernels of GPUs.
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    config.loss = CrossEntropyLoss.Config(global_vocab_size=decoder_vocab_size(config.model_spec))
    # Its other ways ask for a mesh of GPUs, of one rank too.
    config.parallelism.spmd_backend = "partial_dtensor"
    config.optimizer.implementation = "for-loop"
    config.training.seq_len = TOKENS
    config.training.local_batch_size = batch
    config.training.disable_cuda_graphs = True
    config.checkpoint = DistCkptManager.Config(enable=True, folder=run, interval=2, keep_latest_k=2)
    return config


class Alone(ParallelDims):
    """The dimensions of one rank, which ask for no mesh: theirs are of GPUs."""

    def get_optional_mesh(self, dims: Any) -> None:
        return None


class OnCpu(Trainer):
    """What `Trainer.__init__` builds, built by the same configs on the CPU; its loop as it is."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.device = torch.device("cpu")
        ranks = torch.distributed.get_world_size()
        # It is told of one rank, and FSDP2 has a mesh beside it.
        self.parallel_dims = Alone.from_config(config.parallelism, 1)
        self.gradient_accumulation_steps = self.num_pipeline_parallel_microbatches = 1
        self.model_config = config.model_spec.model
        self.model_config.update_from_config(config=config)
        with torch.device("meta"):
            model = self.model_config.build()
        mesh = init_device_mesh("cpu", (ranks,))
        for block in model.layers.values():
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model.to_empty(device="cpu")
        torch.manual_seed(1)
        with torch.no_grad():
            model.init_weights(buffer_device=None)
        self.model_parts = [model]
        self.loss_fn = config.loss.build(compile_config=config.compile)
        self.optimizers = config.optimizer.build(model_parts=self.model_parts)
        self.lr_schedulers = config.lr_scheduler.build(
            optimizers=self.optimizers, training_steps=config.training.steps
        )
        self.step = self.ntokens_seen = 0
        rank = torch.distributed.get_rank()
        self.dataloader = ParallelAwareDataloader(
            Rows(rank, decoder_vocab_size(config.model_spec)),
            dp_rank=rank,
            dp_world_size=ranks,
            batch_size=config.training.local_batch_size,
        )
        self.checkpointer = config.checkpoint.build(
            dataloader=self.dataloader,
            model_parts=self.model_parts,
            optimizers=self.optimizers,
            lr_schedulers=self.lr_schedulers,
            states={"train_state": self},
            sd_adapter=None,
            base_folder=config.dump_folder,
        )
        self.train_context = get_spmd_context(parallel_dims=self.parallel_dims)
        self.fwd_bwd_fn = self._forward_backward_body
        self.metrics_processor = Noted()

    def train(self, until: int) -> dict[int, tuple[float, float]]:
        """Take the steps of `Trainer.train`, without what that does for GPUs between them."""
        self.checkpointer.load(step=self.config.checkpoint.load_step)
        batches = self.batch_generator(self.dataloader)
        while self.step < until:
            self.step += 1
            self.train_step(batches)
            self.checkpointer.save(self.step, last_step=self.step == until)
        self.close()
        return self.metrics_processor.losses


def train(run: str, until: int, die_at: int = 0) -> dict[int, tuple[float, float]]:
    """Train on every rank; return the loss and the norm of the gradients of each step."""
    warnings.simplefilter("ignore")

    def die(event: events.Event) -> None:
        if isinstance(event, events.FileWritten) and event.step == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    events.subscribe(die)
    return OnCpu(config_for(run)).train(until)


@pytest.mark.timeout(2000)
def test_killed_in_a_save_its_losses_go_on_bit_for_bit(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    whole = run_ranks(2, train, str(tmp_path / "whole"), 8, timeout_seconds=SECONDS)
    run_ranks(2, train, run, 8, 6, expect_killed={0, 1}, timeout_seconds=SECONDS)
    assert dist_ckpt.Run(run).steps() == [2, 4]
    again = run_ranks(2, train, run, 8, timeout_seconds=SECONDS)
    for rank in range(2):
        assert list(again[rank]) == [5, 6, 7, 8]
        assert again[rank] == {step: whole[rank][step] for step in again[rank]}
    assert again[0] != again[1], "each rank has data of its own"


def train_by(run: str, until: int, batch: int) -> tuple[int, int]:
    """Train on every rank; return how many rows and tokens of its data were taken."""
    warnings.simplefilter("ignore")
    trainer = OnCpu(config_for(run, batch))
    trainer.train(until)
    return trainer.dataloader.dataset.next, trainer.ntokens_seen


@pytest.mark.timeout(2000)
def test_another_batch_goes_on_behind_the_rows_that_were_taken(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    for until, batch, rows in (2, 2, 4), (4, 3, 10):
        taken = run_ranks(2, train_by, run, until, batch, timeout_seconds=SECONDS)
        assert taken == [(rows, rows * TOKENS)] * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="it runs where there is a GPU")
def test_where_its_trainer_asks_for_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises((AttributeError, AssertionError, RuntimeError)) as raised:
        Trainer(config_for(str(tmp_path / "run")))
    assert raised.traceback[-2].name == "__init__"
    assert "set_device" in str(raised.traceback[-2].statement)
    # Of what `Trainer.train` does once after the first step.
    dims = ParallelDims.from_config(llama3_debugmodel().parallelism, 1)
    with pytest.raises((AttributeError, AssertionError, RuntimeError)) as raised:
        set_pg_timeouts(timeout=timedelta(seconds=1), parallel_dims=dims)
    assert "current_device" in [entry.name for entry in raised.traceback]
