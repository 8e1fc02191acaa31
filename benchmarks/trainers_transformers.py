"""transformers' `Trainer` and ours: what a save costs the training, and what a torn one costs."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from benchmarks.trainers_beside import EVERY, STEPS, Clock, Side, beside, newest_numbered
from dist_ckpt.integrations.transformers import DistCkptTrainer


def measure(place: Path, chosen: argparse.Namespace) -> bool:
    """Measure both, for a whole model and for adapters."""
    met = True
    for what, adapters in (("whole model", False), ("LoRA adapters", True)):
        make = partial(_trainer, scale=chosen.scale, adapters=adapters)
        sides = [
            Side("transformers", *_ways(Trainer, make)),
            Side("dist_ckpt", *_ways(DistCkptTrainer, make), ours=True),
        ]
        met &= beside(f"transformers, {what}", sides, place, repeats=chosen.repeats)
    return met


def gpt2(scale: float) -> GPT2LMHeadModel:
    """Return a GPT-2: at 1.0 a small one, of 124 million parameters."""
    torch.manual_seed(1)
    width = 64 * max(1, round(12 * scale))
    config = GPT2Config(n_layer=max(1, round(12 * scale)), n_embd=width, n_head=width // 64)
    return GPT2LMHeadModel(config)


def rows() -> torch.Tensor:
    """Return the tokens of each step."""
    return torch.randint(1000, (STEPS, 16), generator=torch.Generator().manual_seed(2))


class _Start(TrainerCallback):
    """Notes from which step a training goes on, and has it end there."""

    step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step = state.global_step


def _ways(kind: type[Any], make: Any) -> tuple[Any, Any, Any]:
    def train(out: Path, clock: Clock) -> None:
        class Timed(kind):
            """Notes how long each save holds up the training."""

            def _save_checkpoint(self, *args: Any) -> None:
                with clock.saving():
                    super()._save_checkpoint(*args)

        make(Timed, out).train()

    def resume(out: Path) -> int:
        start = _Start()
        make(kind, out, callbacks=[start]).train(resume_from_checkpoint=True)
        return start.step

    return train, partial(newest_numbered, pattern="*-*[0-9]"), resume


def _trainer(
    kind: type[Any], out: Path, *, scale: float, adapters: bool, callbacks: Any = None
) -> Any:
    model: Any = gpt2(scale)
    if adapters:
        settings = LoraConfig(r=8, target_modules=["c_attn"], fan_in_fan_out=True)
        model = get_peft_model(model, settings)
    args = TrainingArguments(
        str(out),
        per_device_train_batch_size=1,
        max_steps=STEPS,
        save_steps=EVERY,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
    )
    data = [{"input_ids": row, "labels": row} for row in rows()]
    return kind(model, args, train_dataset=data, callbacks=callbacks)
