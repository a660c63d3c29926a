"""On a CUDA device: every method keeps its promises there, and the meters read what they cannot read on a CPU."""

from __future__ import annotations

import pkgutil
from pathlib import Path

import pytest
import torch
from harness.checking.contract import Case
from harness.checking.tiny import tiny_inputs

import baselines
from baselines.method import find_method

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

MODULES = sorted(m.name for m in pkgutil.iter_modules(baselines.__path__) if m.name != "method")


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


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_states_of_sleeping_layers_are_on_the_host(tmp_path: Path) -> None:
    from harness.inputs.models import load_model

    from grass import Grass

    inputs = tiny_inputs(tmp_path)
    model = load_model(inputs.model, weight_dtype="bf16").to("cuda")
    opt = Grass(model, lr=1e-3, active_layers=1, sample_every=2, sampler="uniform")
    ids = torch.randint(4, 60, (4, 16), device="cuda")
    for _ in range(12):
        model(input_ids=ids, labels=ids).loss.backward()
        opt.step()
        opt.zero_grad()
    for layer, parameters in enumerate(opt.layer_parameters):
        expected = "cuda" if layer in opt.active else "cpu"
        found = {
            v.device.type for p in parameters for v in opt.state.get(p, {}).values() if isinstance(v, torch.Tensor)
        }
        assert found <= {expected}
