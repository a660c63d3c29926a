"""On a CUDA device: every method keeps its promises there, and the meters read what they cannot read on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness.checking.contract import Case
from harness.checking.tiny import tiny_inputs

from baselines import find_method, method_names

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

MODULES = method_names()


@pytest.mark.parametrize("weight_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_method_keeps_its_promises_on_the_device(module: str, weight_dtype: str, tmp_path: Path) -> None:
    case = Case(module, find_method(module).EXAMPLES[0], tiny_inputs(tmp_path / "inputs"), tmp_path)
    record = case.train("run", device="cuda", weight_dtype=weight_dtype)
    assert (record.status, record.status_why) == ("ok", None)
    assert record.memory is not None
    assert record.memory.device_why is None
    steps = "steady" if find_method(module).TRAINS else "load"
    assert (record.memory.device_allocated_peak_bytes[steps] or 0) > 0
    assert record.memory.nvml_why is not None or (record.memory.nvml_process_peak_bytes or 0) > 0
    assert record.provenance.device == torch.cuda.get_device_name()


OFFLOAD = ("resident", "move", "auto")


@pytest.mark.parametrize("offload", OFFLOAD)
def test_moments_are_where_the_mode_says(offload: Any, tmp_path: Path) -> None:
    model, opt = trained(tmp_path, offload=offload, steps=12)
    mode = opt.states.mode
    assert mode in OFFLOAD[:2], opt.states.why
    for layer, parameters in enumerate(opt.layer_parameters):
        expected = "cuda" if layer in opt.active and mode == "resident" else "cpu"
        found = {
            v.device.type for p in parameters for v in opt.state.get(p, {}).values() if isinstance(v, torch.Tensor)
        }
        assert found <= {expected}
    hosts = [block.host for block in opt.states.blocks if block.host is not None]
    assert hosts
    assert all(host.is_pinned() for host in hosts)
    assert next(model.parameters()).device.type == "cuda"


@pytest.mark.parametrize("state_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_every_offload_mode_ends_in_the_same_weights_bit_for_bit(
    state_dtype: Any, accumulation_steps: int, tmp_path: Path
) -> None:
    ends = []
    for offload in OFFLOAD:
        model, _ = trained(
            tmp_path, offload=offload, steps=16, state_dtype=state_dtype, accumulation_steps=accumulation_steps
        )
        ends.append([p.detach().clone() for p in model.parameters()])
    for other in ends[1:]:
        assert all(torch.equal(p, q) for p, q in zip(ends[0], other, strict=True))


def test_a_resumed_run_on_the_device_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    straight, _ = trained(tmp_path, offload="move", steps=12)
    model, opt = trained(tmp_path, offload="move", steps=5)
    torch.save(opt.state_dict(), tmp_path / "opt.pt")
    again = grass_on(model, offload="resident")
    # as Trainer loads it: everything on the host
    again.load_state_dict(torch.load(tmp_path / "opt.pt", map_location="cpu", weights_only=True))
    run(model, again, range(5, 12), accumulation_steps=1)
    assert all(torch.equal(p, q) for p, q in zip(straight.parameters(), model.parameters(), strict=True))


def trained(folder: Path, *, steps: int, accumulation_steps: int = 1, **options: Any) -> Any:
    from harness.inputs.models import load_model

    inputs = tiny_inputs(folder / "inputs")
    model: Any = load_model(inputs.model, weight_dtype="bf16").to("cuda")
    opt = grass_on(model, accumulation_steps=accumulation_steps, **options)
    run(model, opt, range(steps), accumulation_steps=accumulation_steps)
    return model, opt


def grass_on(model: Any, **options: Any) -> Any:
    from grass import Grass

    return Grass(model, lr=1e-3, active_layers=1, sample_every=2, sampler="uniform", max_grad_norm=1.0, **options)


def run(model: Any, opt: Any, numbers: range, *, accumulation_steps: int) -> None:
    for number in numbers:
        for part in range(accumulation_steps):
            generator = torch.Generator().manual_seed(100 * number + part)
            ids = torch.randint(4, 60, (4, 16), generator=generator).to("cuda")
            (model(input_ids=ids, labels=ids).loss / accumulation_steps).backward()
        opt.step()
        opt.zero_grad()
