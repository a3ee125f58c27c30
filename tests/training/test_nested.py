"""Nested values as arrays and JSON, and back."""

from collections import Counter, OrderedDict

import pytest
import torch

from hpc_absa.errors import UsageError
from hpc_absa.training import nested

VALUES = {
    "empty": {},
    "numbers": [1, -2.5, float("inf"), True, None, 10**30],
    "keys": {1: "a", 2.5: "b", None: "c", "tensor": "d", "dict": []},
    "tuple": ((1, 2), []),
    "counter": Counter({3: 2}),
    "ordered": OrderedDict(a=torch.arange(3), b=torch.ones(2, dtype=torch.bfloat16)),
    "a.b": torch.tensor(1.5),
    "a": {"b": torch.tensor(True), "c/d": torch.zeros(0, 2, dtype=torch.complex64)},
}


def test_a_value_is_the_same_after_a_round_trip():
    tensors: nested.Tensors = {}
    node = nested.from_array(nested.to_tensor(nested.encode(VALUES, "x", tensors, "x")).numpy())
    assert not any("/" in name for name in tensors)
    decoded = nested.decode(node, lambda n: tensors[n["tensor"]])
    assert repr(decoded).replace("OrderedDict", "") == repr(
        {**VALUES, "ordered": dict(VALUES["ordered"])}
    )
    assert isinstance(decoded["counter"], Counter)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": [1, {2}]}, r"x\['a'\]\[1\] is of type set"),
        ({"f": print}, r"x\['f'\] is of type builtin_function_or_method"),
        ({(1, 2): 3}, r"x has the key \(1, 2\) of type tuple"),
        ({"s": torch.eye(2).to_sparse()}, r"x\['s'\] is a torch.sparse_coo tensor"),
    ],
)
def test_what_cannot_be_saved_is_refused_by_its_place(value, message):
    with pytest.raises(UsageError, match=message):
        nested.encode(value, "x", {}, "x")
