"""What a site answers where no model is trained: values that JSON has, and arrays as safetensors; sums and means of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedflow.errors import TrainingInvalid, field_error
from fedflow.tensors import non_finite
from fedflow.types import RoundContext, Spec, Tensors, TensorSpec, canonical_json

__all__ = ["Answer", "added", "answer_spec", "as_arrays"]

Array = NDArray[Any]


@dataclass(frozen=True)
class Answer:
    """values: whatever JSON has, by name; tensors: by name. Nothing in either is NaN or infinite."""

    values: Mapping[str, Any] = field(default_factory=dict)
    tensors: Tensors = field(default_factory=dict)

    @classmethod
    def of(cls, returned: Any) -> Answer:
        """What a user's function returned: a mapping of names to arrays, tensors, numbers and whatever JSON has.

        Raises ValueError, saying which name is wrong.
        """
        if not isinstance(returned, Mapping) or not all(isinstance(name, str) for name in returned):
            raise ValueError(f"found {type(returned).__name__}, expected a mapping of names to numbers and arrays")
        tensors: dict[str, Tensor] = {}
        values: dict[str, Any] = {}
        for name, value in returned.items():
            if getattr(value, "ndim", 0) and isinstance(value, (np.ndarray, Tensor)):
                tensors[name] = _tensor(name, value)
            else:
                values[name] = _json(name, value)
        return cls(values, tensors)

    def named(self) -> dict[str, Any]:
        """Both, arrays as NumPy's."""
        return {**self.values, **as_arrays(self.tensors)}

    def numbers(self) -> dict[str, float]:
        """The values that are numbers."""
        return {n: float(v) for n, v in self.values.items() if _is_number(v)}

    # -- on its way
    def encoded(self) -> dict[str, Tensor]:
        """As bytes, those of one answer in one group of an update."""
        return {"values": _bytes(canonical_json(self.values)), "arrays": _bytes(save(dict(self.tensors)))}

    def within(self, limit: int, what: str, ctx: RoundContext, fix: str) -> dict[str, Tensor]:
        """`encoded`, neither part of which may take more than `limit` bytes. Raises TrainingInvalid about `what`, with the fix."""
        sent = self.encoded()
        for part, tensor in sent.items():
            if len(tensor) > limit:
                found = field_error(f"{what}: {part}", f"{len(tensor)} bytes", f"at most {limit}", fix)
                raise TrainingInvalid(found, **ctx.place)
        return sent

    @classmethod
    def decoded(cls, sent: Tensors) -> Answer:
        """The inverse of `encoded`, of bytes that anybody may have sent. Raises ValueError where they are nothing such."""
        try:
            values, tensors = json.loads(bytes(sent["values"].numpy())), load(bytes(sent["arrays"].numpy()))
        except (SafetensorError, RecursionError, LookupError, UnicodeDecodeError) as error:
            raise ValueError(f"an answer that cannot be read: {error}") from error
        if not isinstance(values, dict) or canonical_json(values) != bytes(sent["values"].numpy()):
            raise ValueError("an answer whose values are not the canonical JSON of a mapping")
        if bad := non_finite({"arrays": tensors}):
            raise ValueError(f"not finite: {bad}")
        return cls(values, tensors)


def answer_spec(limit: int) -> Spec:
    """What an encoded answer of at most `limit` bytes, twice, looks like in the group "answer"."""
    return {"answer": {name: TensorSpec((limit,), torch.uint8, up_to=True) for name in ("values", "arrays")}}


def as_arrays(tensors: Tensors) -> dict[str, Array]:
    """Copies, as NumPy's; bfloat16, which it has not, as float32."""
    return {n: (t.float() if t.dtype == torch.bfloat16 else t.detach().clone()).numpy() for n, t in tensors.items()}


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _tensor(name: str, value: Array | Tensor) -> Tensor:
    if isinstance(value, Tensor):
        tensor = value.detach().cpu().clone()
    else:
        try:
            tensor = torch.from_numpy(np.array(value, order="C"))
        except TypeError:
            raise ValueError(f"{name}: found an array of {value.dtype}, expected one of numbers") from None
    if tensor.dtype.is_complex:
        raise ValueError(f"{name}: found an array of complex numbers, expected real ones; send both parts")
    if non_finite({"": {name: tensor}}):
        raise ValueError(f"{name}: found NaN or infinite values, expected finite ones; leave them out")
    return tensor.contiguous()


def _json(name: str, value: Any) -> Any:
    plain = _plain(value)
    try:
        return json.loads(canonical_json(plain))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name}: found what JSON has not ({error}), expected numbers, texts, lists of them") from None


def _plain(value: Any) -> Any:
    """NumPy's and torch's numbers as Python's."""
    if isinstance(value, (np.generic, np.ndarray, Tensor)):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# -- reductions --------------------------------------------------------------------------------------------------------
def added(answers: Iterable[tuple[Answer, float | None]], *, mean: bool) -> Answer:
    """Σ of what all have under a name, or Σ w·x / Σ w over those that have it; what is neither number nor array is left out.

    answers: each with its weight (None in a sum), in their order, which decides the bits
    Floats are summed in float64, whole numbers and booleans in int64; means are float64.
    Raises ValueError where arrays of one name have different shapes, or a name is a number here and an array there.
    """
    sums: dict[str, Any] = {}
    weights: dict[str, float] = {}
    for answer, weight in answers:
        numbers = {n: v for n, v in answer.values.items() if _is_number(v)}
        for name, value in {**numbers, **{n: _wide(t, mean) for n, t in answer.tensors.items()}}.items():
            _check_like(name, sums.get(name), value)
            part = value if weight is None or not mean else value * weight
            sums[name] = part if name not in sums else sums[name] + part
            weights[name] = weights.get(name, 0.0) + (weight or 0.0)
    found = {name: total / weights[name] if mean else total for name, total in sums.items()}
    tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    return Answer({name: value for name, value in found.items() if name not in tensors}, tensors)


def _wide(tensor: Tensor, mean: bool) -> Tensor:
    return tensor.to(torch.float64 if mean or tensor.dtype.is_floating_point else torch.int64)


def _check_like(name: str, before: Any, value: Any) -> None:
    found, expected = (getattr(x, "shape", None) for x in (value, before))
    if before is not None and found != expected:
        told = ["a number" if shape is None else f"an array of shape {list(shape)}" for shape in (found, expected)]
        raise ValueError(f"{name}: found {told[0]}, expected {told[1]} as others sent")
