"""`python -m harness advise`: the answer first, then what does not fit and why; kept forecasts; code that runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bare_machine import modules_beside, without
from forecast_cells import SETTINGS, STUDY, small
from harness.__main__ import main
from harness.checking.tiny import tiny_inputs
from harness.efficiency import forecasts
from harness.efficiency.advice import Advice, Option
from harness.efficiency.forecasts import make_forecast
from harness.efficiency.jobs import Job, Reply
from harness.efficiency.record import ForecastRecord, Named
from harness.forecasting.needed import needed_bytes
from harness.forecasting.snippets import snippet
from harness.records.units import GIB
from harness.step.spec import Cell
from model_hub import Hub, running


class Here:
    """In the place of a process that makes forecasts: what a process does is tested with those that measure."""

    def __init__(self, visible: str | None) -> None:
        pass

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, job: Job, limit_s: float) -> Reply:
        return make_forecast(job)


@pytest.fixture(autouse=True)
def _forecast_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecasts, "Worker", Here)


def advise(folder: Path, capsys: pytest.CaptureFixture[str], **words: str) -> tuple[int, str, str]:
    config = folder / "mine.yaml"
    config.write_text(STUDY, encoding="utf-8")
    asked = {"model": "small", "vram": "1GiB", "length": "16", "cores": "1", "out": str(folder / "advice")} | words
    given = [word for name, value in asked.items() for word in (f"--{name}", value)]
    code = main(["advise", "--config", str(config), *given])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_answer_comes_first_then_what_has_no_forecast_then_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = advise(tmp_path, capsys)
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == "small: one step of 1 x 16 tokens on a card of 1.00 GiB"
    assert lines[1] == "the fastest that fits: uniform, lean; its code stands below"
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.startswith(("  full", "  uniform"))}
    assert list(rows) == ["uniform", "full"]
    assert rows["full"] == ["lean", "1.00", "0.60"]
    assert float(rows["uniform"][1]) > 1
    assert "\nno forecast\n  lora: rank 64 is above the model's width 32\n" in out
    assert "# uniform, lean\n" in out
    assert "optimizer = Grass(model, lr=1e-05, active_layers=1, sampler='uniform', offload='auto'" in out

    code, out, _ = advise(tmp_path, capsys, vram="1MiB")
    assert code == 0
    assert "nothing fits: the least is 0.60 GiB, of " in out
    assert "\ndoes not fit, smallest first\n" in out
    assert "import torch" not in out


def test_forecasts_are_kept_by_content_and_made_again_for_another_question(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import BloomConfig

    def records() -> int:
        return len(list((tmp_path / "advice" / "records").glob("*.json")))

    for name in ("one", "two"):
        BloomConfig(vocab_size=96, hidden_size=32, n_layer=4, n_head=4).save_pretrained(tmp_path / name / "bloom")
    code, first, _ = advise(tmp_path, capsys, model=str(tmp_path / "one" / "bloom"))
    assert (code, records()) == (0, 3)
    monkeypatch.setattr("harness.efficiency.advice.fill_forecasts", lambda *_, **__: pytest.fail("made again"))
    # another path with the same configuration, the mirror of the hub
    monkeypatch.setenv("MIRROR", str(tmp_path))
    _, second, _ = advise(tmp_path, capsys, model="two/bloom")
    assert second == first.replace(str(tmp_path / "one" / "bloom"), "two/bloom")
    with pytest.raises(pytest.fail.Exception):
        advise(tmp_path, capsys, model="two/bloom", vram="2GiB")  # `offload: auto` depends on the card
    assert len(list((tmp_path / "advice" / "models").iterdir())) == 1


def test_a_model_that_nothing_can_be_forecast_of_is_not_said_to_be_too_large(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"model_type": "no-such-type"}', encoding="utf-8")
    code, out, _ = advise(tmp_path, capsys, model=str(tmp_path / "odd"))
    assert code == 0
    assert "nothing could be forecast, so nothing is known of what fits; the reasons:" in out
    assert out.count("no-such-type") == 1, "one reason for all methods is told once"
    assert "full, lora, uniform: " in out
    assert "nothing fits" not in out


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("smal", "--model smal: it is one of small (or a folder with a config.json, or <org>/<name> of the hub); did"),
        ("none/such", "--model none/such: there is no such folder; as a repository of the hub, MIRROR="),
    ],
)
def test_a_model_that_is_not_there_is_one_line(
    model: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIRROR", str(tmp_path))
    code, out, err = advise(tmp_path, capsys, model=model)
    assert (code, out) == (2, "")
    assert err.startswith(f"harness advise: {said}")
    assert err.count("\n") == 1


FETCH = """
from harness.errors import UserError
from harness.inputs.hub_models import find_configuration
for repo in ("org/open", "org/weights", "org/gated", "org/absent"):
    try:
        print(sorted(path.name for path in find_configuration(repo).iterdir()))
    except UserError as error:
        print(error)
