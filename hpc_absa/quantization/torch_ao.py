"""An allocation as the configuration of `torch.ao.quantization`, where torch has that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def available() -> bool:
    try:
        import torch.ao.quantization as ao
    except ImportError:
        return False
    return hasattr(ao, "QConfigMapping") and hasattr(ao, "FakeQuantize")


def weight_settings(bits: int) -> dict[str, Any]:
    """Arguments of `FakeQuantize.with_args` for a weight, with names in place of torch objects."""
    most = 2 ** (bits - 1) - 1
    return {
        "dtype": "qint8",
        "quant_min": -most,
        "quant_max": most,
        "qscheme": "per_channel_symmetric",
        "ch_axis": 0,
    }


def activation_settings(bits: int) -> dict[str, Any]:
    """As `weight_settings`, for a layer's input."""
    return {
        "dtype": "quint8",
        "quant_min": 0,
        "quant_max": 2**bits - 1,
        "qscheme": "per_tensor_affine",
    }


def qconfig_mapping(bits: Mapping[str, int]) -> Any:
    """A `QConfigMapping` with each layer's bits, for `prepare_qat_fx` and `prepare_fx`."""
    import torch
    import torch.ao.quantization as ao

    mapping = ao.QConfigMapping()
    for name, number in bits.items():
        settings = []
        for observer, values in (
            (ao.MovingAverageMinMaxObserver, activation_settings(number)),
            (ao.MovingAveragePerChannelMinMaxObserver, weight_settings(number)),
        ):
            resolved = {
                key: getattr(torch, value) if isinstance(value, str) else value
                for key, value in values.items()
            }
            settings.append(ao.FakeQuantize.with_args(observer=observer, **resolved))
        mapping.set_module_name(name, ao.QConfig(activation=settings[0], weight=settings[1]))
    return mapping
