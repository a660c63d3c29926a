"""Memory without a GPU: storages alive, counted as they come and go."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from grass_tiny import weights
from live_storage import LiveStorage
from torch import Tensor

from grass import Grass
from grass.host import PIECE_ELEMENTS

LAYERS, WIDTH = 6, 64
FROZEN_OUTSIDE = {"train_embedding": False, "train_head": False, "train_final_norm": False}


def wide_llama(dtype: torch.dtype = torch.float32) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, use_cache=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).to(dtype).train()


def batch(rows: int = 4) -> dict[str, Tensor]:
    ids = torch.randint(0, 64, (rows, 48), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def step(model: Any, opt: Grass, rows: int = 4) -> None:
    model(**batch(rows)).loss.backward()
    opt.step()
    opt.zero_grad()


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_a_probe_peaks_no_higher_than_a_step(checkpointing: bool, rows: int) -> None:
    """Two active layers, nothing trained outside the stack, states moved: the leanest steps, at their worst draw.

    With one active layer and checkpointing a probe needs a little more: a step then recomputes a sleeping layer where
    all checkpoints are alive, the probe a trained one.
    """
    model = wide_llama()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    opt = Grass(model, lr=1e-3, active_layers=2, sample_every=1, sampler="uniform", offload="move", **FROZEN_OUTSIDE)
    opt._draw = lambda: (0, LAYERS - 1)  # type: ignore[method-assign]
    opt._resample()
    step(model, opt, rows)  # states are made, and caches filled
    with LiveStorage() as live:
        step(model, opt, rows)
        steps = live.peak
    probing = Grass(model, lr=1e-3, active_layers=1, **FROZEN_OUTSIDE)
    with LiveStorage() as live:
        probing.probe([batch(rows), batch(rows)])
        probe = live.peak
    assert probe <= steps
    # and it really measured every layer
    assert probing.importance is not None
    assert min(probing.importance.values) > 0


def test_a_probe_leaves_checkpointing_as_it_was() -> None:
    for switched_on in (False, True):
        model = wide_llama()
        if switched_on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        Grass(model, lr=1e-3, active_layers=1).probe([batch()])
        assert model.is_gradient_checkpointing is switched_on


def test_checkpointing_in_the_probe_changes_no_norm() -> None:
    measured = []
    for model in (wide_llama().train(), wide_llama().eval()):
        # in eval mode transformers does not checkpoint
        opt = Grass(model, lr=1e-3, active_layers=1)
        opt.probe([batch()])
        assert opt.importance is not None
        measured.append(opt.importance.values)
    assert measured[0] == measured[1]


@pytest.mark.parametrize(
    ("weight", "state_dtype"),
    [("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16"), ("fp32", "int8"), ("bf16", "int8")],
)
@pytest.mark.parametrize("rounding", [False, True], ids=["nearest", "stochastic"])
def test_an_update_needs_no_temporary_the_size_of_a_matrix(
    weight: str, state_dtype: Any, *, rounding: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if rounding and weight == "fp32":
        pytest.skip("nothing to round")
    monkeypatch.setitem(PIECE_ELEMENTS, "cpu", 1024)
    model = wide_llama(torch.float32 if weight == "fp32" else torch.bfloat16)
    opt = Grass(
        model, lr=1e-3, active_layers=1, sampler="uniform", sample_every=99,
        state_dtype=state_dtype, stochastic_rounding=rounding, max_grad_norm=0.1,
    )  # fmt: skip
    step(model, opt)
    model(**batch()).loss.backward()
    with LiveStorage() as live:
        opt.step()
    # three fp32 temporaries of a piece, the norms of the gradients beside; the smallest matrix has 2,048 entries
    assert live.largest <= 4 * 1024
    assert live.peak <= 6 * 4 * 1024 + 4096


def test_states_on_the_device_are_those_of_the_mode() -> None:
    """On a CPU `move` still stages: outside `step()` no staging buffer is left."""
    model = wide_llama()
    opt = Grass(model, lr=1e-3, active_layers=2, sample_every=2, sampler="cyclic", offload="move")
    with LiveStorage() as live:
        for _ in range(4):
            step(model, opt)
        home = sum(block.nbytes for block in opt.states.blocks if block.home is not None)
        assert opt.states.offload is not None
        assert opt.states.offload.returning == 0
        # what is alive between steps: host blocks, made by mmap and so not counted here, and next to nothing else
        assert live.now < 0.02 * home


def test_weights_change_only_in_step() -> None:
    model = wide_llama()
    opt = Grass(model, lr=1e-3, active_layers=2, sample_every=2, offload="move", max_grad_norm=1.0)
    before = weights(model)
    opt.probe([batch()])
    model(**batch()).loss.backward()
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    opt.step()
    after = weights(model)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    opt.zero_grad()
    model(**batch()).loss.backward()
    assert all(torch.equal(after[name], p) for name, p in model.named_parameters())
