"""The parts of the training example that need neither ranks nor storage."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from dist_ckpt import flags
from examples import train_gpt

SOURCE = Path(train_gpt.__file__).read_text()


def test_checkpoint_code_is_at_most_fifteen_lines() -> None:
    marked = [line for line in SOURCE.splitlines() if line.endswith("  # checkpoint")]
    assert 5 <= len(marked) <= 15


def test_every_line_of_checkpoint_code_is_counted() -> None:
    words = re.compile(
        r"\b(dist_ckpt|Checkpointer|ElasticSampler|TrainState|ckpt|state|sampler|policy|flags)\b"
    )
    code = [line for line in SOURCE.splitlines() if words.search(line.split("#")[0])]
    # The loader of the data is given the sampler: that line any training has.
    assert [c for c in code if not c.endswith("  # checkpoint") and "DataLoader(" not in c] == []


def test_corpus_is_python_source_and_always_the_same() -> None:
    corpus = train_gpt.read_corpus()
    assert len(corpus) == train_gpt.CORPUS_BYTES
    assert corpus == train_gpt.read_corpus()
    assert corpus.count(b"\nimport ") > 20
    assert train_gpt.read_corpus(1000) == corpus[:1000]


def test_windows_cover_the_text_evenly() -> None:
    text = bytes(range(256)) * 4
    windows = train_gpt.Windows(text, count=16)
    first, last = windows[0], windows[15]
    assert (first[0], last[0], len(windows)) == (0, 15, 16)
    assert bytes(first[1].tolist()) == text[: train_gpt.BLOCK_TOKENS + 1]
    assert len(last[1]) == train_gpt.BLOCK_TOKENS + 1
    starts = [int(windows[sample][1][0]) for sample in range(4)]
    assert starts == [0, 59, 119, 179]


def test_too_little_text_is_refused() -> None:
    with pytest.raises(ValueError, match="too few"):
        train_gpt.Windows(b"abc", count=2)


def test_model_sees_only_the_past() -> None:
    torch.manual_seed(0)
    model = train_gpt.GPT(width=16, layers=2, heads=2).eval()
    tokens = torch.randint(0, 256, (1, 12))
    changed = tokens.clone()
    changed[0, 8] ^= 1
    same = torch.isclose(model(tokens), model(changed), rtol=0, atol=1e-6).all(dim=-1)[0]
    assert same.tolist() == [True] * 8 + [False] * 4


def test_dropout_is_on_in_training() -> None:
    model = train_gpt.GPT(width=16, layers=1, heads=2)
    tokens = torch.zeros(1, 4, dtype=torch.long)
    assert not torch.equal(model(tokens), model(tokens))


def test_rate_rises_then_falls() -> None:
    factors = [train_gpt.rate_factor(step) for step in range(train_gpt.EPOCH_STEPS)]
    peak = factors.index(max(factors))
    assert max(factors) == pytest.approx(1.0)
    assert factors[:peak] == sorted(factors[:peak])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    assert 0.09 < factors[-1] < 0.11


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_batch_divides_among_ranks(world_size: int) -> None:
    assert train_gpt.GLOBAL_BATCH % world_size == 0


def test_options() -> None:
    given = ["--checkpoint-dir", "memory://x", "--auto-resume", "--losses", "a/b.jsonl"]
    said = flags.Flags("memory://x", checkpoint_interval=10, keep_last=3, auto_resume=True)
    assert train_gpt.parse_options(given) == train_gpt.Options(said, losses=Path("a/b.jsonl"))


@pytest.mark.parametrize("steps", ["0", str(train_gpt.EPOCH_STEPS + 1), "ten"])
def test_steps_beyond_the_epoch_are_refused(steps: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train_gpt.parse_options(["--checkpoint-dir", "x", "--steps", steps])
    assert "--steps" in capsys.readouterr().err


def test_sample_logs_lie_next_to_the_losses() -> None:
    assert train_gpt.sample_log(Path("a/losses.jsonl"), 3) == Path("a/losses.rank3.jsonl")
