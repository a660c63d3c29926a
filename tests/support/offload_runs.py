"""Training runs that the tests of the state offload compare to the last bit, and what must hold in each of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from fake_streams import RecordingStreams, install
from grass_tiny import batch, grass_of, llama
from torch import Tensor, nn

import grass.offload.offload
from grass import Grass
from grass.adamw import AdamW
from grass.host import Host
from grass.layers import set_trainable

SEEDS = (0,)
"""Of the orders in which copies are done, and of how much is fetched during backward; more of them look at more."""
STEPS = 10
"""Layers change after the third, the sixth and the ninth."""
MAX_NORM = 0.5


@dataclass(frozen=True)
class Setting:
    """What the outcome of a run may depend on; how states are offloaded is not part of it."""

    state_dtype: str = "fp32"
    state: str = "keep"
    sampler: str = "uniform"
    accumulation: str = "1"
    """Backward passes a step: `1`, `2` as the option says, or `told`: 2, the last one announced."""

    def __str__(self) -> str:
        return "-".join([self.state_dtype, self.state, self.sampler, self.accumulation])

    @property
    def passes(self) -> int:
        return 1 if self.accumulation == "1" else 2

    @property
    def embedding(self) -> bool:
        """Backward goes on below the lowest active layer where the embedding trains: both must be tried."""
        return self.sampler == "uniform"

    def build(self, model: nn.Module, **options: Any) -> Grass:
        chosen: dict[str, Any] = {
            "state_dtype": self.state_dtype,
            "state": self.state,
            "sampler": self.sampler,
            "accumulation_steps": 2 if self.accumulation == "2" else 1,
            "train_embedding": self.embedding,
            "weight_decay": 0.1,
            "max_grad_norm": MAX_NORM,
            "temperature": 0.2,
            **options,
        }
        return grass_of(model, **chosen)

    def backward(self, model: Any, opt: Any, step: int, after_forward: Callable[[], None] = lambda: None) -> None:
        for number in range(self.passes):
            if self.accumulation == "told" and number == self.passes - 1:
                opt.last_micro_batch()
            loss = model(**batch(100 * step + number)).loss / self.passes
            after_forward()
            loss.backward()


SETTINGS = [
    Setting(*chosen)
    for chosen in itertools.product(("fp32", "bf16"), ("keep", "reset"), ("uniform", "importance"), ("1", "2", "told"))
]

Outcome = dict[str, Any]
"""Weights by name, and every moment and step count of the optimizer's state dict."""


def outcome(model: nn.Module, opt: Any) -> Outcome:
    """A copy of everything that training changed: weights, moments and step counts."""
    opt.state_dict()  # which waits until the moments are at home
    found = {name: p.detach().clone() for name, p in model.named_parameters()}
    names = {p: name for name, p in model.named_parameters()}
    for p, moments in opt.state.items():
        for key, value in moments.items():
            found[f"{names[p]}.{key}"] = int(value) if key == "step" else value.clone()
    return found


def difference(one: Outcome, other: Outcome) -> str | None:
    """The first entry that differs; None where the outcomes are equal to the last bit."""
    if one.keys() != other.keys():
        return f"only one has {min(one.keys() ^ other.keys())}"
    for name, value in one.items():
        if not (torch.equal(value, other[name]) if isinstance(value, Tensor) else value == other[name]):
            return f"{name} differs"
    return None


def train(setting: Setting, model: Any, opt: Any, first: int = 0, last: int = STEPS) -> None:
    for step in range(first, last):
        setting.backward(model, opt, step)
        opt.step()
        opt.zero_grad()


def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five or more chunks a layer of the tiny Llama, each of several pieces, and a ring that they do not fit in."""
    monkeypatch.setattr("grass.offload.blocks.CHUNK_BYTES", 4096)
    monkeypatch.setattr("grass.host.PIECE_ELEMENTS", {"cpu": 240, "other": 240})
    monkeypatch.setattr("grass.offload.offload.RING", 3)


def on_cpu(setting: Setting, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[Any, Grass]:
    """A model and its optimizer where nothing moves."""
    small_chunks(monkeypatch)
    monkeypatch.setattr("grass.host._in_force", [Host()])
    model = llama()
    return model, setting.build(model, offload="resident", **options)


@cache
def expected(setting: Setting, steps: int = STEPS) -> tuple[Outcome, list[tuple[int, ...]]]:
    """Outcome on a CPU, where nothing moves, and the layers active in each step and in the next; read only."""
    with pytest.MonkeyPatch.context() as patched:
        model, opt = on_cpu(setting, patched)
        train(setting, model, opt, last=steps)
        return outcome(model, opt), [*(record.active for record in opt.history), opt.active]


def on_device(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, *streams: RecordingStreams, **options: Any
) -> tuple[Any, Grass]:
    """A model and its optimizer, on a device that does not exist."""
    small_chunks(monkeypatch)
    install(monkeypatch, *streams)
    model = llama()
    return model, setting.build(model, **options)


def saved(opt: Grass, streams: RecordingStreams) -> dict[str, Any]:
    """The state dict; reading it must not race with anything."""
    state = opt.state_dict()
    for moments in state["state"].values():
        for key in ("exp_avg", "exp_avg_sq"):
            streams.host("reads", moments[key], writes=False)
    return state


# -------------------------------------------------------------------------------- what must hold


def homes_on_device(opt: Grass, streams: RecordingStreams) -> set[int]:
    """Addresses of the device buffers that are some group's home."""
    homes = [block.home for block in opt.states.blocks if block.home is not None]
    return {home.data_ptr() for home in homes} & streams.live.keys()


