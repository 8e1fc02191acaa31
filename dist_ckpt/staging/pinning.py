"""Page-locked host memory, which a CUDA device reads and writes by itself."""

from __future__ import annotations

import torch

from dist_ckpt.staging.arena import Pin, Unpin

_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device, not for the current one alone


def pin_for(device: torch.device) -> Pin:
    """Return what pins memory for copies from `device`."""

    def pin(memory: memoryview) -> Unpin:
        # On another thread device 0 is the current one, and a call there would open it.
        with torch.cuda.device(device):
            address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
            runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            code = int(runtime.cudaHostRegister(address, len(memory), _PORTABLE))
        if code:
            raise RuntimeError(f"cudaHostRegister refused with error {code}")
        return lambda: _unpin(address, device)

    return pin


def _unpin(address: int, device: torch.device) -> None:
    with torch.cuda.device(device):
        torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]
