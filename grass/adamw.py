"""AdamW with a separate dtype for its moments and a step count per parameter, updated piece by piece.

`torch.optim.AdamW` keeps its moments in the parameter's dtype. A bf16 second moment with beta2 = 0.999 never decays
(0.999 v rounds back to v), so bf16 weights need fp32 moments or stochastic rounding. With moments in the weights' dtype
and no stochastic rounding, torch's own fused kernel does the arithmetic, and the update equals that of
`torch.optim.AdamW(fused=True)` bit for bit. Moments may be packed in 8 bits (`grass.quantised`). Working in pieces
keeps temporaries small, whatever the size of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from grass.host import current
from grass.quantised import BLOCK, PACKED, moment_bytes, pack, stored_dtype, unpack
from grass.rounding import round_stochastically

Moments = dict[str, Any]
"""One parameter's state: `step` (int), `exp_avg` and `exp_avg_sq` (the parameter's shape, the moments' dtype; packed
ones are one-dimensional)."""


def new_moments(parameter: nn.Parameter, dtype: torch.dtype) -> Moments:
    """Zero moments for `parameter`, on its device."""
    stored = stored_dtype(parameter.numel(), dtype)
    if stored == PACKED:
        zeros = torch.zeros(moment_bytes(parameter.numel(), PACKED), dtype=PACKED, device=parameter.device)
    else:
        zeros = torch.zeros_like(parameter, dtype=stored, memory_format=torch.preserve_format)
    return {"step": 0, "exp_avg": zeros, "exp_avg_sq": zeros.clone()}


class Rounding:
    """Random bits for stochastic rounding; a piece's bits do not depend on what was updated before it.

    They depend only on the seed, the parameter's number, its step count and the piece's start. So a resumed run, other
    ranks and every offload mode round alike, and there is no state to save.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def generator(self, device: torch.device, *, parameter: int, step: int, start: int) -> torch.Generator:
        """A generator on `device`, seeded for one piece."""
        generator = self._generators.setdefault(device, torch.Generator(device))
        mixed = self.seed
        for part in (parameter, step, start):
            # splitmix64's increment and multiplier: neighbouring numbers give unrelated seeds
            mixed = ((mixed ^ (part + 0x9E3779B97F4A7C15)) * 0xBF58476D1CE4E5B9) % (1 << 63)
        return generator.manual_seed(mixed)


class Entries(NamedTuple):
    """Some entries of one parameter, to be updated in place."""

    weight: Tensor
    """Any shape."""
    gradient: Tensor
    """Same shape."""
    first: Tensor
    """First moments (`exp_avg`), same shape, the moments' dtype; or packed, whole records."""
    second: Tensor
    """Second moments (`exp_avg_sq`), same shape and dtype as `first`."""
    step: int
    """Number of this parameter's step, counted from 1."""
    generator: torch.Generator | None = None
    """Random bits; if given, bf16 weights and second moments are rounded stochastically."""

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weight, gradient and moments."""
        return self[:4]

    @property
    def fits_kernel(self) -> bool:
        """Whether torch's fused kernel serves it: it takes one dtype, rounds to nearest and reads memory in order."""
        one = self.weight
        return (
            self.generator is None
            and one.device.type in ("cpu", "cuda")
            and all(t.dtype == one.dtype and t.is_contiguous() for t in self.tensors)
        )


def update_pieces(pieces: Iterable[Entries], group: dict[str, Any]) -> None:
    """One AdamW step of all pieces (Loshchilov and Hutter 2019, algorithm 2).

    Pieces that fit torch's fused kernel go to it together, at the end; every other one is updated before the next is
    taken. How a parameter is split changes no bit. Call it under `torch.no_grad()`: entering that context for every
    piece would cost too much.

    Args:
        pieces: of any parameters on one device.
        group: the parameter group, with `lr`, `betas`, `eps`, `weight_decay`.
    """
    alike: dict[tuple[torch.dtype, int], list[Entries]] = {}
    for piece in pieces:
        if piece.fits_kernel:
            alike.setdefault((piece.weight.dtype, piece.step), []).append(piece)
        else:
            update_by_operations(piece, group)
    for (_, step), together in alike.items():
        weights, gradients, firsts, seconds = (list(t) for t in zip(*(p.tensors for p in together), strict=True))
        # the kernel wants the number of each step on the device; one tensor for all of them is one launch
        steps = list(torch.full((len(weights),), float(step), device=weights[0].device).unbind())
        torch.ops.aten._fused_adamw_(
            weights, gradients, firsts, seconds, [], steps,
            lr=group["lr"], beta1=group["betas"][0], beta2=group["betas"][1], eps=group["eps"],
            weight_decay=group["weight_decay"], amsgrad=False, maximize=False,
        )  # fmt: skip


