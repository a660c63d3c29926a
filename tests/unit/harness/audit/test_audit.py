"""The audit tells sound training scripts from broken ones, for methods and trainers that this project did not write."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from audited import SOUND, several
from grass_tiny import batch, llama
from harness.audit import Audit, AuditCallback, judge


def run(model: Any, optimizer: Any, steps: int = 6) -> None:
    for step in range(steps):
        loss = model(**batch(step)).loss
        if loss.requires_grad:
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def faults(audit: Audit) -> list[str]:
    return [f"{finding.verdict}: {finding.text}" for finding in judge(audit.facts) if finding.verdict != "ok"]


def adamw(parameters: Iterable[Any]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def test_full_fine_tuning_and_lora_have_no_fault() -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(llama(), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    for model in (llama(), adapted):
        optimizer = adamw(p for p in model.parameters() if p.requires_grad)
        with Audit(model, optimizer, quiet=True) as audit:
            run(model, optimizer)
        assert faults(audit) == []
    moved = {name for name, tensor in audit.facts.tensors.items() if tensor.moved}
    assert moved == {name for name in audit.facts.tensors if "lora_" in name}


def test_the_audit_changes_nothing_and_leaves_no_hook_behind() -> None:
    plain, watched = llama(), llama()
    run(plain, adamw(plain.parameters()))
    optimizer = adamw(watched.parameters())
    with Audit(watched, optimizer, interval_steps=2, quiet=True) as audit:
        run(watched, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))
    run(watched, optimizer)
    assert (audit.facts.steps, audit.facts.intervals) == (6, 3)


def test_re_entrant_checkpointing_behind_a_frozen_embedding_is_seen_to_train_the_head_only() -> None:
    model = llama()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.disable_input_require_grads()
    model.train()
    model.model.embed_tokens.requires_grad_(False)
    optimizer = adamw(model.parameters())
    with Audit(model, optimizer, quiet=True) as audit, pytest.warns(UserWarning, match="requires_grad"):
        run(model, optimizer)
    assert any("layers 0-3 were switched on and never had a gradient" in fault for fault in faults(audit))


def test_nothing_trained_is_said_so() -> None:
    model = llama()
    with Audit(model, adamw(model.parameters()), quiet=True) as audit:
        pass
    assert faults(audit) == ["BROKEN: the optimizer took no step: nothing was trained"]


def test_a_warm_up_that_begins_at_zero_is_no_fault() -> None:
    model = llama()
    optimizer = adamw(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 4)
    with Audit(model, optimizer, interval_steps=1, quiet=True) as audit:
        for step in range(4):
            model(**batch(step)).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    assert faults(audit) == []


def test_grass_has_no_fault_but_state_of_sleepers_that_it_means_to_keep() -> None:
    from grass import Grass

    model = llama()
    opt = Grass(model, lr=1e-2, active_layers=2, sample_every=2, sampler="uniform", offload="resident")
    with Audit(model, opt, quiet=True) as audit:
        run(model, opt, steps=12)
    (fault,) = faults(audit)
    assert fault.startswith("LOOK: state")


def test_badam_and_the_state_that_its_inner_optimizer_holds() -> None:
    badam = pytest.importorskip("badam")
    model = llama(dtype=torch.bfloat16)
    inner = adamw(model.parameters())
    named = list(model.named_parameters())
    optimizer = badam.BlockOptimizer(inner, named, switch_block_every=3, switch_mode="ascending", verbose=0)
    with Audit(model, optimizer, quiet=True) as audit:
        run(model, optimizer, steps=11)
    assert faults(audit) == []
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    # fp32 copy, gradient apart, and two fp32 moments of the one block
    assert {state.total for state in audit.facts.state} == {12 * layer}


def test_the_trainer_callback_sees_a_switching_callback_that_the_optimizer_ignores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Switch(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            for number, layer in enumerate(given["model"].model.layers):
                layer.requires_grad_(number == state.global_step % 4)

    model = llama()
    # the bug: frozen before Trainer builds its optimizer, which takes what requires gradients then
    model.model.layers[1:].requires_grad_(False)
    rows = [{key: value[0] for key, value in batch(seed).items()} for seed in range(16)]
    settings = {"per_device_train_batch_size": 2, "max_steps": 8, "report_to": [], "use_cpu": True}
    Trainer(
        model,
        TrainingArguments(str(tmp_path), **settings, logging_strategy="no", save_strategy="no", disable_tqdm=True),
        train_dataset=rows,
        callbacks=[Switch(), AuditCallback()],
    ).train()
    said = " ".join(capsys.readouterr().out.split())
    assert "BROKEN layers 1-3 got gradients and never moved: the optimizer does not hold them" in said


def vision_and_language() -> torch.nn.Module:
    """A wrapper with two towers of equal right to be the decoder, as multimodal models have."""
    model = llama()
    both = torch.nn.Module()
    both.vision, both.language_model = llama(layers=2).model, model.model
    both.lm_head = model.lm_head
    both.forward = model.forward
    return both


@pytest.mark.parametrize("form", ["list", "path", "end of path"])
def test_layers_that_cannot_be_found_are_passed_as_to_grass(form: str) -> None:
    model: Any = vision_and_language()
    optimizer = adamw(model.language_model.parameters())
    with pytest.raises(ValueError, match="more than one stack"):
        Audit(model, optimizer)
    layers = {"list": list(model.language_model.layers), "path": "language_model.layers"}
    with Audit(model, optimizer, layers=layers.get(form, "language_model.layers"), quiet=True) as audit:
        run(model, optimizer)
    assert [audit.facts.tensors[f"language_model.layers.{i}.mlp.up_proj.weight"].part for i in range(4)] == [
        f"layer {i}" for i in range(4)
    ]
    assert {tensor.part for name, tensor in audit.facts.tensors.items() if "vision" in name} == {"embedding"}


def test_the_callback_takes_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import Trainer, TrainingArguments

    model = llama()
    rows = [{key: value[0] for key, value in batch(seed).items()} for seed in range(4)]
    settings = {"max_steps": 1, "report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
    watch = AuditCallback(layers=list(model.model.layers)[2:])
    Trainer(model, TrainingArguments(str(tmp_path), **settings), train_dataset=rows, callbacks=[watch]).train()
    assert "2 decoder layers" in capsys.readouterr().out


def test_a_storage_of_views_counts_once_and_three_of_four_sleeping_layers_are_three_quarters() -> None:
    from grass import Grass

    model = llama()
    outside = {"train_embedding": False, "train_head": False, "train_final_norm": False}
    opt = Grass(model, lr=1e-3, active_layers=1, sample_every=2, sampler="cyclic", **outside)
    with Audit(model, opt, quiet=True) as audit:
        run(model, opt, steps=8)
    size = 2 * 4 * sum(p.numel() for p in model.model.layers[0].parameters())
    last = audit.facts.state[-1]
    assert (last.total, last.sleeping) == (4 * size, 3 * size)


@pytest.mark.parametrize("flat", [False, True])
def test_one_buffer_for_the_state_of_all_layers_is_shared_out_by_its_pieces(flat: bool) -> None:
    model = llama()
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in model.model.layers]

    class Flat(torch.optim.SGD):
        """Momentum of all layers in one buffer, or in one a layer."""

        def __init__(self) -> None:
            super().__init__(model.model.layers.parameters(), lr=0.1)
            whole = torch.zeros(sum(sizes))
            for layer, part in zip(model.model.layers, whole.split(sizes), strict=True):
                own = part if flat else part.clone()
                pieces = own.split([p.numel() for p in layer.parameters()])
                for p, piece in zip(layer.parameters(), pieces, strict=True):
                    self.state[p]["mean"] = piece

    optimizer = Flat()
    with Audit(model, optimizer, quiet=True) as audit:
        for number, layer in enumerate(model.model.layers):
            layer.requires_grad_(number == 2)
        run(model, optimizer, steps=1)
    assert [(s.total, s.sleeping) for s in audit.facts.state] == [(4 * sum(sizes), 4 * (sum(sizes) - sizes[2]))]


def test_state_in_lists_and_objects_is_counted() -> None:
    model = llama()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4, history_size=3)

    def closure() -> float:
        optimizer.zero_grad()
        loss = model(**batch(0)).loss
        loss.backward()
        return loss.item()  # type: ignore[no-any-return]

    with Audit(model, optimizer, quiet=True) as audit:
        optimizer.step(closure)
    size = 4 * sum(p.numel() for p in model.parameters())
    # direction, previous gradient, and one pair of differences in lists
    assert audit.facts.state[-1].total >= 4 * size


def test_tensors_of_an_optimizer_that_was_not_given_are_named_and_left_out() -> None:
    audit = several.two_optimizers(Path(), given="second")
    (fault,) = faults(audit)
    assert fault.startswith("LOOK: 28 of the model's tensors, in layers 0-3, are in Muon alone")
    assert [sum(t.elements for t in audit.facts.of(f"layer {i}")) for i in range(4)] == [32] * 4
    both = several.two_optimizers(Path())
    assert faults(both) == []
    assert (both.facts.optimizer, both.facts.steps) == ("Muon and AdamW", 12)


def test_the_best_checkpoint_loaded_at_the_end_changes_no_verdict(tmp_path: Path) -> None:
    plain, best = SOUND["trainer"](tmp_path / "plain"), SOUND["trainer_loads_the_best"](tmp_path / "best")
    assert faults(plain) == faults(best)
    assert not any(t.dragged or t.written for t in best.facts.tensors.values())


def test_what_the_script_writes_is_told_apart_from_what_a_step_moves() -> None:
    model = llama()
    optimizer = adamw(model.lm_head.parameters())
    with Audit(model, optimizer, quiet=True) as audit:
        for step in range(3):
            model(**batch(step)).loss.backward()
            optimizer.step()
            model.zero_grad()
            with torch.no_grad():
                model.lm_head.weight.data.mul_(0.5)
    head = audit.facts.tensors["lm_head.weight"]
    assert (head.moved, head.written) == (1, 1)
    assert any("head changed between two steps" in fault for fault in faults(audit))


@pytest.mark.parametrize("bad", [{"interval_steps": 0}, {"optimizer": object()}, {"optimizer": []}])
def test_bad_arguments_are_refused(bad: dict[str, Any]) -> None:
    model = llama()
    with pytest.raises(ValueError, match=r"interval_steps must be|not a torch\.optim\.Optimizer|empty list"):
        Audit(model, **{"optimizer": adamw(model.parameters()), **bad})
