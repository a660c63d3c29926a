"""A forecast equals the same run on real tensors to the byte: in every phase, under every draw, kind by kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from itertools import product
from typing import Any
from unittest.mock import patch

import pytest
import torch
from forecast_cells import (
    CHUNK,
    CHUNK_ROWS,
    LAYERS,
    METHODS,
    PARAMETERS,
    PIECE,
    SHAPE,
    SMALL,
    VOCABULARY,
    WIDTH,
    small,
    small_forecast,
)
from further import a_few
from harness.forecasting.fake_device import CountingHost
from harness.forecasting.forecast import OWN, Forecast, Looks, forecast
from harness.forecasting.tracker import Tracker
from harness.step.cell import CellRun
from harness.step.draws import top
from harness.step.loss import token_loss
from harness.step.spec import Cell
from torch import nn

from grass.host import PIECE_ELEMENTS, using
from grass.offload.offload import RING


@pytest.fixture(autouse=True, scope="module")
def _many_pieces() -> Iterator[None]:
    with (
        patch.dict(PIECE_ELEMENTS, other=PIECE),
        patch("grass.offload.blocks.CHUNK_BYTES", CHUNK),
        patch("grass.loss.CHUNK_ROWS", CHUNK_ROWS),
    ):
        small_forecast.cache_clear()
        yield
        small_forecast.cache_clear()


def figures(found: Forecast) -> dict[str, Any]:
    return {
        "peak": found.peak_bytes,
        "phases": found.by_phase,
        "kinds": found.by_kind,
        "draws": found.by_draw,
        "worst": found.worst_draw,
        "largest": found.largest_elements,
        "states on the device": found.device_state_bytes,
    }


LIKE_OTHERS = {("lora-fp32", "lean"), ("lisa", "lean"), ("grass-resident", "plain")}
"""Cells that add no code to what the others run."""


@pytest.mark.parametrize(
    ("method", "settings"), a_few(sorted({*product(METHODS, ("plain", "lean"))} - LIKE_OTHERS), one_in=3)
)
def test_a_forecast_equals_real_tensors_to_the_byte(method: str, settings: str) -> None:
    assert figures(small_forecast(method, settings)) == figures(small_forecast(method, settings, "real"))


@pytest.mark.parametrize("settings", ["plain", "lean"])
@pytest.mark.parametrize("method", a_few(["decoder-move", "full", "lora", "lisa"], one_in=4))
def test_the_harness_needs_no_more_than_the_method_it_measures(method: str, settings: str) -> None:
    """Observer and validation, on batches of the step's own size."""
    cell, looks = small(method, settings), Looks(observed=SHAPE, evaluated=SHAPE)
    found, alone = forecast(cell, looks=looks), small_forecast(method, settings)
    assert figures(found) == figures(forecast(cell, looks=looks, tensors="real"))
    own = {phase: found.by_phase[phase] for phase in OWN}  # type: ignore[index]
    steps = {phase: peak for phase, peak in alone.by_phase.items() if phase != "load"}
    assert steps.items() < found.by_phase.items(), "the steps are the same"
    assert found.peak_bytes == alone.peak_bytes
    weights = 2 * PARAMETERS
    assert weights < own["evaluate"] < own["observe"] < alone.peak_bytes


@pytest.mark.parametrize("method", a_few(["grass-move", "full", "lora-fp32"], one_in=3))
def test_it_does_so_in_autocast_too(method: str) -> None:
    """Copies of weights in bf16 are made, kept for backward and counted."""
    plain = small(method, "plain")
    plain = plain.model_copy(update={"numerics": plain.numerics.model_copy(update={"weight_dtype": "fp32"})})
    rounded = plain.model_copy(update={"autocast": True})
    fake = forecast(rounded)
    assert figures(fake) == figures(forecast(rounded, tensors="real"))
    assert fake.by_phase["forward"] != forecast(plain).by_phase["forward"]


