"""Train a small GPT on the source of Python's own standard library, and survive anything.

    python examples/train_gpt.py --checkpoint-dir runs/gpt --auto-resume
    torchrun --standalone --nproc-per-node 2 examples/train_gpt.py \
        --checkpoint-dir runs/gpt --auto-resume --parallel fsdp

Kill it and start it again, with as many workers as you like and either layout: it goes on from
the newest good checkpoint. Asked to end (SIGTERM), it saves first. See `--help` for more ways to
begin. Every line that has to do with checkpoints ends in `# checkpoint`.

For `torchrun --max-restarts`, set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1: without it, torch 2.13
hands restarted workers the addresses of those that died.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TextIO, cast

import torch
import torch.distributed as dist
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset

from dist_ckpt import Checkpointer, ElasticSampler, TrainState, flags, policy  # checkpoint

VOCABULARY = 256  # the tokens are bytes
BLOCK_TOKENS = 64
GLOBAL_BATCH = 12  # samples per step over all ranks: 1, 2, 3 and 4 ranks get equal shares
EPOCH_STEPS = 72
WARMUP_STEPS = 10
PEAK_RATE = 1e-3
CORPUS_BYTES = 2_000_000

Watch = Callable[[int, nn.Module, torch.optim.Optimizer], None]


@dataclass(frozen=True)
class Options:
    """What the command line says.

    Attributes:
        checkpoint: where checkpoints go, when, and from which one to begin.
        parallel: `ddp` or `fsdp` (FSDP2).
        device: `cpu`, `cuda`, or `auto`: CUDA where each local worker can have a device.
        steps: stop after this step; a later start may go on to the end of the epoch.
        losses: file to append losses to, as JSON lines; sample ids go next to it, one file a rank.
        seed: of the weights, the order of the data, and dropout.
        width: of the model, in numbers for each token.
        layers: of the model.
    """

    checkpoint: flags.Flags  # checkpoint
    parallel: str = "ddp"
    device: str = "auto"
    steps: int = EPOCH_STEPS
    losses: Path | None = None
    seed: int = 1
    width: int = 128
    layers: int = 4


def parse_options(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line (`sys.argv` when `arguments` is None)."""
    parser = argparse.ArgumentParser(description="Train a small GPT on the standard library.")
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), default=Options.parallel)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default=Options.device)
    parser.add_argument(
        "--steps",
        type=int,
        choices=range(1, EPOCH_STEPS + 1),
        default=Options.steps,
        metavar="N",
        help=f"stop after step N (at most {EPOCH_STEPS}, the epoch)",
    )
    parser.add_argument("--losses", type=Path, metavar="FILE", help="append them to FILE")
    parser.add_argument("--seed", type=int, default=Options.seed)
    parser.add_argument("--width", type=int, default=Options.width, help="of the model")
    parser.add_argument("--layers", type=int, default=Options.layers, help="of the model")
    flags.add_arguments(parser)  # checkpoint
    parser.set_defaults(checkpoint_interval=10, keep_last=3)  # checkpoint
    parsed = parser.parse_args(arguments)
    names = ("parallel", "device", "steps", "losses", "seed", "width", "layers")
    own = {name: getattr(parsed, name) for name in names}
    return Options(flags.parse(parsed), **own)  # checkpoint


def read_corpus(limit_bytes: int = CORPUS_BYTES) -> bytes:
    """Return the first `limit_bytes` of the standard library's modules, in order of their names."""
    text = bytearray()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= limit_bytes:
            break
    return bytes(text[:limit_bytes])


class Windows(Dataset[tuple[int, Tensor]]):
    """`count` windows of BLOCK_TOKENS + 1 bytes, spread evenly over `text`."""

    def __init__(self, text: bytes, count: int) -> None:
        if len(text) < count + BLOCK_TOKENS:
            raise ValueError(f"{len(text)} bytes of text are too few for {count} windows")
        self.bytes = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, sample: int) -> tuple[int, Tensor]:
        start = sample * (len(self.bytes) - BLOCK_TOKENS - 1) // self.count
        return sample, self.bytes[start : start + BLOCK_TOKENS + 1].long()


class Block(nn.Module):
    """One transformer layer: attention, then a feed-forward net, each added to its input."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map activations [batch, time, width] to new ones of the same shape."""
        heads = self.qkv(self.norm1(x)).unflatten(2, (3 * self.heads, -1)).transpose(1, 2)
        dropout = self.dropout if self.training else 0.0
        q, k, v = heads.chunk(3, 1)
        y = functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        y = self.out(y.transpose(1, 2).flatten(2))
        x = x + functional.dropout(y, self.dropout, self.training)
        return x + cast(Tensor, self.feed(self.norm2(x)))


class GPT(nn.Module):
    """A byte-level language model."""

    def __init__(self, *, width: int, layers: int, heads: int = 4, dropout: float = 0.1) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, width)
        self.position = nn.Parameter(0.02 * torch.randn(BLOCK_TOKENS, width))
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens [batch, time] to logits of the next ones [batch, time, VOCABULARY]."""
        x = self.token(tokens) + self.position[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return cast(Tensor, self.head(self.norm(x)))


def rate_factor(step: int) -> float:
    """Return the fraction of the peak rate after `step` steps: a ramp, then half a cosine."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    return 0.55 + 0.45 * math.cos(math.pi * (step - WARMUP_STEPS) / (EPOCH_STEPS - WARMUP_STEPS))


