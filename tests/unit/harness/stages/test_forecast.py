"""`python -m harness forecast` and `advise`: what they print, what they refuse, and the code they recommend."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from forecast_cells import SMALL, STUDY, small
from harness.__main__ import main
from harness.efficiency.spec import load_efficiency
from harness.errors import UserError
from harness.forecasting.forecast import NoForecastError, forecast
from harness.records.units import parse_bytes
from harness.step.cell import build_model
from harness.study.strict_yaml import ConfigError
from house import ROOT
from torch import Tensor

from baselines.method import StepFacts


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(STUDY, encoding="utf-8")
    return str(path)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(list(words))
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_forecast_is_a_table(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(
        capsys, "forecast", "--config", config, "--model", "small", "--method", "uniform", "--settings", "lean",
        "--length", "16", "--active-layers", "2",
    )  # fmt: skip
    assert code == 0
    assert out.startswith("small, uniform, lean, 1 x 16 tokens, active layers 2\n  peak 0.00 GiB (")
    assert "worst draw: layers" in out
    for word in ("probe", "resample", "forward", "backward", "update", "weights", "gradients", "optimizer states"):
        assert word in out


def test_json_holds_bytes_as_integers(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", config, "--model", "small", "--method", "full", "--settings", "lean", "--length", "16"]
    code, out, _ = run(capsys, "forecast", *words, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["no_forecast"] is None
    assert found["peak_bytes"] == max(bytes_ for phase, bytes_ in found["by_phase"].items() if phase != "load")
    assert found["peak_bytes"] == sum(found["by_kind"].values())
    assert found["worst_draw"] is None
    assert found["cell"]["shape"] == {"batch": 1, "length": 16}
    assert found["parameters"] == found["trainable_parameters"] == 49440


def test_a_refusal_is_an_answer(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", config, "--model", "small", "--method", "lora", "--settings", "lean"]
    code, out, _ = run(capsys, "forecast", *words)
    assert (code, out) == (0, "no forecast: rank 64 is above the model's width 32\n")
    code, out, _ = run(capsys, "forecast", *words, "--json")
    found = json.loads(out)
    assert (code, found["no_forecast"]) == (0, "rank 64 is above the model's width 32")
    assert found["peak_bytes"] is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            ("--model", "smal"),
            "--model smal: it is one of small (or a folder with a config.json, or <org>/<name> of the hub); did you",
        ),
        (("--method", "fulll"), "--method fulll: it is one of full, lora, uniform; did you mean full?"),
        (("--settings", "plain"), "--settings plain: it is one of lean"),
        (("--active-layers", "2"), "the method full has no option active_layers (it has none)"),
        (("--length", "1"), "--length 1: must be at least 2"),
        (("--config", "no.yaml"), "no.yaml: no such file"),
        (("--model", "."), "--model .: no config.json there; give the folder of a model in Hugging Face layout"),
    ],
)
def test_a_wrong_word_is_named_in_one_line(
    config: str, change: tuple[str, str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {"--config": config, "--model": "small", "--method": "full", "--settings": "lean", **dict([change])}
    code, out, err = run(capsys, "forecast", *(word for pair in words.items() for word in pair))
    assert (code, out) == (2, "")
    assert err.startswith(f"harness forecast: {said}")
    assert err.count("\n") == 1


def test_an_option_of_a_method_is_checked_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(STUDY.replace("rank: 64", "rnk: 64"), encoding="utf-8")
    with pytest.raises(
        ConfigError, match=r"mine\.yaml:17: methods\.lora\.options\.rnk: unknown key; did you mean 'rank'"
    ):
        load_efficiency(path)


def test_a_geometry_with_another_number_of_parameters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match="the llama geometry of 3 layers of width 32 makes 38,624 parameters, and its `parameters` says 7",
    ):
        build_model(SMALL.model_copy(update={"parameters": 7}), weight_dtype="bf16", device="meta")


def test_reading_a_study_needs_no_torch() -> None:
    code = (
        "import sys; from pathlib import Path; from harness.efficiency.spec import load_efficiency; "
        "load_efficiency(Path('config/efficiency.yaml')); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# ------------------------------------------------------------ methods that cannot be forecast


def test_a_method_that_reads_a_number_by_itself_cannot_be_forecast() -> None:
    def end_step(method: Any, replay: Callable[[], Iterator[Tensor]]) -> StepFacts:
        return StepFacts(grad_norm=float(next(method.model.parameters()).grad.norm()), clipped=False)

    with (
        patch("baselines.full.Full.end_step", end_step, create=True),
        pytest.raises(NoForecastError, match=r"^test_forecast\.py, line \d+: .*reads numbers through"),
    ):
        forecast(small("full", "plain"))


def test_a_method_that_draws_by_itself_cannot_be_forecast() -> None:
    def begin_step(method: Any, step: int) -> None:
        method.active = (0, 1)
        method._freeze()

    with (
        patch("baselines.lisa.Lisa.begin_step", begin_step),
        pytest.raises(NoForecastError, match=r"draw through grass\.sampling\.draw_layers"),
    ):
        forecast(small("lisa", "plain"))


def test_a_model_that_its_loss_refuses_cannot_be_forecast(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import Gemma2Config

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    Gemma2Config(vocab_size=96, num_key_value_heads=1, head_dim=16, **sizes).save_pretrained(tmp_path)
    words = ["--config", str(ROOT / "config/efficiency.yaml"), "--model", str(tmp_path), "--method", "full"]
    code, out, _ = run(capsys, "forecast", *words, "--settings", "lean", "--length", "16")
    assert code == 0
    assert out.startswith("no forecast: Gemma2ForCausalLM changes its logits after the head")
    code, out, _ = run(capsys, "forecast", *words, "--length", "16")
    assert code == 0
    assert "peak 0.00 GiB" in out


@pytest.mark.parametrize(("family", "said"), [("bloom", "BloomForCausalLM has no SDPA"), ("opt", "scaled_dot_product")])
def test_models_of_other_kinds_are_forecast_to_the_byte(family: str, said: str, tmp_path: Path) -> None:
    """BLOOM has no SDPA; OPT draws a number a layer and reads it."""
    from transformers import AutoConfig

    sizes: dict[str, Any] = {
        "bloom": {"hidden_size": 32, "n_layer": 3, "n_head": 4},
        "opt": {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_dim": 48},
    }[family]
    AutoConfig.for_model(family, vocab_size=96, **sizes).save_pretrained(tmp_path)
    cell = small("full", "plain").model_copy(update={"model": tmp_path})
    found, real = forecast(cell), forecast(cell, tensors="real")
    assert (found.peak_bytes, found.by_phase, found.by_kind) == (real.peak_bytes, real.by_phase, real.by_kind)
    assert any(said in line for line in found.assumed)


def test_auto_offload_follows_the_cards_memory() -> None:
    cell = small("decoder-move", "lean").with_options(offload="auto")
    assert forecast(cell).device_state_bytes == 0
    assert forecast(cell.model_copy(update={"capacity_bytes": 2**30})).device_state_bytes > 0


@pytest.mark.parametrize(
    ("text", "nbytes"), [("24GiB", 24 * 2**30), ("24 GB", 24 * 10**9), ("512MiB", 2**29), ("1.5GiB", 3 * 2**29)]
)
def test_memory_is_given_with_its_unit(text: str, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["24", "24G", "GiB", "-1GiB", "0GiB", ""])
def test_memory_without_a_unit_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="write a number and one of GiB, MiB, GB, MB, as in 24GiB"):
        parse_bytes(text)
