"""transformers' `Trainer` and ours: what a save costs the training, and what a torn one costs."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from benchmarks.measure import say, verdict
from dist_ckpt.integrations.transformers import DistCkptTrainer

STALL_TARGET = 1.0

_KINDS: Mapping[str, type[Any]] = {"transformers": Trainer, "dist_ckpt": DistCkptTrainer}
_STEPS, _EVERY = 8, 2
# The first save of ours plans and takes its memory.
_EARLY = 1


def transformers(place: Path, chosen: argparse.Namespace) -> bool:
    """Measure both, for a whole model and for adapters; say what became of a torn checkpoint."""
    met = True
    for what, adapters in (("whole model", False), ("LoRA adapters", True)):
        blocked: dict[str, float] = {}
        say(f"\ntransformers, {what}, {_STEPS // _EVERY} saves in {_STEPS} steps")
        for name, kind in _KINDS.items():
            out = place / f"{name}-{adapters}"
            made = _trainer(kind, out, scale=chosen.scale, adapters=adapters)
            made.train()
            blocked[name] = median(made.blocked[_EARLY:])
            size = _bytes_of(out)
            after = _after_a_torn_one(kind, out, scale=chosen.scale, adapters=adapters)
            say(
                f"  {name:14} blocked {blocked[name]:8.4f} s a save, {size / 2**20:8.2f} MiB, "
                f"newest cut in half: {after}"
            )
        ratio = blocked["dist_ckpt"] / blocked["transformers"]
        met &= verdict(f"seconds blocked, {what} / transformers", ratio, target=STALL_TARGET)
    return met


def _trainer(kind: type[Any], out: Path, *, scale: float, adapters: bool) -> Any:
    class Timed(kind):
        """Notes how long each save holds up the training."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.blocked: list[float] = []
            super().__init__(*args, **kwargs)

        def _save_checkpoint(self, *args: Any) -> None:
            begun = time.perf_counter()
            super()._save_checkpoint(*args)
            self.blocked.append(time.perf_counter() - begun)

    torch.manual_seed(1)
    width = 64 * max(1, round(12 * scale))
    config = GPT2Config(n_layer=max(1, round(12 * scale)), n_embd=width, n_head=width // 64)
    model: Any = GPT2LMHeadModel(config)
    if adapters:
        settings = LoraConfig(r=8, target_modules=["c_attn"], fan_in_fan_out=True)
        model = get_peft_model(model, settings)
    rows = torch.randint(1000, (_STEPS, 16), generator=torch.Generator().manual_seed(2))
    args = TrainingArguments(
        str(out),
        per_device_train_batch_size=1,
        max_steps=_STEPS,
        save_steps=_EVERY,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
    )
    return Timed(model, args, train_dataset=[{"input_ids": row, "labels": row} for row in rows])


def _bytes_of(out: Path) -> int:
    """Return the size of the newest checkpoint."""
    newest = max(out.glob("*-*[0-9]"), key=lambda each: int(each.name.rpartition("-")[2]))
    return sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())


def _after_a_torn_one(kind: type[Any], out: Path, *, scale: float, adapters: bool) -> str:
    """Cut the weights of the newest checkpoint in half, resume, and say what became of it."""
    newest = max(out.glob("*-*[0-9]"), key=lambda each: int(each.name.rpartition("-")[2]))
    for file in newest.rglob("*model*.safetensors"):
        os.truncate(file, file.stat().st_size // 2)
    resumed = _trainer(kind, out, scale=scale, adapters=adapters)
    try:
        resumed.train(resume_from_checkpoint=True)
    except Exception as error:  # whatever the framework makes of it
        return f"{type(error).__name__}"
    return f"goes on from the one before, to step {resumed.state.global_step}"
