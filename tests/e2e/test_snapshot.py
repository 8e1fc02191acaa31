"""What is saved is the state at the moment of the call."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

import dist_ckpt
from dist_ckpt.storage.local import LocalStore
from dist_ckpt.testing.stores import FaultyStore, Hang, Rule


def test_changes_after_the_call_are_not_stored(tmp_path: Path) -> None:
    hang = Hang()
    store = FaultyStore(LocalStore(tmp_path), [Rule("put", hang, key="step-*", nth=1)])
    net = torch.nn.Linear(4, 3)
    weights = net.weight.detach().clone()
    history = {"losses": [[1.0, 2.0], [3.0]], "counter": 7}
    table = {"ids": np.arange(6).reshape(2, 3)}
    dtensor_like = {"moments": torch.full((5,), 2.5)}
    state = {"model": net, "history": history, "table": table, "extra_tensors": dtensor_like}

    handle = dist_ckpt.async_save(state, store)
    hang.reached.wait()  # the writer is held before the first byte left
    with torch.no_grad():
        net.weight.fill_(-1)
    history["losses"][0].append(99.0)  # type: ignore[index]
    history["counter"] = 8
    table["ids"][0, 0] = 100
    dtensor_like["moments"].zero_()
    assert not handle.done()
    hang.release()
    handle.wait()

    fresh = torch.nn.Linear(4, 3)
    found = dist_ckpt.TrainState(
        model=fresh,
        history={},
        table={"ids": np.zeros((2, 3), np.int64)},
        extra_tensors={"moments": torch.zeros(5)},
    )
    dist_ckpt.load(found, tmp_path)
    assert torch.equal(fresh.weight, weights)
    assert found["history"] == {"losses": [[1.0, 2.0], [3.0]], "counter": 7}
    assert np.array_equal(found["table"]["ids"], np.arange(6).reshape(2, 3))
    assert torch.equal(found["extra_tensors"]["moments"], torch.full((5,), 2.5))


def test_a_save_in_flight_is_finished_before_the_interpreter_ends(tmp_path: Path) -> None:
    script = (
        "import dist_ckpt, torch\n"
        f"dist_ckpt.async_save({{'w': {{'t': torch.ones(1000)}}}}, {str(tmp_path)!r})\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=600)
    found = dist_ckpt.TrainState(w={"t": torch.zeros(1000)})
    dist_ckpt.load(found, tmp_path)
    assert torch.equal(found["w"]["t"], torch.ones(1000))
