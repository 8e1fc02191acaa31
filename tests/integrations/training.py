"""A small training by transformers' `Trainer`, stock or ours, that writes down what it does."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from dist_ckpt import events
from dist_ckpt.integrations.transformers import DistCkptTrainer

SAMPLES = 24


class Tokens(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Rows of tokens, the same in every process."""

    def __init__(self) -> None:
        self.rows = torch.randint(64, (SAMPLES, 8), generator=torch.Generator().manual_seed(3))

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


class Noting(DistCkptTrainer):
    """Notes on which samples it was trained."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.seen: list[int] = []
        super().__init__(*args, **kwargs)

    def training_step(self, model: Any, inputs: Any, *rest: Any) -> Any:
        rows = self.train_dataset.rows.tolist()
        self.seen += [rows.index(row) for row in inputs["input_ids"].tolist()]
        return super().training_step(model, inputs, *rest)


def net(width: int = 8) -> GPT2LMHeadModel:
    # Its dropout draws: a resumed run is the same only with the random state of the other.
    torch.manual_seed(5)
    config = GPT2Config(
        n_layer=1, n_head=2, n_embd=width, vocab_size=64, bos_token_id=0, eos_token_id=1
    )
    return GPT2LMHeadModel(config)


def lora(width: int = 8) -> Any:
    settings = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    return get_peft_model(net(width), settings)


def arguments(out: Path | str, **settings: Any) -> TrainingArguments:
    """Return 12 steps: two epochs of batches of 4, each step of one batch."""
    chosen: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "save_steps": 2,
        "logging_steps": 1,
        "learning_rate": 0.01,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        **settings,
    }
    return TrainingArguments(str(out), **chosen)


def trainer(
    out: Path | str, *, kind: type[Trainer] = DistCkptTrainer, model: Any = None, **settings: Any
) -> Any:
    """Return a trainer; what is no keyword of `TrainingArguments` is one of the trainer."""
    names = ("callbacks", "checkpoint_url", "checkpoint_options", "data_collator", "optimizers")
    own = {name: settings.pop(name) for name in names if name in settings}
    return kind(
        model=net() if model is None else model,
        args=arguments(out, **settings),
        train_dataset=Tokens(),
        eval_dataset=Tokens(),
        **own,
    )


def losses(done: Any) -> dict[int, float]:
    """Return the loss of each step, as it was logged."""
    return {entry["step"]: entry["loss"] for entry in done.state.log_history if "loss" in entry}


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def train_until_killed(out: str, step: int, settings: dict[str, Any]) -> None:
    """Train, and be killed when the first file of the save of `step` is written."""

    def kill(event: events.Event) -> None:
        if isinstance(event, events.FileWritten) and event.step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    events.subscribe(kill)
    trainer(out, **settings).train()


def train_and_tell(
    out: str, resume: Any, settings: dict[str, Any]
) -> tuple[dict[int, float], list[int]]:
    """Train; return the losses, and the samples that this rank was trained on."""
    made = trainer(out, kind=Noting, **settings)
    made.train(resume_from_checkpoint=resume)
    return losses(made), made.seen