@pytest.mark.parametrize(
    ("method", "rounding"),
    [
        pytest.param("grass-move", False, id="grass-move"),
        pytest.param("lisa", True, id="stochastic-lisa"),
        pytest.param("full", False, id="full", marks=pytest.mark.exhaustive),
        pytest.param("decoder-resident", True, id="stochastic-decoder-resident", marks=pytest.mark.exhaustive),
    ],
)
def test_it_does_so_with_moments_in_8_bits(method: str, *, rounding: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grass.quantised.SMALLEST", WIDTH + 1)  # all matrices are packed
    plain = small(method, "lean")
    changes = {"state_dtype": "int8", "stochastic_rounding": rounding}
    packed = plain.model_copy(update={"numerics": plain.numerics.model_copy(update=changes)})
    fake, of_bf16 = forecast(packed), small_forecast(method, "lean")
    assert figures(fake) == figures(forecast(packed, tensors="real"))
    for found, of_others in (
        (fake.device_state_bytes, of_bf16.device_state_bytes), (fake.host_bytes, of_bf16.host_bytes)
    ):  # fmt: skip
        # two bytes a parameter and its part of the scales, instead of four
        assert 0.5 * of_others <= found <= 0.53 * of_others


# ------------------------------------------------------------ defects that the comparison must see


def _forget_nothing(*_: Any, **__: Any) -> None:
    """In the place of what frees something."""


def _hook_stays(model: Any, asked: bool) -> None:
    if asked:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()


def _uncounted(streams: Any, elements: int, dtype: torch.dtype) -> torch.Tensor:
    with streams._tracker.on_host():
        return torch.empty(2, elements, dtype=dtype)


def _keep_gradients(hooks: Any, layer: int) -> Callable[[torch.Tensor], None]:
    def hook(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        square = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32).square()
        hooks._squares[layer] = hooks._squares.get(layer, torch.zeros_like(square)) + square

    return hook


def _with_padding(make_mask: Any) -> Any:
    return make_mask


DEFECTS: dict[str, tuple[str, str, list[tuple[str, Any]]]] = {
    "host memory counts as device memory": (
        "decoder-move", "plain", [("harness.forecasting.tracker.Tracker.on_host", lambda tracker: nullcontext())],
    ),
    "staging buffers do not count": (
        "decoder-move", "lean", [("harness.forecasting.fake_device.ForecastStreams.allocate", _uncounted)],
    ),
    "sleeping states stay on the device": (
        "lisa", "plain", [("baselines.lisa.Lisa._forget_moments", _forget_nothing)],
    ),
    "moments of sleeping layers are not sent home": (
        "decoder-resident", "plain", [("grass.offload.offload.StateOffload._send_home", _forget_nothing)],
    ),
    "gradients stay after the step": (
        "lora", "plain", [("torch.optim.Optimizer.zero_grad", _forget_nothing)],
    ),
    "the hook on the embedding stays": (
        "decoder-move", "lean",
        [
            ("harness.step.attach.switch_on_checkpointing", _hook_stays),
            ("grass.optimizer.stop_at_lowest_layer", _forget_nothing),
        ],
    ),
    "storages that die are not seen": (
        "full", "plain", [("harness.forecasting.tracker.Tracker._gone", _forget_nothing)],
    ),
    "sizes are not rounded": (
        "lisa", "plain", [("harness.forecasting.tracker.ROUNDING", 1)],
    ),
    "a mask is built": (
        "lisa", "plain", [("harness.forecasting.fake_device._without_padding", _with_padding)],
    ),
    "the probe keeps all gradients until its step ends": (
        "decoder-move", "plain", [("grass.probing.NormHooks._reduce", _keep_gradients)],
    ),
    "the probe is not checkpointed": (
        "decoder-move", "plain", [("grass.probing.checkpointed", lambda model: nullcontext())],
    ),
}  # fmt: skip


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_shows_as_a_difference(defect: str) -> None:
    method, settings, patches = DEFECTS[defect]
    real = small_forecast(method, settings, "real")
    with ExitStack() as stack:
        for target, instead in patches:
            stack.enter_context(patch(target, instead))
        assert figures(forecast(small(method, settings))) != figures(real)


# ------------------------------------------------------------ what the figures must show


@pytest.mark.parametrize("method", ["decoder-move", "decoder-resident", "grass-move", "grass-resident"])
@pytest.mark.parametrize("settings", ["plain", "lean"])
def test_a_probe_peaks_no_higher_than_a_step(method: str, settings: str) -> None:
    phases = small_forecast(method, settings).by_phase
    assert 0 < phases["probe"] <= max(phases[step] for step in ("forward", "backward", "update"))


LARGE = SMALL.model_copy(update={"vocab_size": 1000, "parameters": PARAMETERS + 2 * (1000 - VOCABULARY) * WIDTH})
"""The small model with so many words that its logits are the largest storage of a step."""
LOGITS = 1000 * SHAPE.batch * SHAPE.length
"""Entries of the logits of all tokens."""


def large(method: str, settings: str) -> Cell:
    return small(method, settings).model_copy(update={"model": LARGE})


@pytest.mark.parametrize("method", ["decoder-move", "full"])
def test_no_storage_has_an_entry_for_every_word_and_token_with_the_chunked_loss(method: str) -> None:
    assert forecast(large(method, "lean")).largest_elements < LOGITS


def test_a_loss_that_is_not_chunked_shows_as_a_difference() -> None:
    real = forecast(large("full", "lean"), tensors="real")
    with patch("harness.step.loss.chunked_token_loss", token_loss):
        defect = forecast(large("full", "lean"))
    assert defect.largest_elements >= LOGITS > real.largest_elements
    assert (defect.peak_bytes, defect.by_kind["loss"]) > (real.peak_bytes, real.by_kind["loss"])


def test_moved_states_spare_the_active_ones_less_the_staging_buffers() -> None:
    """Lean settings, where the peak is in backward: there resident states stand on top of it, moved ones do not."""
    for kind in ("decoder", "grass"):
        move, resident = (small_forecast(f"{kind}-{mode}", "lean") for mode in ("move", "resident"))
        assert resident.peak_phase == move.peak_phase == "backward"
        assert resident.peak_bytes - move.peak_bytes >= resident.device_state_bytes - RING * CHUNK


def test_states_of_sleeping_layers_are_not_on_the_device() -> None:
    """Bytes of bf16 moments: four a parameter; all that train, all layers, or none."""
    layer, outside = (PARAMETERS - 2 * VOCABULARY * WIDTH - WIDTH) // LAYERS, 2 * VOCABULARY * WIDTH + WIDTH
    assert small_forecast("decoder-move", "plain").device_state_bytes == 0
    assert small_forecast("grass-move", "plain").device_state_bytes == 0
    assert small_forecast("decoder-resident", "plain").device_state_bytes == 4 * 2 * layer
    assert small_forecast("grass-resident", "plain").device_state_bytes == 4 * (2 * layer + outside)
    assert small_forecast("lisa", "plain").device_state_bytes == 4 * (2 * layer + outside)
    assert small_forecast("lisa-keep", "plain").device_state_bytes == 4 * PARAMETERS
    # what is not on the device is on the host
    assert small_forecast("decoder-move", "plain").host_bytes == 4 * LAYERS * layer
    assert small_forecast("decoder-resident", "plain").host_bytes == 4 * (LAYERS - 2) * layer


@pytest.mark.parametrize("settings", ["plain", "lean"])
def test_backward_visits_no_layer_below_the_lowest_active_one(settings: str) -> None:
    entered: list[str] = []
    with using(CountingHost(Tracker())):
        run = CellRun(small("decoder-move", settings), steps=4, device="cpu", enter=entered.append, policy=top)
        run.prepare()
        run.step(0)
        visited: set[int] = set()
        layers: list[nn.Module] = list(run.model.model.layers)  # type: ignore[union-attr, arg-type]
        for number, layer in enumerate(layers):

            def watch(module: Any, given: Any, output: Any, number: int = number) -> None:
                if torch._C._current_graph_task_id() != -1:
                    visited.add(number)  # recomputed within backward
                if output.requires_grad:
                    output.register_hook(lambda gradient: visited.add(number))

            layer.register_forward_hook(watch)
        run.step(1)
    assert visited == {LAYERS - 2, LAYERS - 1}
    assert {"forward", "backward", "update"} <= set(entered)
