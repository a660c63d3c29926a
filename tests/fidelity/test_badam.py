"""BAdam against its definition and beside the authors' package `badam` (Ledzy/BAdam, block_optim.py)."""

from __future__ import annotations

import gc
import io
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any, Literal

import pytest
import torch
from further import a_few
from grass_tiny import batch, llama, same, weights
from hand_driven import LR, Driven, assert_caught, watch_backward

from baselines.badam import Badam
from baselines.method import ModelFacts

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def blocks_in_turn(driven: Driven, steps: int) -> list[int]:
    """The block that trains at each step; nothing is computed."""
    turns = []
    for step in range(steps):
        driven.method.begin_step(step)
        turns.append(driven.method.block)
    return turns


def decay(step: int) -> float:
    return 1 - step / 60


# ---------------------------------------------------------------- beside the package


def package_by_hand(order: str, dtype: torch.dtype, steps: int, *, extras: bool = False) -> tuple[Any, list[float]]:
    """Model and losses after a plain loop with `badam.BlockOptimizer` over torch's AdamW, K = 5."""
    badam = pytest.importorskip("badam")
    gc.freeze()  # the package collects garbage at every switch
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = llama(dtype=dtype).train()
        base = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01, fused=True)
        options = {"include_embedding": extras, "include_lm_head": extras}
        with redirect_stdout(io.StringIO()):
            optimizer = badam.BlockOptimizer(
                base, list(model.named_parameters()), switch_block_every=5, switch_mode=order, **options
            )
            losses = []
            for step in range(steps):
                optimizer.param_groups[0]["lr"] = LR * decay(step)
                loss = model(**batch(step)).loss
                loss.backward()
                optimizer.step()
                model.zero_grad()
                losses.append(float(loss.detach()))
    return model, losses


def differs_from_the_package(
    method_class: type[Badam], order: str, dtype: Literal["fp32", "bf16"], *, extras: bool = False
) -> str | None:
    """The first step or weight in which 50 steps differ, K = 5, the learning rate falling."""
    options = {"sample_every": 5, "order": order, "include_embedding": extras, "include_head": extras}
    driven = Driven(method_class, options, model=llama(dtype=DTYPES[dtype]), weight_dtype=dtype, weight_decay=0.01)
    # the package gives its first block K - 1 steps: let the method believe that its second step has been
    driven.method.begin_step(0)
    driven.method.begin_step = lambda step, begin=driven.method.begin_step: begin(step + 1)
    driven.run(0, 50, factor=decay)
    model, losses = package_by_hand(order, DTYPES[dtype], 50, extras=extras)
    for step, (ours, theirs) in enumerate(zip(driven.losses, losses, strict=True)):
        if ours != theirs:
            return f"step {step}: loss {ours} and the package's {theirs}"
    wrong = [n for n, w in weights(model).items() if not torch.equal(w, weights(driven.model)[n])]
    return f"{wrong[0]} differs" if wrong else None


@pytest.mark.parametrize("dtype", a_few(["bf16", "fp32"], one_in=2))
@pytest.mark.parametrize(("order", "extras"), [("ascending", False), ("descending", False), ("ascending", True)])
def test_fifty_steps_are_the_packages_to_the_last_bit_but_for_its_short_first_turn(
    order: str, extras: bool, dtype: Literal["fp32", "bf16"]
) -> None:
    """block_optim.py, step: fp32 copy, cleared state, one rate from group 0; `empty_cache` does nothing on a CPU.

    `random` is left out: the package shuffles with torch's global generator. With embedding and head as blocks both
    put the final norm in the head's block.
    """
    assert differs_from_the_package(Badam, order, dtype, extras=extras) is None


def test_the_package_gives_its_first_block_one_step_less_and_we_do_not() -> None:
    """block_optim.py, step: `(global_step + 1) % switch_block_every` after global_step was counted up."""
    before = weights(llama())
    model, _ = package_by_hand("ascending", torch.float32, 5)
    moved = {n.split(".")[2] for n, w in weights(model).items() if not torch.equal(w, before[n])}
    assert moved == {"0", "1"}
    assert blocks_in_turn(Driven(Badam, {"sample_every": 5, "order": "ascending"}), 11) == [0] * 5 + [1] * 5 + [2]


