"""What tests use of quantizing libraries: imported by whoever asks, as that takes seconds."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "AdamW4bit": "torchao.optim",
    "AdamW8bit": "torchao.optim",
    "AdamWFp8": "torchao.optim",
    "Float8WeightOnlyConfig": "torchao.quantization",
    "Int8WeightOnlyConfig": "torchao.quantization",
    "quantize_": "torchao.quantization",
    "LinearMMConfig": "torchao.float8.float8_linear",
    "WeightWithDynamicFloat8CastTensor": "torchao.float8.fsdp_utils",
    "Int8QuantizedTrainingLinearWeight": "torchao.prototype.quantized_training",
    "int8_weight_only_quantized_training": "torchao.prototype.quantized_training",
    "NF4Tensor": "torchao.quantization.quantize_.workflows.nf4.nf4_tensor",
    "to_nf4": "torchao.quantization.quantize_.workflows.nf4.nf4_tensor",
    "Linear4bit": "bitsandbytes.nn",
    "Linear8bitLt": "bitsandbytes.nn",
    "bnb_AdamW8bit": "bitsandbytes.optim",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(name)
    return getattr(import_module(_HOMES[name]), name.removeprefix("bnb_"))
