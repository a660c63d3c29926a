"""A run whose moments will not fit the host is refused before it begins, and not after a thousand steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness.checking.tiny import LR, tiny_inputs, tiny_training
from harness.measuring.host import free_bytes
from harness.step.attach import attach, new_method
from harness.training import loop
from harness.training.host_room import too_little_host_memory, visited_state_bytes
from harness.training.loading import Inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return tiny_inputs(tmp_path_factory.mktemp("tiny"))


def train(inputs: Inputs, folder: Path, module: str, options: dict[str, Any], **recipe: Any) -> Any:
    return loop.train(
        tiny_training(module, options, **recipe), name="r", lr=LR, lr_searched=False, seed=0, inputs=inputs,
        folder=folder, state_folder=folder / "state", observation=None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("module", "options"),
    [
        ("grass", {"active_layers": 2, "sample_every": 2, "probe_steps": 2, "sampler": "cyclic"}),
        ("lisa", {"active_layers": 2, "sample_every": 2, "state": "keep"}),
    ],
)
def test_what_is_needed_is_what_a_run_holds_once_every_layer_was_drawn(
    module: str, options: dict[str, Any], inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed: list[int | None] = []
    usual = loop.too_little_host_memory

    def noted(run: Any, *args: Any, **kwargs: Any) -> str | None:
        needed.append(visited_state_bytes(run.promise, run.facts))
        return usual(run, *args, **kwargs)

    monkeypatch.setattr(loop, "too_little_host_memory", noted)
    record = train(inputs, tmp_path, module, options, steps=16)
    assert record.status == "ok"
    (moments,) = needed
    assert moments is not None
    # beside its moments GRASS holds a few numbers a layer
    assert 0 <= record.memory.state_peak_bytes - moments < 256


def test_a_run_without_room_is_a_row_that_says_how_much_it_needs(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "free_bytes", lambda: 1000)
    keeps = {"active_layers": 2, "sample_every": 2, "state": "keep"}
    record = train(inputs, tmp_path / "keep", "lisa", keeps)
    assert record.status == "skipped"
    assert record.status_why.startswith(
        "too little host memory: once every layer was drawn, the optimizer's state takes"
    )
    assert train(inputs, tmp_path / "reset", "lisa", keeps | {"state": "reset"}).status == "ok"
    assert train(inputs, tmp_path / "full", "full", {}).status == "ok"


def test_on_a_gpu_only_what_is_sure_to_sleep_on_the_host_is_counted(inputs: Inputs) -> None:
    from harness.inputs.models import load_model

    refused = {}
    for offload in ("auto", "resident", "move"):
        training = tiny_training("grass", {"active_layers": 2, "sample_every": 2, "offload": offload})
        method = new_method("grass", training.options, recipe=training.recipe, lr=LR, seed=0)
        run = attach(method, load_model(inputs.model, weight_dtype="fp32"))
        refused[offload] = [
            too_little_host_memory(run, "cuda", processes=processes, free=free) is not None
            for processes, free in ((1, 1000), (1, None), (1, 10**9), (10**6, 10**9))
        ]
    assert refused == {"auto": [False] * 4, "resident": [False] * 4, "move": [True, False, False, True]}


def test_what_is_free_is_within_the_control_groups_limit(tmp_path: Path) -> None:
    proc, groups, memory = tmp_path / "proc", tmp_path / "groups", tmp_path / "meminfo"
    (groups / "job").mkdir(parents=True)
    proc.mkdir()
    memory.write_text("MemTotal: 2000 kB\nMemAvailable: 1000 kB\n")
    (proc / "cgroup").write_text("0::/job\n")
    assert free_bytes(proc, groups, memory) == 1000 * 1024
    for name, text in (("max", "500000\n"), ("current", "300000\n"), ("stat", "anon 1\ninactive_file 50000\n")):
        (groups / "job" / f"memory.{name}").write_text(text)
    assert free_bytes(proc, groups, memory) == 250_000
    (groups / "job" / "memory.max").write_text("max\n")
    assert free_bytes(proc, groups, memory) == 1000 * 1024
    assert free_bytes(proc, groups, tmp_path / "absent") is None