class KeepsTheMoments(Badam):
    def _activate(self, block: int) -> None:
        kept = self.kept = {**vars(self).get("kept", {}), **self.optimizer.state}
        super()._activate(block)
        self.optimizer.state.update({p: kept[p] for p in self.blocks[block] if p in kept})


class UpdatesBf16WeightsThemselves(Badam):
    def _activate(self, block: int) -> None:
        super()._activate(block)
        self.masters, self.optimizer.param_groups[0]["params"] = [], self.blocks[block]


class NeverRoundsTheCopyIntoTheWeights(Badam):
    def end_step(self, replay: Any) -> Any:
        before = [p.detach().clone() for p in self.blocks[self.block]]
        facts = super().end_step(replay)
        with torch.no_grad():
            for p, w in zip(self.blocks[self.block], before, strict=True):
                p.copy_(w)
        return facts


@pytest.mark.parametrize(
    ("broken", "dtype"),
    [
        (KeepsTheMoments, "fp32"),
        (UpdatesBf16WeightsThemselves, "bf16"),
        (NeverRoundsTheCopyIntoTheWeights, "bf16"),
    ],
)
def test_defect_is_caught_by_the_package(
    broken: type[Badam], dtype: Literal["fp32", "bf16"], record_property: Callable[[str, object], None]
) -> None:
    assert_caught(broken, differs_from_the_package(broken, "ascending", dtype), record_property)


# ---------------------------------------------------------------- state


