"""What moving optimizer states costs on a device: `move` and a serial version of it beside `resident`.

A Llama of random bf16 weights, random tokens, activation checkpointing, chunked cross-entropy; decoder layers alone
train, drawn uniformly. All variants of a setting draw the same layers in the same steps, so that step by step they do
the same work. Cells run in a fixed order, one optimizer at a time on the same model, until the time is used up.
"""

from __future__ import annotations

import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import cycle, pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from grass.bench.meters import meter_for
from grass.bench.stand_ins import SetsByTurns, serial_copies
from grass.host import current, using
from grass.loss import chunked_cross_entropy
from grass.optimizer import Grass

Geometry = Literal["llama2-7b", "tiny"]

GEOMETRIES: dict[str, dict[str, int]] = {
    "llama2-7b": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "vocab_size": 32000,
    },
    "tiny": {
        "hidden_size": 64,
        "num_hidden_layers": 6,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "vocab_size": 256,
    },
}
"""`llama2-7b`: Touvron et al. 2023, arXiv 2307.09288, as in its published config.json. `tiny`: for rehearsal."""

VARIANTS = ("resident", "move", "serial")
"""`serial` is `move` whose copies all stand in the way of the computation."""
SETTINGS = ((2, "bf16"), (4, "bf16"), (2, "fp32"), (4, "fp32"))
"""(active layers, dtype of the moments), most important first."""
LEAST_SPEED = 0.98
"""Target: `move` reaches at least this share of the tokens a second of `resident`, 2 active layers, bf16 moments."""
MOST_ALLOCATED_GIB = 14.7
"""Target: allocated peak of that very run with the 7B geometry, worst draw, in GiB."""
PEAK_STEPS = 4
"""Steps of each draw whose peak is measured: the first watches the memory, the later ones fetch during backward."""


@dataclass(frozen=True, kw_only=True)
class DeviceSettings:
    """Sizes of the device part."""

    device: str
    geometry: Geometry = "llama2-7b"
    batch: int = 4
    length: int = 1024
    warmup: int = 20
    """Steps before the timed ones, in every cell."""
    timed: int = 50
    """Timed steps of a cell: a multiple of `period`, so that every cell pays for the same number of draws."""
    period: int = 50
    """Steps between draws, the default of `Grass`."""
    rounds: int = 2
    """Timed cells of every variant, each on draws of its own."""
    budget_s: float = 480.0
    """No cell is begun that would end later than this after the start of the device part."""


@dataclass(frozen=True)
class Cell:
    """One measurement: one optimizer, built anew."""

    active_layers: int
    state_dtype: str
    variant: str
    round: int | None
    """Number of the timed round; None: the peak of memory under the worst draws."""

    def __str__(self) -> str:
        what = "peak" if self.round is None else f"speed, round {self.round + 1}"
        return f"{self.active_layers} layers, {self.state_dtype} moments, {self.variant}, {what}"


def cells(rounds: int) -> Iterator[Cell]:
    """All cells, most important first; variants by turns, every other round in the reverse order."""
    for active, dtype in SETTINGS:
        for variant in VARIANTS:
            yield Cell(active, dtype, variant, None)
        for number in range(rounds):
            for variant in reversed(VARIANTS) if number % 2 else VARIANTS:
                yield Cell(active, dtype, variant, number)


