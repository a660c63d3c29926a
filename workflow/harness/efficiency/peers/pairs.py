"""What is compared with what: a method here, and the same method in other people's code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from harness.efficiency.peers import loops, packages
from harness.efficiency.peers.contenders import Bench, Contender, Ours

ADAMW_FORMS: dict[str, dict[str, Any]] = {
    "torch AdamW, for-loop": {"foreach": False},
    "torch AdamW, foreach": {"foreach": True},
    "torch AdamW, fused": {"fused": True},
}


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Other people's code for the same."""

    name: str
    make: Callable[[Bench], Contender]
    package: str | None = None
    """Distribution that must be installed; None: torch or a loop of ours."""
    note: str = ""
    """What it lacks, or does otherwise."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One method here, and its peers."""

    ours: str
    module: str
    options: dict[str, Any] = field(default_factory=dict)
    clip: float | None = 1.0
    state_dtype: Literal["fp32", "bf16", "int8"] = "fp32"
    peers: tuple[Peer, ...]

    def make(self, bench: Bench) -> Contender:
        """Our side."""
        return Ours(bench, self.module, self.options, clip=self.clip, state_dtype=self.state_dtype)


NO_DROP = "never drops a moment: state and memory grow until all layers were drawn"
NOT_RESUMED = "resuming forgets the drawn layers"


def _full(form: str, note: str = "") -> Peer:
    return Peer(name=form, make=partial(loops.adamw, clip=1.0, **ADAMW_FORMS[form]), note=note)


def _lisa(note: str = f"{NO_DROP}; {NOT_RESUMED}") -> Peer:
    return Peer(name="LISA loop of LMFlow", make=partial(loops.lisa, clip=1.0, fused=True), note=note)


GAMMA = {"active_layers": 2}
DECODER_ONLY = {"train_embedding": False, "train_head": False, "train_final_norm": False}
PAIRS: tuple[Pair, ...] = (
    Pair(ours="full", module="full", peers=tuple(_full(form) for form in ADAMW_FORMS)),
    Pair(ours="lisa, moments kept", module="lisa", options={**GAMMA, "state": "keep"}, peers=(_lisa(),)),
    Pair(
        ours="lisa, moments reset",
        module="lisa",
        options={**GAMMA, "state": "reset"},
        peers=(_lisa(f"never resets: another optimizer than ours here; {NO_DROP}; {NOT_RESUMED}"),),
    ),
    Pair(
        ours="grass, embedding and head on",
        module="grass",
        options={**GAMMA, "probe_steps": 2, "offload": "resident"},
        peers=(_lisa(f"measures no importance and draws uniformly (here the layers drawn are the same); {NO_DROP}"),),
    ),
    Pair(
        ours="grass, decoder layers only",
        module="grass",
        options={**GAMMA, **DECODER_ONLY, "probe_steps": 2, "offload": "resident"},
        peers=(_full("torch AdamW, fused", "trains everything: what GRASS saves, not the same method"),),
    ),
    Pair(
        ours="lora",
        module="lora",
        options=loops.LORA,
        peers=tuple(
            Peer(
                name=form.replace("torch", "peft under torch"),
                make=partial(loops.peft_lora, clip=1.0, **ADAMW_FORMS[form]),
                package="peft",
                note="other initial factors: losses differ",
            )
            for form in ("torch AdamW, for-loop", "torch AdamW, fused")
        ),
    ),
    Pair(
        ours="badam",
        module="badam",
        options={"order": "ascending"},
        clip=None,
        peers=(
            Peer(
                name="badam",
                make=partial(packages.badam, clip=None),
                package="badam",
                note="its first block trains one step less, so later losses are of other blocks; keeps an fp32 copy of "
                "the block beside fp32 weights too",
            ),
        ),
    ),
    Pair(
        ours="galore",
        module="galore",
        options={**packages.LOW_RANK, "scale": 0.25},
        peers=(
            Peer(
                name="galore-torch",
                make=partial(packages.galore, clip=1.0),
                package="galore-torch",
                note="eps stands elsewhere: losses differ",
            ),
        ),
    ),
    Pair(
        ours="apollo",
        module="apollo",
        options=packages.LOW_RANK,
        peers=(
            Peer(
                name="apollo-torch",
                make=partial(packages.apollo, clip=1.0),
                package="apollo-torch",
                note="other random projections: losses differ",
            ),
        ),
    ),
    Pair(
        ours="adalomo",
        module="adalomo",
        clip=None,
        peers=(
            Peer(
                name="lomo-optim",
                make=partial(packages.adalomo, clip=None),
                package="lomo-optim",
                note="puts its state on a GPU wherever the model is; here it is told not to",
            ),
        ),
    ),
    Pair(
        ours="full, 8-bit moments",
        module="full",
        state_dtype="int8",
        peers=(
            Peer(
                name="bitsandbytes AdamW8bit",
                make=partial(packages.bitsandbytes_8bit, clip=1.0),
                package="bitsandbytes",
                note="a second moment may round to 0 while the first does not; cannot be moved to the host in pieces",
            ),
            Peer(
                name="torchao AdamW8bit",
                make=partial(packages.torchao_8bit, clip=1.0),
                package="torchao",
                note="a second moment may round to 0 while the first does not; compiles its step, for which it needs a "
                "compiler",
            ),
        ),
    ),
)