@contextmanager
def process_group(device_option: str) -> Iterator[torch.device]:
    """Join the other workers, yield this one's device, and part from them at the end."""
    local, workers = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    enough = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device_option == "cuda" or (device_option == "auto" and enough):
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        if workers > 1:
            torch.set_num_threads(1)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:  # started without torchrun: a group of one
        dist.init_process_group(backend, init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    yield device
    # A rank that leaves while a peer still finishes a collective can abort that peer.
    dist.barrier()
    dist.destroy_process_group()


def parallelize(model: nn.Module, layout: str, device: torch.device) -> nn.Module:
    """Spread `model`, which is the same on all ranks, over them."""
    model = model.to(device)
    if layout == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in cast(GPT, model).blocks:
        fully_shard(block, mesh=mesh)
    return cast(nn.Module, fully_shard(model, mesh=mesh))


class Reporter:
    """The progress bar of rank 0, and JSON lines: its losses, and by each rank the sample ids.

    Every start of the program begins with a line that names the step it resumed from, so a reader
    can tell which of the lines before it still stand.
    """

    def __init__(self, options: Options, *, resumed: int) -> None:
        rank = dist.get_rank()
        file = options.losses
        self._losses = _append_to(file if rank == 0 else None)
        self._samples = _append_to(file and sample_log(file, rank))
        for log in (self._losses, self._samples):
            _write(log, resumed=resumed, layout=options.parallel, world_size=dist.get_world_size())
        loss = TextColumn("loss {task.fields[loss]:.4f}")
        columns = ("step", BarColumn(), MofNCompleteColumn(), loss, TimeRemainingColumn())
        self._bar = Progress(*columns, disable=rank != 0)
        self._task = self._bar.add_task("", completed=resumed, total=options.steps, loss=math.nan)

    def __enter__(self) -> Reporter:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        for log in (self._losses, self._samples):
            if log is not None:
                log.close()

    def step(self, step: int, *, loss: float, rate: float, samples: list[int]) -> None:
        """Write the lines of one step; `float.hex` keeps every bit of the loss."""
        _write(self._losses, step=step, loss=loss.hex(), rate=rate)
        _write(self._samples, step=step, samples=samples)
        self._bar.update(self._task, completed=step, loss=loss)


def sample_log(file: Path, rank: int) -> Path:
    """Return where `rank` writes its sample ids when losses go to `file`."""
    return file.with_suffix(f".rank{rank}{file.suffix}")


def _append_to(file: Path | None) -> TextIO | None:
    if file is None:
        return None
    file.parent.mkdir(parents=True, exist_ok=True)
    # Buffered by line: each line is one write, which a SIGKILL cannot cut in two.
    return file.open("a", buffering=1)


def _write(log: TextIO | None, **values: object) -> None:
    if log is not None:
        log.write(json.dumps({**values, "time": time.time()}) + "\n")


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, windows: Tensor) -> float:
    """Take one optimizer step on this rank's windows; return the mean loss over all ranks."""
    logits = model(windows[:, :-1])
    loss = functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    optimizer.step()
    total = loss.detach()
    dist.all_reduce(total)  # all ranks have as many tokens: the mean of their means is the mean
    return total.item() / dist.get_world_size()


def train(options: Options, device: torch.device, *, watch: Watch | None = None) -> None:
    """Train up to `options.steps`, from the newest checkpoint if there is one.

    Args:
        options: see `Options`.
        device: of this rank.
        watch: called on every rank with the step, the model and the optimizer, after the restore
            and after each step.
    """
    torch.manual_seed(options.seed)  # the same weights on all ranks ...
    gpt = GPT(width=options.width, layers=options.layers)
    model = parallelize(gpt, options.parallel, device)
    torch.manual_seed(options.seed + 1 + dist.get_rank())  # ... but to each its own dropout
    adamw = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE)
    rates = LambdaLR(adamw, rate_factor)
    data = Windows(read_corpus(), count=EPOCH_STEPS * GLOBAL_BATCH)
    sampler = ElasticSampler(len(data), global_batch=GLOBAL_BATCH, seed=options.seed)  # checkpoint
    loader = DataLoader(data, batch_sampler=sampler)

    state = TrainState(model=model, optimizer=adamw, scheduler=rates, sampler=sampler)  # checkpoint
    also = policy.last(options.steps) | policy.on_signal()  # checkpoint
    with Checkpointer.from_args(options.checkpoint, state, when=also) as ckpt:  # checkpoint
        resumed = ckpt.restore()  # checkpoint
        with Reporter(options, resumed=resumed) as report:
            if watch:
                watch(resumed, model, adamw)
            batches = islice(sampler.batches(loader), options.steps - resumed)  # checkpoint
            for step, (samples, windows) in enumerate(batches, resumed + 1):
                loss = train_step(model, adamw, windows.to(device))
                rate = float(rates.get_last_lr()[0])
                rates.step()
                ckpt.step(step, metrics={"train/loss": loss})  # checkpoint
                report.step(step, loss=loss, rate=rate, samples=samples.tolist())
                if watch:
                    watch(step, model, adamw)
                if ckpt.signaled:  # checkpoint
                    break


def main() -> None:
    """Train as the command line says."""
    options = parse_options()
    with process_group(options.device) as device:
        train(options, device)


if __name__ == "__main__":
    main()