"""


def test_of_a_repository_the_configuration_alone_is_fetched_and_kept(tmp_path: Path) -> None:
    config = {"config.json": b"{}", "model.safetensors": b"weights"}
    files = {"org/open": config, "org/weights": {"model.safetensors": b"weights"}, "org/gated": config}
    hub = Hub(files, gated=frozenset({"org/gated"}))
    with running(hub):
        environment = os.environ | {"HF_HOME": str(tmp_path), "HF_ENDPOINT": hub.address, "MIRROR": ""}
        said = [
            subprocess.run(
                [sys.executable, "-c", FETCH], env=environment | more, capture_output=True, text=True, check=True
            ).stdout.splitlines()
            for more in ({}, {"HF_HUB_OFFLINE": "1"})
        ]
    assert [lines[0] for lines in said] == ["['config.json']"] * 2
    assert said[0][1] == "org/weights: no config.json in it; name a repository of a transformers model"
    assert said[0][2].startswith("org/gated at main: gated by its licence; accept it on https://huggingface.co/org/")
    assert said[0][3].startswith("org/absent at main: not on the hub, or closed to you")
    assert "the hub cannot be reached" in said[1][1]
    assert "set MIRROR=<folder with org/weights/ in it>, or give the model's folder" in said[1][1]


# ------------------------------------------------------------ the order, by arithmetic


def option(method: str, settings: str, *, gib: float | None, speed: float = 1.0) -> Option:
    cell = small("full", "lean")
    record = ForecastRecord(
        cell=Named(model="m", settings=settings, shape="1x1", method=method),
        status="impossible" if gib is None else "ok",
        status_why="none" if gib is None else None,
        peak_bytes=None if gib is None else round(gib * GIB),
        bound_tokens_per_s=None if gib is None else speed,
        wall_s=0.0, packages={}, asked_sha256="", code_sha256="",
    )  # fmt: skip
    return Option(method, settings, cell, record, record.status_why)


def test_each_method_stands_once_by_its_fastest_setting_that_fits() -> None:
    found = Advice(
        10 * GIB,
        (
            option("slow", "plain", gib=5, speed=1.0),
            option("fast", "plain", gib=12, speed=9.0),
            option("fast", "lean", gib=6, speed=4.0),
            option("equal", "plain", gib=4, speed=4.0),
            option("large", "plain", gib=30, speed=9.0),
            option("large", "lean", gib=20, speed=8.0),
            option("larger", "plain", gib=25, speed=8.0),
            option("odd", "plain", gib=None),
        ),
    )
    assert [(o.method, o.settings) for o in found.fitting] == [("equal", "plain"), ("fast", "lean"), ("slow", "plain")]
    assert [(o.method, o.settings) for o in found.too_large] == [("large", "lean"), ("larger", "plain")]
    assert {why: [o.method for o in options] for why, options in found.reasons.items()} == {"none": ["odd"]}
    edge = needed_bytes(5 * GIB)
    assert (option("x", "plain", gib=5).fits(edge), option("x", "plain", gib=5).fits(edge - 1)) == (True, False)


# ------------------------------------------------------------ the code

SHARED = {"plain": ["full", "lora", "grass-move"], "lean": ["full", "lora", "decoder-move"]}
OTHERS: dict[str, dict[str, Any]] = {
    "dora": {"rank": 4, "alpha": 8},
    "lisa": {"active_layers": 2},
    "badam": {"sample_every": 2},
    "ist": {"rank": 4, "alpha": 8},
    "ows": {"active_layers": 2, "calibration_rows": 2},
    "speft": {"density": 0.05, "calibration_rows": 2},
}


def code_for(cell: Cell, model: Path) -> str:
    return snippet(cell, model=str(model)).replace('"cuda"', '"cpu"').replace("'cuda'", "'cpu'")


def test_code_of_a_public_library_runs_without_this_project(tmp_path: Path) -> None:
    """Each script in a process of its own, in which neither harness nor baselines can be imported."""
    model = tiny_inputs(tmp_path).model
    scripts = [code_for(small(method, settings), model) for settings in SETTINGS for method in SHARED[settings]]
    scripts.append(
        code_for(small("lora", "lean").model_copy(update={"module": "dora", "options": OTHERS["dora"]}), model)
    )
    block = "import sys\nsys.modules['harness'] = sys.modules['baselines'] = None\n"
    body = "".join(f"exec({script!r}, {{'__name__': 'alone'}})\n" for script in scripts)
    done = subprocess.run(
        [sys.executable, "-c", block + body], env=without(modules_beside(("torch", "transformers", "peft")), tmp_path),
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not any("harness" in script or "baselines" in script for script in scripts)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("module", OTHERS)
def test_code_of_every_other_method_trains_without_the_harness(module: str, settings: str, tmp_path: Path) -> None:
    model = tiny_inputs(tmp_path).model
    cell = small("full", settings).model_copy(update={"module": module, "options": OTHERS[module]})
    text, names = code_for(cell, model), {}
    assert "harness" not in text
    exec(text, names)
    from transformers import AutoModelForCausalLM

    before = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).state_dict()
    after = names["model"].state_dict()
    assert any(not torch.equal(value, after[key]) for key, value in before.items() if key in after) or any(
        value.any() for key, value in after.items() if "lora_B" in key
    )
