"""Models whose layers cannot be told are refused with a sentence that is true of a study."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from harness.errors import UserError
from harness.inputs.make_models import make_model
from harness.step.facts import facts_of, unreached_as_buffers
from harness.step.outcomes import CannotRunError
from harness.study.jobs import ModelJob
from harness.study.sources import LocalModel
from transformers import GitConfig, GitForCausalLM

from grass import find_layers

SAID = (
    # a message for the user loses its middle where it is long
    r"more than one stack could be the decoder \(git\.image_encoder\.vision_model\.encoder\.layers .*"
    r"\): studies and forecasts take models whose text goes through one stack of layers; Grass "
    r"and Audit take layers= in a script of your own$"
)


def of_two_stacks() -> torch.nn.Module:
    """GIT: its image encoder lies in the module that it calls its decoder, so that nothing says which is the text's."""
    small = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config = GitConfig(
        vocab_size=64, num_hidden_layers=3, bos_token_id=1, eos_token_id=2, **small,
        vision_config={"num_hidden_layers": 2, "image_size": 28, "patch_size": 14, **small},
    )  # fmt: skip
    model: torch.nn.Module = GitForCausalLM(config)
    return unreached_as_buffers(model, as_built=model)


def test_a_model_of_two_stacks_is_refused_by_studies_and_taken_by_the_library() -> None:
    model = of_two_stacks()
    with pytest.raises(CannotRunError, match=f"^{SAID}"):
        facts_of(model)
    assert len(find_layers(model, layers="git.encoder.layer").layers) == 3


def test_prefetch_refuses_it_before_anything_is_trained(tmp_path: Path) -> None:
    folder = tmp_path / "given"
    of_two_stacks().save_pretrained(folder)  # type: ignore[operator]
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    job = ModelJob(label="local", source=LocalModel(kind="local", path=str(folder)))
    with pytest.raises(UserError, match=f"^{folder}: {SAID}"):
        make_model(job, tmp_path / "m")
    assert not (tmp_path / "m").exists()