def problem_after_forward(opt: Grass, streams: RecordingStreams) -> str | None:
    """As activations peak, the device holds the homes of awake groups, which are none in `move`, and nothing else."""
    offload = opt.states.offload
    if offload is None or streams.live.keys() == homes_on_device(opt, streams):
        return None
    return f"{len(streams.live)} buffers on the device as activations peak, {len(homes_on_device(opt, streams))} needed"


def problem_after_step(opt: Grass, streams: RecordingStreams, fetched: int) -> str | None:
    """What must hold after a step in which backward fetched `fetched` chunks."""
    if streams.checker.races:
        return streams.checker.races[0]
    offload = opt.states.offload
    assert offload is not None
    if offload.mode == "move" and streams.most_live > grass.offload.offload.RING + fetched:
        ring = grass.offload.offload.RING
        return f"{streams.most_live} buffers in one step, with a ring of {ring} and {fetched} fetched"
    asleep = [block for block in opt.states.blocks if block not in opt.states.awake(opt.active)]
    for block in asleep:
        if block.home is not None and block.home.data_ptr() in streams.live:
            return f"group {block.index} sleeps with its moments on the device"
    hosts = sum(block.host.nbytes for block in opt.states.blocks if block.host is not None)
    if offload.arena.nbytes != hosts:
        return f"{offload.arena.nbytes} bytes of host memory, {hosts} in use"
    return None


def first_problem(
    setting: Setting, model: Any, opt: Grass, streams: RecordingStreams, first: int = 0, last: int = STEPS
) -> str | None:
    """Train, looking after every pass and every step, and let go of everything at the end."""
    found: list[str | None] = []

    def look() -> None:
        found.append(problem_after_forward(opt, streams))
        streams.most_live = len(streams.live)

    for step in range(first, last):
        copies = len(streams.copies)
        setting.backward(model, opt, step, look)
        fetched = len(streams.copies) - copies
        opt.step()
        opt.zero_grad()
        found.append(problem_after_step(opt, streams, fetched))
        if any(found):
            return next(f"step {step}: {problem}" for problem in found if problem)
    return None


def problem_at_end(opt: Grass, streams: RecordingStreams) -> str | None:
    """Nothing may be left behind where moments are let go."""
    saved(opt, streams)
    offload = opt.states.offload
    assert offload is not None
    opt.states.release()
    if streams.checker.races:
        return streams.checker.races[0]
    if streams.live or offload.arena.nbytes:
        return f"{len(streams.live)} buffers and {offload.arena.nbytes} bytes of host memory are left behind"
    return None


# -------------------------------------------------------------------------------- references


def reference(setting: Setting, active: list[tuple[int, ...]], adamw: Callable[[list[nn.Parameter]], Any]) -> Outcome:
    """The same training by an AdamW that knows nothing of layers: those asleep have no gradient."""
    model: Any = llama()
    model.get_input_embeddings().requires_grad_(setting.embedding)
    layers = [list(layer.parameters()) for layer in model.model.layers]
    opt = adamw(list(model.parameters()))
    for step, (now, then) in enumerate(itertools.pairwise(active)):
        for number, parameters in enumerate(layers):
            set_trainable(parameters, number in now)
        setting.backward(model, opt, step)
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], MAX_NORM)
        opt.step()
        opt.zero_grad()
        if setting.state == "reset":
            for p in [p for number in set(now) - set(then) for p in layers[number]]:
                del opt.state[p]
    return outcome(model, opt)


def our_adamw(setting: Setting) -> Callable[[list[nn.Parameter]], AdamW]:
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[setting.state_dtype]
    return lambda parameters: AdamW(parameters, lr=1e-2, weight_decay=0.1, state_dtype=dtype)


def torchs_adamw(parameters: list[nn.Parameter]) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1, fused=True)
