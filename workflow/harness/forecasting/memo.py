"""What operators return for fake tensors, remembered.

torch works each answer out anew, in about 0.1 ms of Python; a forecast of a 7B model calls tens of thousands of
operators, and a few hundred different ones. What an operator returns depends on the shapes of its tensors and on its
other arguments, so it is worked out once, and then made again: memory of its own, a view of an argument, or an argument
itself. Whatever is anything else (values that are known, complex tensors, shapes that follow from values) is left to
torch every time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

_NEVER = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view)
"""Tags of operators whose answer follows from more than shapes, or that change the shape of an argument."""
_PLAIN = {int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format}
"""Types of arguments, other than tensors, that are compared by value."""
_SEVERAL = (list, tuple)

Key = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class _Part:
    """A tensor that an operator returned."""

    argument: int | None
    """Place of the argument that it is, or whose memory it shares; None for memory of its own."""
    is_argument: bool
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, slots=True)
class _Answer:
    """What an operator returned: one tensor, or a list or tuple of tensors and None."""

    parts: tuple[_Part | None, ...]
    among: type | None


_ANSWERS: dict[Key, _Answer | None] = {}
"""Of the whole process, since no answer depends on the mode; None where an answer cannot be made again."""
_USABLE: dict[Any, bool] = {}
"""Whether an operator's answers can be remembered at all."""


class Memo:
    """Calls operators on the fake tensors of `mode`, or makes again what they returned before for equal arguments.

    Args:
        mode: makes the fake tensors; it must be active whenever an operator is called.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode
        self._attributes: dict[torch.device, dict[str, Any]] = {}

    def __call__(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The operator's result."""
        if func is torch.ops.aten.rand.default and not args[0]:
            # a number drawn alone is read, as LayerDrop reads one a layer; like every number read, it is 1.0
            return torch.tensor(1.0)
        key = _key(func, args, kwargs)
        if key is None:
            return func(*args, **kwargs)
        answer = _ANSWERS.get(key)
        if answer is not None:
            if answer.among is None:
                return self._make(answer.parts[0], args)
            return answer.among(self._make(part, args) for part in answer.parts)
        result = func(*args, **kwargs)
        if key not in _ANSWERS:
            _ANSWERS[key] = self._answer(args, kwargs, result)
        return result

    def _answer(self, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> _Answer | None:
        """How the result can be made again; None where it cannot."""
        among = type(result) if type(result) in _SEVERAL else None
        made = [result] if among is None else list(result)
        parts: list[_Part | None] = []
        own: list[int] = []
        for tensor in made:
            part = self._part(args, kwargs, tensor)
            if part is None and (tensor is not None or among is None):
                return None
            if part is not None and part.argument is None:
                own.append(tensor.untyped_storage()._cdata)
            parts.append(part)
        return _Answer(tuple(parts), among) if len(set(own)) == len(own) else None

    def _part(self, args: Sequence[Any], kwargs: Mapping[str, Any], tensor: Any) -> _Part | None:
        """How one tensor of the result can be made again; None where it cannot."""
        if type(tensor) is not FakeTensor or _is_special(tensor):
            return None
        storage = tensor.untyped_storage()
        sharing = [one for one in tensors((args, kwargs)) if one.untyped_storage()._cdata == storage._cdata]
        is_argument = any(one is tensor for one in sharing)
        source = tensor if is_argument else sharing[0] if len(sharing) == 1 else None
        place = next((place for place, one in enumerate(args) if one is source), None) if source is not None else None
        if sharing and (source is None or place is None or source.dtype != tensor.dtype):
            return None
        part = _Part(
            place, is_argument, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()), tensor.dtype,
            tensor.fake_device,
        )  # fmt: skip
        again = self._make(part, args)
        assert again is not None
        same = again is tensor or (
            again.requires_grad == tensor.requires_grad
            and torch._C._dispatch_key_set(again) == torch._C._dispatch_key_set(tensor)
            and (again.shape, again.stride(), again.storage_offset()) == (part.shape, part.stride, part.offset)
            and again.untyped_storage().nbytes() == storage.nbytes()
        )
        return part if same else None

    def _make(self, part: _Part | None, args: Sequence[Any]) -> Tensor | None:
        """A tensor of the result, from the arguments of this call."""
        if part is None:
            return None
        if part.is_argument:
            found: Tensor = args[part.argument]  # type: ignore[index]
            return found
        if part.argument is None:
            with torch._C._DisableTorchDispatch():
                inner = torch.empty_strided(part.shape, part.stride, dtype=part.dtype, device="meta")
        else:
            with in_kernel_invocation_manager(self._mode):
                inner = torch.as_strided(args[part.argument], part.shape, part.stride, part.offset)
        return self._wrap(inner, part.device)

    def _wrap(self, inner: Tensor, device: torch.device) -> Tensor:
        """A fake tensor over a meta tensor. The constructor works out the same attributes for each, and takes long."""
        attributes = self._attributes.get(device)
        if attributes is None:
            first = FakeTensor(self._mode, inner, device)
            self._attributes[device] = dict(vars(first))
            return first
        made: Tensor = Tensor._make_subclass(
            FakeTensor, inner, False, dispatch_device=True, device_for_backend_keys=device
        )
        torch._C._set_throw_on_mutable_data_ptr(made)
        vars(made).update(attributes)
        return made


def _key(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Key | None:
    """The operator with its arguments, tensors by their shape; None where these do not decide the result."""
    usable = _USABLE.get(func)
    if usable is None:
        usable = _USABLE[func] = type(func) is OpOverload and not any(tag in _NEVER for tag in func.tags)
    if not usable:
        return None
    found: list[Any] = [func, torch.get_default_dtype()]
    if not _describe(args, found):
        return None
    for name, value in kwargs.items():
        found.append(name)
        if not _describe((value,), found):
            return None
    return tuple(found)


def _describe(values: Sequence[Any], found: list[Any]) -> bool:
    """Append what decides the result to `found`; False where a value cannot be described."""
    for value in values:
        kind = type(value)
        if kind is FakeTensor:
            if _is_special(value):
                return False
            found += (value.shape, value.stride(), value.storage_offset(), value.dtype, value._fake_device)
        elif kind in _PLAIN:
            found += (kind, value)  # with its type: 1, 1.0 and True are equal
        elif kind in _SEVERAL:
            found += (kind, len(value))
            if not _describe(value, found):
                return False
        else:
            return False
    return True


def _is_special(tensor: FakeTensor) -> bool:
    """Whether more than its shape matters: known values, or a number format with flags of its own."""
    return tensor.constant is not None or tensor.dtype.is_complex or tensor.layout is not torch.strided


def tensors(values: Any) -> Iterator[Tensor]:
    """Every tensor in an operator's arguments or results: tensors, and lists, tuples and dictionaries of them."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from tensors(value)
    elif isinstance(values, dict):
        yield from tensors(list(values.values()))