def test_all_state_is_gone_at_a_switch_and_a_block_that_returns_starts_from_zero_moments() -> None:
    """Algorithm 1 of arXiv 2404.02827: m, v and the count start anew, so the first step is lr * g / (|g| + eps)."""
    driven = Driven(Badam, {"sample_every": 2, "order": "ascending"})
    gradients: dict[int, list[torch.Tensor]] = {}
    for step in range(12):
        before = [p.detach().double() for p in driven.method.blocks[step // 2 % 4]]
        driven.run(
            step,
            step + 1,
            look=lambda s: gradients.update({s: [p.grad.double() for p in driven.method.blocks[driven.method.block]]}),
        )
        own = driven.method.blocks[driven.method.block]
        assert driven.method.block == step // 2 % 4
        assert set(driven.method.optimizer.state) == set(own)
        assert all(m["step"] == step % 2 + 1 for m in driven.method.optimizer.state.values())
        if step % 2 == 0:
            for old, p, g in zip(before, own, gradients[step], strict=True):
                assert torch.allclose(p.detach().double(), old - LR * g / (g.abs() + 1e-8), rtol=0, atol=1e-6)


def test_the_fp32_copy_keeps_updates_that_bf16_would_round_away() -> None:
    """block_optim.py, _update_param: 40 steps of 1e-4 from 1 end at 0.996, the next bf16 number below 1."""
    driven = Driven(Badam, {"order": "ascending"}, model=llama(dtype=torch.bfloat16), weight_dtype="bf16")
    norm = driven.model.model.layers[0].input_layernorm.weight
    driven.method.set_lr_factor(1e-4 / LR)
    for step in range(40):
        driven.method.begin_step(step)
        for parameter in driven.method.blocks[0]:
            parameter.grad = torch.ones_like(parameter)
        driven.method.end_step(lambda: iter(()))
        if step == 0:
            assert torch.equal(norm, torch.ones_like(norm))
    assert torch.equal(norm, torch.full_like(norm, 1 - 2**-8))


def test_a_run_taken_up_in_mid_block_has_the_low_bits_of_the_fp32_copy() -> None:
    options = {"sample_every": 4}
    straight = Driven(Badam, options, model=llama(dtype=torch.bfloat16), weight_dtype="bf16")
    straight.run(0, 6)
    state, half = straight.method.state_dict(), straight.model.state_dict()
    resumed = Driven(Badam, options, model=llama(dtype=torch.bfloat16), weight_dtype="bf16")
    resumed.model.load_state_dict(half)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    resumed.method.load_state_dict(torch.load(buffer, weights_only=True))
    straight.run(6, 20)
    resumed.run(6, 20)
    assert same(weights(straight.model), weights(resumed.model))


# ---------------------------------------------------------------- order and blocks


def sweeps_differ(method_class: type[Badam]) -> str | None:
    """100 sweeps of 4 blocks, K = 2: every block has one turn of two steps in each, in orders that vary."""
    turns = blocks_in_turn(Driven(method_class, {"sample_every": 2}), 800)
    if turns[::2] != turns[1::2]:
        return "a turn has not two steps"
    sweeps = [tuple(turns[i : i + 8 : 2]) for i in range(0, 800, 8)]
    wrong = [sweep for sweep in sweeps if sorted(sweep) != [0, 1, 2, 3]]
    if wrong:
        return f"the sweep {wrong[0]} leaves out a block"
    # 24 orders: 100 sweeps miss more than 8 of them about once in a million
    return None if len(set(sweeps)) > 15 else f"only {len(set(sweeps))} orders in 100 sweeps"


def test_random_order_is_a_new_shuffle_of_all_blocks_for_each_sweep() -> None:
    """block_optim.py, _update_active_block_idx: a new permutation when the last one is used up."""
    assert sweeps_differ(Badam) is None


class DrawsWithReplacement(Badam):
    def _next_block(self) -> int:
        self.waiting = []
        return super()._next_block()


class ShufflesOnce(Badam):
    def _next_block(self) -> int:
        if not self.waiting:
            self.generator.manual_seed(self.seed)
        return super()._next_block()


@pytest.mark.parametrize("broken", [DrawsWithReplacement, ShufflesOnce])
def test_defect_is_caught_by_the_sweeps(broken: type[Badam], record_property: Callable[[str, object], None]) -> None:
    assert_caught(broken, sweeps_differ(broken), record_property)


def test_ascending_and_descending_go_round() -> None:
    """LIFT, our reading, is `ascending`: front to back, one block at a time."""
    assert blocks_in_turn(Driven(Badam, {"sample_every": 1, "order": "ascending"}), 6) == [0, 1, 2, 3, 0, 1]
    assert blocks_in_turn(Driven(Badam, {"sample_every": 1, "order": "descending"}), 6) == [3, 2, 1, 0, 3, 2]


def test_embedding_final_norm_and_head_train_only_where_they_are_asked_for() -> None:
    """block_optim.py: include_embedding and include_lm_head are False; the head's block holds the final norm too."""
    before = weights(llama())

    def moved(**options: bool) -> set[str]:
        driven = Driven(Badam, {"sample_every": 1, "order": "ascending", **options})
        driven.run(0, 6)
        return {n for n, w in weights(driven.model).items() if not torch.equal(w, before[n]) and ".layers." not in n}

    assert moved() == set()
    assert moved(include_embedding=True) == {"model.embed_tokens.weight"}
    assert moved(include_head=True) == {"model.norm.weight", "lm_head.weight"}


def test_a_tied_head_is_refused_as_a_block() -> None:
    """block_optim.py lists a tied tensor once, as the embedding: only the norm would remain in the head's block."""
    facts = ModelFacts(
        architecture="tied", layer_parameters=(8, 8), embedding_parameters=8, head_parameters=0,
        final_norm_parameters=2, hidden_size=2, tied_embeddings=True,
    )  # fmt: skip
    driven = Driven(Badam, {"include_head": True, "include_embedding": True})
    assert driven.method.skip(facts) == (
        "include_head: this model's head is tied to its embedding; include_embedding trains both"
    )
    assert Driven(Badam, {"include_embedding": True}).method.skip(facts) is None


def test_backward_stops_at_the_active_block_under_checkpointing_too() -> None:
    """badam/utils.py, gradient_checkpointing_enable_for_bcd: what BAdam saves in backward hangs on this."""
    model = llama()
    # what transformers switches on would make backward visit every layer
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    driven = Driven(Badam, {"sample_every": 1, "order": "ascending"}, model=model)
    visited = watch_backward(model)
    for step in range(4):
        visited.clear()
        driven.run(step, step + 1)
        assert visited == set(range(step, 4))
