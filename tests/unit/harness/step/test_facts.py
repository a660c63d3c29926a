"""Models whose layers cannot be told are refused with a sentence that is true of a study."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from harness.errors import UserError
from harness.inputs.make_models import make_model
from harness.step.facts import facts_of
from harness.step.outcomes import CannotRunError
from harness.study.jobs import ModelJob
from harness.study.spec import LocalModel
from transformers import AutoModelForCausalLM, Gemma3Config

from grass import find_layers

SAID = (
    r"more than one stack could be the decoder \(model\.vision_tower\.encoder\.layers .*, "
    r"model\.language_model\.layers .*\): studies and forecasts take language models with one stack of layers; Grass "
    r"and Audit take layers= in a script of your own$"
)


def towers() -> torch.nn.Module:
    """A vision-language model, as `AutoModelForCausalLM` makes of Gemma 3."""
    text = {"vocab_size": 64, "num_hidden_layers": 3, "num_key_value_heads": 1, "head_dim": 8}
    vision = {"num_hidden_layers": 2, "image_size": 28, "patch_size": 14}
    for part in (text, vision):
        part |= {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    tokens = {"image_token_index": 63, "boi_token_index": 62, "eoi_token_index": 61, "mm_tokens_per_image": 4}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: torch.nn.Module = AutoModelForCausalLM.from_config(
            Gemma3Config(text_config=text, vision_config=vision, **tokens)
        )
    return model


def test_a_model_of_two_towers_is_refused_by_studies_and_taken_by_the_library() -> None:
    model = towers()
    with pytest.raises(CannotRunError, match=f"^{SAID}"):
        facts_of(model)
    assert len(find_layers(model, layers="language_model.layers").layers) == 3


def test_prefetch_refuses_it_before_anything_is_trained(tmp_path: Path) -> None:
    folder = tmp_path / "given"
    towers().save_pretrained(folder)  # type: ignore[operator]
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    job = ModelJob(label="local", source=LocalModel(kind="local", path=str(folder)))
    with pytest.raises(UserError, match=f"^{folder}: {SAID}"):
        make_model(job, tmp_path / "m")
    assert not (tmp_path / "m").exists()
