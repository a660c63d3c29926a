"""Models and training loops that Grass cannot serve are refused, each in one sentence that says what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from grass_tiny import batch, llama
from torch import nn
from torch.optim import Optimizer

from grass.refusals import refuse_loss_scaling, refuse_unfit_model


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def refusal(model: nn.Module) -> str:
    with pytest.raises(ValueError) as caught:
        refuse_unfit_model(model)
    said = str(caught.value)
    assert "\n" not in said
    return said


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plain_model_is_fit_and_left_as_it_is(dtype: torch.dtype) -> None:
    model = llama(dtype=dtype)
    model.model.layers[1].requires_grad_(False)
    before = [(p.requires_grad, p.clone()) for p in model.parameters()]
    refuse_unfit_model(model)
    assert all(
        p.requires_grad == wanted and torch.equal(p, value)
        for p, (wanted, value) in zip(model.parameters(), before, strict=True)
    )


def test_peft_adapters_are_refused_around_the_model_and_inside_it() -> None:
    from peft import LoraConfig, get_peft_model, inject_adapter_in_model

    config = LoraConfig(target_modules=["q_proj"], r=2)
    said = refusal(get_peft_model(llama(), config))
    assert said.startswith("the model carries peft adapters, and GRASS trains whole layers")
    assert said.endswith("merge the adapters and pass the plain model, or train them with an ordinary optimizer")
    inside = llama()
    inject_adapter_in_model(config, inside)
    assert refusal(inside).startswith("the module model.layers.0.self_attn.q_proj carries peft adapters")
    merged = get_peft_model(llama(), config).merge_and_unload()
    refuse_unfit_model(merged)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_model_compiled_as_a_whole_is_refused(in_place: bool) -> None:
    model = llama()
    if in_place:
        model.compile(backend="eager")
    compiled = model if in_place else torch.compile(model, backend="eager")
    assert isinstance(compiled, nn.Module)
    said = refusal(compiled)
    assert said.startswith("the model is compiled as a whole, so that every draw of other layers compiles it again")
    assert said.endswith("pass the original model, uncompiled")


def test_layers_compiled_one_by_one_are_fit() -> None:
    model = llama()
    for layer in model.model.layers:
        layer.compile(backend="eager")
    refuse_unfit_model(model)


def test_drawing_other_layers_compiles_a_whole_model_anew() -> None:
    # the fact behind the refusal
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    compilations = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        compilations.append(graph)
        return graph.forward

    compiled = torch.compile(net, backend=backend)
    for active in (0, 1, 0, 1):
        for index, layer in enumerate(net):
            layer.requires_grad_(index == active)
        compiled(torch.ones(2, 4)).sum().backward()
    assert len(compilations) == 2


@pytest.mark.usefixtures("one_process")
def test_distributed_data_parallel_is_refused() -> None:
    said = refusal(nn.parallel.DistributedDataParallel(llama()))
    assert said.startswith("the model is wrapped in DistributedDataParallel, whose reducer is built for one fixed set")
    assert said.endswith("pass the plain module (model.module), Grass.step() averages the gradients itself")


def test_data_parallel_is_refused() -> None:
    said = refusal(nn.DataParallel(llama()))
    assert said.startswith("the model is wrapped in DataParallel, ")
    assert "pass the plain module (model.module)" in said


@pytest.mark.usefixtures("one_process")
@pytest.mark.filterwarnings("ignore:FSDP is switching")
def test_a_model_sharded_by_the_first_fsdp_is_refused() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = llama()
    model.model.layers[2] = FullyShardedDataParallel(model.model.layers[2], device_id=torch.device("cpu"))
    assert refusal(model).startswith("the module model.layers.2 is sharded by FSDP, and GRASS cannot yet ")


@pytest.mark.usefixtures("one_process")
def test_a_model_sharded_by_the_second_fsdp_is_refused() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = llama()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    assert refusal(model).startswith("the model is sharded by FSDP, and GRASS cannot yet ")


@pytest.mark.usefixtures("one_process")
def test_a_parameter_that_is_a_dtensor_is_refused() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    model = llama()
    norm = model.model.norm
    norm.weight = nn.Parameter(distribute_tensor(norm.weight.detach(), init_device_mesh("cpu", (1,))))
    assert refusal(model).startswith("the parameter model.norm.weight is a DTensor, and GRASS cannot yet ")


def test_the_first_parameter_on_the_meta_device_is_named() -> None:
    model = llama()
    model.model.layers[1].to("meta")
    model.model.layers[2].to("meta")
    said = refusal(model)
    assert said.startswith("the parameter model.layers.1.self_attn.q_proj.weight is on the meta device, ")
    assert said.endswith("load the weights, without offloading them, before creating Grass")


def test_the_first_float16_parameter_is_named() -> None:
    model = llama()
    model.model.layers[1].mlp.half()
    said = refusal(model)
    assert said.startswith("the parameter model.layers.1.mlp.gate_proj.weight is float16, whose gradients need loss ")
    assert said.endswith("load the model in bfloat16 or float32")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.float8_e4m3fn])
def test_the_first_quantised_parameter_is_named(dtype: torch.dtype) -> None:
    model = llama()
    down = model.model.layers[2].mlp.down_proj
    down.weight = nn.Parameter(down.weight.detach().to(dtype), requires_grad=False)
    said = refusal(model)
    assert said.startswith(
        f"the parameter model.layers.2.mlp.down_proj.weight is quantised ({dtype}), and GRASS trains "
    )
    assert said.endswith("load the model unquantised, in bfloat16 or float32")


def test_a_model_whose_quantised_weights_are_buffers_is_refused() -> None:
    model = llama()
    # as transformers marks what it has loaded with a quantisation config
    model.hf_quantizer = object()
    assert refusal(model).startswith("the model is quantised, and GRASS trains the weights themselves: ")


class Stepped(Optimizer):
    """Counts its updates, after it has refused a scaler."""

    _step_supports_amp_scaling = True

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})
        self.updates = 0

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        refuse_loss_scaling(self)
        self.updates += 1
        return closure() if closure else None


def scaled(*, factor: float = 1.0, **options: Any) -> tuple[Stepped, torch.amp.GradScaler]:
    weight = nn.Parameter(torch.ones(2))
    opt, scaler = Stepped([weight]), torch.amp.GradScaler("cpu", **options)
    scaler.scale((weight * factor).sum()).backward()
    return opt, scaler


REFUSED = (
    "^a GradScaler is stepping this optimizer, but GRASS measures gradients .*: train without the scaler, in bfloat16"
)


@pytest.mark.parametrize("unscaled_first", [False, True])
@pytest.mark.parametrize("factor", [1.0, float("inf")])
@pytest.mark.parametrize("scheduled", [False, True])
def test_a_grad_scaler_is_refused(unscaled_first: bool, factor: float, scheduled: bool) -> None:
    opt, scaler = scaled(factor=factor)
    if scheduled:
        # a scheduler wraps the optimizer's step
        torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1.0)
    if unscaled_first:
        scaler.unscale_(opt)
    with pytest.raises(RuntimeError, match=REFUSED):
        scaler.step(opt)
    assert opt.updates == 0


def test_a_step_without_the_scaler_works_after_a_refused_one() -> None:
    opt, scaler = scaled()
    with pytest.raises(RuntimeError, match=REFUSED):
        scaler.step(opt)
    opt.step()
    assert opt.updates == 1


def test_a_scaler_that_is_switched_off_is_let_through() -> None:
    opt, scaler = scaled(enabled=False)
    scaler.step(opt)
    scaler.update()
    assert opt.updates == 1


def test_without_the_declaration_a_scaler_could_not_be_told_from_a_plain_step() -> None:
    # why Grass has to declare it
    opt, scaler = scaled()
    opt._step_supports_amp_scaling = False
    scaler.step(opt)
    assert opt.updates == 1


def test_a_model_trained_under_bfloat16_autocast_needs_no_scaler() -> None:
    model = llama()
    opt = Stepped(model.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**batch(0)).loss
    loss.backward()
    opt.step()
    assert opt.updates == 1