def build_model(geometry: Geometry, length: int, device: torch.device) -> Any:
    """A Llama with random bf16 weights, made on the device, that checkpoints the activations of every layer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**GEOMETRIES[geometry], max_position_embeddings=length, attn_implementation="sdpa")
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(usual)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def worst_draws(layers: int, active: int) -> list[tuple[int, ...]]:
    """Draws with layer 0, so that backward visits every layer: with its neighbours, and with the top layers.

    Which of the two peaks higher depends on what is larger: the gradients of a trained layer that are alive while the
    layers below are recomputed, or the checkpoints that have gone by then.
    """
    return [tuple(range(active)), (0, *range(layers - active + 1, layers))]


class DeviceBench:
    """The model, and what measures one cell on it."""

    def __init__(self, settings: DeviceSettings) -> None:
        self.settings = settings
        device = torch.device(settings.device)
        self.meter = meter_for(device)
        torch.manual_seed(0)
        self.model = build_model(settings.geometry, settings.length, device)
        words = GEOMETRIES[settings.geometry]["vocab_size"]
        self._tokens = [torch.randint(words, (settings.batch, settings.length), device=device) for _ in range(4)]

    def steps(self, cell: Cell) -> int:
        """Steps that `cell` takes, warm-up included."""
        settings = self.settings
        draws = worst_draws(self.model.config.num_hidden_layers, cell.active_layers)
        return len(draws) * PEAK_STEPS if cell.round is None else settings.warmup + settings.timed

    def measure(self, cell: Cell) -> dict[str, Any]:
        """One row: the figures of `cell`, or why there are none."""
        row: dict[str, Any] = {**asdict(cell), "reason": None}
        self.meter.tidy()
        self.meter.reset_peaks()
        started, opt = time.perf_counter(), None
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                opt = self._optimizer(cell)
                row["before"] = self.meter.memory()
                with serial_copies() if cell.variant == "serial" else nullcontext():
                    row.update(self._peaks(opt, cell) if cell.round is None else self._speed(opt))
                row["mode"] = opt.states.mode
            except torch.OutOfMemoryError as error:
                # frames hold tensors, and this cell's must be gone before the next one begins
                traceback.clear_frames(error.__traceback__)
                row["reason"] = f"out of memory: {str(error).splitlines()[0]}"
        if opt is not None:
            opt.states.release()
            self.model.zero_grad()
        row["warnings"] = sorted({str(warning.message) for warning in warned})
        row["cell_s"] = time.perf_counter() - started
        return row

    def _optimizer(self, cell: Cell) -> Grass:
        return Grass(
            self.model,
            lr=1e-5,
            active_layers=cell.active_layers,
            sample_every=PEAK_STEPS if cell.round is None else self.settings.period,
            sampler="uniform",
            offload="resident" if cell.variant == "resident" else "move",
            state_dtype="bf16" if cell.state_dtype == "bf16" else "fp32",
            train_embedding=False,
            train_head=False,
            train_final_norm=False,
            seed=cell.round or 0,
        )

    def _step(self, opt: Grass, tokens: Tensor) -> None:
        hidden = self.model.model(input_ids=tokens, use_cache=False).last_hidden_state
        # the last position has no next token
        targets = tokens[:, 1:].flatten()
        loss = chunked_cross_entropy(hidden[:, :-1].flatten(0, 1), self.model.lm_head.weight, targets)
        (loss / len(targets)).backward()
        opt.step()
        opt.zero_grad()

    def _peaks(self, opt: Grass, cell: Cell) -> dict[str, Any]:
        draws = worst_draws(len(opt.layer_parameters), cell.active_layers)
        peaks = []
        with using(SetsByTurns(current(), cycle(draws))):
            opt._resample()
            for draw in draws:
                self.meter.reset_peaks()
                assert opt.active == draw
                for number in range(PEAK_STEPS):
                    self._step(opt, self._tokens[number % len(self._tokens)])
                self.meter.wait()
                peaks.append({"active": draw, **self.meter.memory()})
        return {"draws": peaks, **_largest(peaks)}

    def _speed(self, opt: Grass) -> dict[str, Any]:
        settings, marks = self.settings, []
        for number in range(settings.warmup + settings.timed):
            if number >= settings.warmup:
                marks.append(self.meter.mark())
            self._step(opt, self._tokens[number % len(self._tokens)])
        marks.append(self.meter.mark())
        self.meter.wait()
        steps = [self.meter.seconds(start, end) for start, end in pairwise(marks)]
        window = self.meter.seconds(marks[0], marks[-1])
        records = opt.history[settings.warmup :]
        exposed = [record.exposed_copy_s for record in records if record.exposed_copy_s is not None]
        return {
            "timed_steps": settings.timed,
            "window_s": window,
            "tokens_per_s": settings.timed * settings.batch * settings.length / window,
            "step_s": steps,
            "exposed_copy_s": sum(exposed) if exposed else None,
            "moved_bytes": sum(record.moved_bytes for record in records),
            "active": [record.active for record in records],
            "mean_lowest_layer": sum(min(record.active) for record in records) / len(records),
            **self.meter.memory(),
        }


def _largest(peaks: Sequence[dict[str, Any]]) -> dict[str, int | None]:
    largest: dict[str, int | None] = {}
    for key in ("allocated_peak_bytes", "reserved_peak_bytes", "allocation_retries"):
        counted = [row[key] for row in peaks if row[key] is not None]
        largest[key] = max(counted) if counted else None
    return largest