def update_by_operations(piece: Entries, group: dict[str, Any]) -> None:
    """The same, operation by operation: for dtypes that differ, packed moments and random rounding.

    In one dtype it equals `torch.optim.AdamW(foreach=False)` bit for bit. If there is a generator, or if moments are
    packed, the arithmetic is in fp32, otherwise in the moments' dtype, rounded to nearest.
    """
    weight, gradient, first, second, step, generator = piece
    beta1, beta2 = group["betas"]
    packed = first.dtype == PACKED
    dtype = torch.float32 if packed or generator is not None else first.dtype
    g, w = (t if t.dtype == dtype else t.to(dtype) for t in (gradient, weight))
    if packed:
        m = unpack(first, weight.numel(), signed=True).view(weight.shape)
        v = unpack(second, weight.numel(), signed=False).view(weight.shape)
    else:
        m, v = (t if t.dtype == dtype else t.to(dtype) for t in (first, second))
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    denominator = (v.sqrt().div_((1 - beta2**step) ** 0.5)).add_(group["eps"])
    if group["weight_decay"] != 0:
        w.mul_(1 - group["lr"] * group["weight_decay"])
    w.addcdiv_(m, denominator, value=-group["lr"] / (1 - beta1**step))
    moments = [] if packed else [(first, m, False), (second, v, True)]
    for stored, computed, stochastic in (*moments, (weight, w, True)):
        if stored.dtype == dtype:
            continue  # computed in place
        if stochastic and generator is not None and stored.dtype == torch.bfloat16:
            round_stochastically(computed, stored, generator)
        else:
            stored.copy_(computed)
    if packed:
        del g, w, denominator  # packing has temporaries of its own
        pack(m.view(-1), first, signed=True)
        pack(v.view(-1), second, signed=False)


def pieces_of(parameter: nn.Parameter, dtype: torch.dtype) -> Iterator[tuple[int, int]]:
    """(start, end) of the pieces of `parameter`, counted in entries of the flattened parameter.

    Args:
        parameter: any parameter.
        dtype: in which its moments are stored; no record of packed ones is divided.
    """
    count, size = parameter.numel(), current().piece_elements(parameter.device)
    if dtype == PACKED:
        size = -(size // -BLOCK) * BLOCK
    for start in range(0, count, size):
        yield start, min(start + size, count)


def part_of_moment(dtype: torch.dtype, start: int, end: int) -> slice:
    """Where the piece of entries `start` to `end` lies in a flattened moment of that stored dtype."""
    return slice(moment_bytes(start, PACKED), moment_bytes(end, PACKED)) if dtype == PACKED else slice(start, end)


def flat(tensor: Tensor) -> Tensor:
    """One-dimensional view of a contiguous tensor; for any other tensor a copy, to be read only."""
    return tensor.detach().reshape(-1)


class AdamW(Optimizer):
    """AdamW over any parameters; one without a gradient is skipped: its state stays as it is and it does not decay.

    Args:
        params: parameters or groups.
        lr, betas, eps, weight_decay: as in AdamW.
        state_dtype: dtype of the moments; `grass.quantised.PACKED` keeps them in 8 bits.
        stochastic_rounding: round bf16 weights and bf16 second moments stochastically.
        seed: seed of stochastic rounding.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        state_dtype: torch.dtype = torch.float32,
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        self.state_dtype = state_dtype
        self.rounding = Rounding(seed) if stochastic_rounding else None
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        number = 0
        for group in self.param_groups:
            update_pieces(self._pieces(group["params"], number), group)
            number += len(group["params"])
        return loss

    def _pieces(self, parameters: Sequence[nn.Parameter], number: int) -> Iterator[Entries]:
        """Pieces of all parameters that have a gradient, of which the first one is parameter `number`."""
        for place, parameter in enumerate(parameters, start=number):
            if parameter.grad is None:
                continue
            if not self.state[parameter]:
                self.state[parameter] = new_moments(parameter, self.state_dtype)
            moments = self.state[parameter]
            moments["step"] += 1
            step, first, second = moments["step"], moments["exp_avg"], moments["exp_avg_sq"]
            if not parameter.is_contiguous():
                # a non-contiguous parameter has no flat view to split, so it is one piece
                yield Entries(parameter, parameter.grad, first, second, step, self._bits(parameter, place, step, 0))
                continue
            weight, gradient, first, second = (flat(t) for t in (parameter, parameter.grad, first, second))
            whole = Entries(weight, gradient, first, second, step)
            if self.rounding is None and whole.fits_kernel:
                yield whole  # no temporaries
                continue
            for start, end in pieces_of(parameter, first.dtype):
                piece, moment = slice(start, end), part_of_moment(first.dtype, start, end)
                bits = self._bits(parameter, place, step, start)
                yield Entries(weight[piece], gradient[piece], first[moment], second[moment], step, bits)

    def _bits(self, parameter: nn.Parameter, number: int, step: int, start: int) -> torch.Generator | None:
        if self.rounding is None:
            return None
        return self.rounding.generator(parameter.device, parameter=number, step=step, start=start)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore exactly; the base class would cast the moments to the parameters' dtype."""
        super().load_state_dict(state_dict)
        parameters = [p for group in self.param_groups for p in group["params"]]
        numbers = [n for group in state_dict["param_groups"] for n in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            saved = state_dict["state"].get(number)
            if saved is not None:
                self.state[parameter] = {
                    key: value.to(parameter.device, copy=True) if isinstance(value, Tensor) else value
                    for key, value in saved.items()
                }
