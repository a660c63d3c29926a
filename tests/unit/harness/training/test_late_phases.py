"""After the last step nothing costs the trained model: not validation, not export. And what computes in bf16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from further import a_few
from harness.checking.tiny import LR, tiny_inputs, tiny_training
from harness.records.reading import read_jsonl
from harness.records.run import TrainRecord
from harness.study.spec import Observation
from harness.training import ending, loop
from harness.training.loading import Inputs
from safetensors.torch import load_file

from baselines.full import Full
from baselines.grass import GrassMethod


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return tiny_inputs(tmp_path_factory.mktemp("inputs"))


def train(inputs: Inputs, folder: Path, module: str = "full", options: Any = None, **recipe: Any) -> TrainRecord:
    return loop.train(
        tiny_training(module, options or {}, steps=6, **recipe),
        name="late", lr=LR, lr_searched=False, seed=0, inputs=inputs, folder=folder, state_folder=folder / "state",
        observation=Observation(every_steps=3, rows=8),
    )  # fmt: skip


def full(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_a_validation_without_room_is_a_reason_and_the_model_is_kept(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.training.validation.row_losses", full)
    record = train(inputs, tmp_path)
    assert (record.status, record.validation_loss) == ("ok", None)
    assert record.validation_why == "in phase eval: CUDA out of memory. Tried to allocate 2.00 GiB."
    assert record.checkpoint == str(tmp_path / "model")
    assert load_file(tmp_path / "model" / "model.safetensors")
    assert any(note.startswith("validation ran out of memory and went on with ") for note in record.notes)


def test_an_export_without_room_is_a_reason(inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Full, "export", full)
    record = train(inputs, tmp_path)
    assert (record.status, record.checkpoint) == ("ok", None)
    assert record.checkpoint_why == "in phase save: CUDA out of memory. Tried to allocate 2.00 GiB."
    assert record.validation_loss is not None
    assert not (tmp_path / "model").exists()


def test_an_export_that_dies_is_made_again_without_training(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = train(inputs, tmp_path / "straight")

    def broken(*_: Any, **__: Any) -> None:
        raise ValueError("the generation config is invalid")

    with monkeypatch.context() as patched:
        patched.setattr(Full, "export", broken)
        with pytest.raises(ValueError, match="generation config"):
            train(inputs, tmp_path / "again")
    with monkeypatch.context() as patched:
        patched.setattr(Full, "end_step", full)  # a step would be noticed
        again = train(inputs, tmp_path / "again")
    assert (again.status, again.steps_done, again.validation_loss) == ("ok", 6, straight.validation_loss)
    assert "resumed after step 6" in again.notes
    assert [c.ok for c in again.engagement] == [c.ok for c in straight.engagement]
    one, other = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("straight", "again"))
    assert all(torch.equal(one[key], other[key]) for key in one)


COMPARED = "the exported model is the trained one"


@pytest.mark.parametrize(
    ("module", "options"),
    a_few(
        [("lora", {"rank": 4, "alpha": 8}), ("full", {}), ("grass", {"active_layers": 2, "sample_every": 3})], one_in=3
    ),
)
def test_what_was_exported_is_compared_with_what_was_trained(
    module: str, options: Any, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[Any] = []
    usual, load = loop.load, ending.load_model

    def watched(*args: Any, **kwargs: Any) -> Any:
        trained.append(usual(*args, **kwargs))
        return trained[-1]

    def alone(*args: Any, **kwargs: Any) -> Any:
        run = trained[-1]
        assert sum(p.numel() for p in [*run.module.parameters(), *run.own_parameters]) == 0, "two models in memory"
        assert not run.method.optimizer.state
        return load(*args, **kwargs)

    monkeypatch.setattr(loop, "load", watched)
    monkeypatch.setattr(ending, "load_model", alone)
    record = train(inputs, tmp_path, module, options)
    check = next(check for check in record.engagement if check.name == COMPARED)
    assert (record.status, check.ok, check.promised) == ("ok", True, "the same loss to 0.1 %")
    assert len(trained) == 1


def test_an_export_that_is_another_model_is_noticed(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from baselines.lora import Lora

    def unmerged(method: Any, path: Path) -> None:
        method.wrapped.unload().save_pretrained(path)

    monkeypatch.setattr(Lora, "export", unmerged)
    record = train(inputs, tmp_path, "lora", {"rank": 4, "alpha": 64})
    assert record.status == "disengaged"
    assert str(record.status_why).startswith(f"{COMPARED}: promised the same loss to 0.1 %, saw loss ")
    assert record.checkpoint is not None


def test_an_export_that_transformers_cannot_load_is_noticed(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Full, "export", lambda method, path: method.model.config.save_pretrained(path))
    record = train(inputs, tmp_path)
    assert record.status == "disengaged"
    assert "transformers cannot use it: " in str(record.status_why)


def test_without_memory_for_a_second_model_nothing_is_compared(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ending, "load_model", full)
    record = train(inputs, tmp_path)
    assert (record.status, record.checkpoint) == ("ok", str(tmp_path / "model"))
    assert "there was no memory to compare the exported model with the trained one" in record.notes
    assert COMPARED not in [check.name for check in record.engagement]


@pytest.mark.parametrize(
    ("module", "options"),
    a_few([("grass", {"active_layers": 2, "sample_every": 3, "probe_steps": 2}), ("full", {})], one_in=2),
)
def test_training_and_probe_compute_in_bf16_and_what_is_only_looked_at_in_fp32(
    module: str, options: Any, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autocast would round away updates below half a bf16 unit in every loss that is only looked at."""
    seen: set[tuple[bool, bool]] = set()
    usual = loop.load

    def watched(*args: Any, **kwargs: Any) -> Any:
        loaded = usual(*args, **kwargs)
        loaded.module.register_forward_pre_hook(
            lambda module, _: seen.add((module.training, torch.is_autocast_enabled("cpu")))
        )
        return loaded

    monkeypatch.setattr(loop, "load", watched)
    plain = train(inputs, tmp_path / "plain", module, options)
    assert seen == {(True, False), (False, False)}
    seen.clear()
    record = train(inputs, tmp_path / "bf16", module, options, compute_dtype="bf16")
    assert seen == {(True, True), (False, False)}
    assert record.status == "ok"
    assert record.recipe["compute_dtype"] == "bf16"
    losses = [[row["loss"] for row in read_jsonl(tmp_path / n / "steps.jsonl")] for n in ("plain", "bf16")]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
    assert record.validation_loss == pytest.approx(plain.validation_loss, rel=2e-2)
    weights = load_file(tmp_path / "bf16" / "model" / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("module", "options"), a_few([("grass", {"active_layers": 2, "sample_every": 4}), ("full", {})], one_in=2)
)
def test_a_loss_in_chunks_is_the_same_up_to_rounding_and_never_has_all_logits(
    module: str, options: Any, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = train(inputs, tmp_path / "plain", module, options)

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the head was applied to every token at once")

    monkeypatch.setattr("harness.step.loss.token_loss", never)
    record = train(inputs, tmp_path / "chunks", module, options, chunked_loss=True)
    assert (record.status, plain.status) == ("ok", "ok")
    assert record.recipe["chunked_loss"] is True
    assert "chunked_loss" not in plain.recipe
    losses = [[row["loss"] for row in read_jsonl(tmp_path / n / "steps.jsonl")] for n in ("plain", "chunks")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert record.validation_loss == pytest.approx(plain.validation_loss, rel=1e-3)


def test_compute_dtype_that_the_weights_have_already_needs_no_autocast() -> None:
    recipes = {
        (weights, compute): tiny_training("full", {}, weight_dtype=weights, compute_dtype=compute).recipe.autocast
        for weights in ("fp32", "bf16")
        for compute in ("fp32", "bf16", None)
    }
    assert [pair for pair, autocast in recipes.items() if autocast] == [("fp32", "bf16")]


@pytest.mark.parametrize(
    ("place", "phase"),
    [
        ("attach", "load"), ("prepare", "prepare"), ("backward", "first_step"), ("end_step", "first_step"),
        ("begin_step", "steady"),
    ],
)  # fmt: skip
def test_memory_that_runs_out_is_a_row_that_names_its_phase(
    place: str, phase: str, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Probing is a part of `prepare`; a step is forward, backward and update."""
    usual = getattr(GrassMethod, place)

    def fails(method: Any, *given: Any, **named: Any) -> Any:
        return usual(method, *given, **named) if phase == "steady" and given[0] < 4 else full()

    monkeypatch.setattr(GrassMethod, place, fails)
    record = train(inputs, tmp_path, "grass", {"active_layers": 2, "sample_every": 3, "probe_steps": 2})
    assert record.status == "oom"
    assert record.status_why == f"in phase {phase}: CUDA out of memory. Tried to allocate 2.00 GiB."
    assert record.checkpoint is None


def test_a_method_that_trains_nothing_is_disengaged(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its losses are those of a model that stays as it was."""
    monkeypatch.setattr(Full, "set_lr_factor", lambda method, factor: method.optimizer.param_groups.clear())
    record = train(inputs, tmp_path)
    assert record.status == "disengaged"
    assert "promised 4 in every period, saw [0]" in str(record.status_why)
