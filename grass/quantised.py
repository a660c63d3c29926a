"""Moments in 8 bits: blockwise dynamic quantisation (Dettmers et al. 2022, arXiv 2110.02861).

256 entries share one fp32 scale, their largest magnitude; each entry is a code of 8 bits for the nearest value of a
fixed map, from -1 to 1 (first moment) or 0 to 1 (second moment). An update computes in fp32. Tensors of fewer than
4,096 entries keep fp32 moments, as in bitsandbytes and torchao.

**The second moment does not round to 0 (ours).** Its map's smallest value above 0 is 3.25e-7, so the published method
keeps 0 of what is below half of that, in units of its block's largest: of every entry whose gradients are 4e-4 of the
block's largest. The first moment, linear in the gradient, keeps those. If such an entry's next gradient is small or 0,
its denominator is epsilon, and the weight jumps by exp_avg / epsilon learning rates; torchao's floor of 1e-12 under the
scale loses whole blocks with gradients below 1e-9 in the same way. Here the smallest code is the smallest value above
0: the denominator of such an entry is larger than in fp32, never smaller.

Written anew, since neither library serves here. bitsandbytes 0.50 quantises on CUDA's default stream whatever stream is
the current one, and on a CPU by a coarse search that misses the nearest code of a third of the entries of a first
moment and of most of a second. torchao 0.18 finds it, but without its compiler takes 8-byte temporaries and 40 times as
long. The map is theirs, the codes are torchao's but for the smallest one (`tests/unit/grass/test_quantised.py`).

A packed moment is a one-dimensional uint8 tensor of records: 256 codes, then their scale. Any part of it made of whole
records can be copied, updated and saved by itself, on any device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.functional import pad

PACKED = torch.uint8
"""The dtype that stands for packed moments."""
BLOCK = 256
"""Entries that share a scale."""
RECORD_BYTES = BLOCK + torch.float32.itemsize
SMALLEST = 4096
"""Tensors with fewer entries keep fp32 moments."""

_EXPONENT_BITS = 7
_CELLS = 1 << 16


def stored_dtype(entries: int, asked: torch.dtype) -> torch.dtype:
    """Dtype in which a tensor of `entries` entries keeps its moments where `asked` is the optimizer's."""
    return torch.float32 if asked == PACKED and entries < SMALLEST else asked


def moment_bytes(entries: int, dtype: torch.dtype) -> int:
    """Bytes of one moment of `entries` entries in the stored dtype; of packed ones the last record is filled up."""
    return -(entries // -BLOCK) * RECORD_BYTES if dtype == PACKED else entries * dtype.itemsize


def unpack(packed: Tensor, entries: int, *, signed: bool) -> Tensor:
    """The first `entries` entries of a packed moment: fp32, one-dimensional.

    Args:
        packed: whole records, shape (records * RECORD_BYTES,).
        entries: above (records - 1) * BLOCK.
        signed: True for a first moment.
    """
    codes, scales = _records(packed)
    values = _map(packed, signed=signed).values.index_select(0, codes.reshape(-1).int())
    return values.view(-1, BLOCK).mul_(scales).view(-1)[:entries]


def pack(values: Tensor, packed: Tensor, *, signed: bool) -> None:
    """Quantise `values` into `packed`, each to the nearest value of its map, halves upwards.

    A block with inf or nan is not finite when it is unpacked. Needs 13 bytes of temporary memory per entry.

    Args:
        values: fp32, one-dimensional; their memory is used and left without meaning.
        packed: records for as many entries; overwritten. What fills up the last record is of value 0.
        signed: True for a first moment.
    """
    codes, scales = _records(packed)
    blocks = pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK) if len(values) % BLOCK else values.view(-1, BLOCK)
    largest = torch.linalg.vector_norm(blocks, float("inf"), dim=1, keepdim=True)
    scales.copy_(largest)
    # a block of zeros stays one: its codes are multiplied by 0
    scaled = blocks.div_(largest.clamp_(min=torch.finfo(torch.float32).tiny)).view(-1)
    known = _map(packed, signed=signed)
    cell = (scaled.view(torch.int32) >> 16).bitwise_and_(_CELLS - 1)
    below = known.lowest.index_select(0, cell)
    del cell
    below += scaled >= known.above.index_select(0, below.int())
    codes.copy_(below.view(-1, BLOCK))


def _records(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Views of the codes, shape (records, BLOCK), and of the scales, shape (records, 1)."""
    records = packed.view(-1, RECORD_BYTES)
    return records[:, :BLOCK], records[:, BLOCK:].view(torch.float32)


@dataclass(frozen=True)
class _Map:
    """A map of codes, made for a search without branches: in an fp32 number's cell lies one border of codes at most."""

    values: Tensor
    """Value of each code, ascending; shape (256,)."""
    above: Tensor
    """Border between each code and the next one, in the middle of their values; inf after the last; shape (256,)."""
    lowest: Tensor
    """By the upper half of an fp32 number's bits, which names a cell of numbers: the code of the cell's smallest."""

    def changed(self, change: Callable[[Tensor], Tensor]) -> _Map:
        return _Map(change(self.values), change(self.above), change(self.lowest))


def _map(beside: Tensor, *, signed: bool) -> _Map:
    known = _map_on(beside.device, signed)
    # in a forecast the map is there already, as it is in training
    return known.changed(beside.fake_mode.from_tensor) if isinstance(beside, FakeTensor) else known


def dynamic_map(*, signed: bool) -> list[float]:
    """The 256 values of the dynamic data type, ascending (Dettmers 2016, arXiv 1511.04561; bitsandbytes' extent).

    A leading run of zero bits is the decimal exponent, from 0 down to -6; the bits left divide the decade evenly, so
    that large values are told apart best. 0 and 1 are values as well.
    """
    found = [0.0, 1.0]
    for exponent in range(_EXPONENT_BITS):
        count = 2 ** (exponent if signed else exponent + 1)
        border = torch.linspace(0.1, 1, count + 1)
        decade = (10.0 ** (exponent + 1 - _EXPONENT_BITS) * (border[:-1] + border[1:]) / 2).tolist()
        found += [*decade, *(-value for value in decade)] if signed else decade
    return sorted(found)


def _made(*, signed: bool) -> _Map:
    with torch.device("cpu"):
        values = torch.tensor(dynamic_map(signed=signed))
        borders = (values[1:] + values[:-1]) / 2
        if not signed:
            borders[0] = -float("inf")
        bits = torch.arange(_CELLS, dtype=torch.int32) << 16
        smallest = torch.minimum(bits.view(torch.float32), (bits | 0xFFFF).view(torch.float32))
        lowest = torch.bucketize(smallest, borders, right=True).to(torch.uint8)
        return _Map(values, torch.cat([borders, borders.new_tensor([float("inf")])]), lowest)


_ON_CPU = {signed: _made(signed=signed) for signed in (True, False)}
"""Made on import, so that who counts the memory of a training run does not find them in it."""


@cache
def _map_on(device: torch.device, signed: bool) -> _Map:
    return _ON_CPU[signed] if device.type == "cpu" else _ON_CPU[signed].changed(lambda table: table.to(device))
