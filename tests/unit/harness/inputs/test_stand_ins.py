"""Stand-ins: small random models that keep what is peculiar to a real model's architecture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from harness.errors import UserError
from harness.inputs.models import load_model, load_tokenizer
from harness.inputs.stand_ins import write_stand_in
from harness.inputs.tokenizer import build_tokenizer
from harness.step.facts import layers_of

LARGE: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**LARGE, "tie_word_embeddings": False}),
    "qwen2": ("Qwen2Config", {**LARGE, "tie_word_embeddings": True}),
    "gemma": (
        "GemmaConfig",
        {**LARGE, "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256, "tie_word_embeddings": True},
    ),
    "gemma3": ("Gemma3TextConfig", {**LARGE, "head_dim": 256, "tie_word_embeddings": True}),
    "mixtral": ("MixtralConfig", {**LARGE, "num_local_experts": 4}),
    "gpt2": ("GPT2Config", {"n_embd": 768, "n_layer": 12, "n_head": 12}),
    "opt": ("OPTConfig", {"hidden_size": 512, "ffn_dim": 2048, "num_hidden_layers": 24, "word_embed_proj_dim": 512}),
}


def published(folder: Path, family: str, **changes: Any) -> Path:
    """A folder with a large model's configuration and a tokenizer, and no weights."""
    name, settings = FAMILIES[family]
    tokenizer = build_tokenizer()
    config = getattr(transformers, name)(**{**settings, "vocab_size": len(tokenizer), **changes})
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_small_loads_and_keeps_what_is_peculiar(family: str, tmp_path: Path) -> None:
    source, target = published(tmp_path / "source", family), tmp_path / "target"
    large = transformers.AutoConfig.from_pretrained(source)
    count = write_stand_in(source, target)
    model: Any = load_model(target, weight_dtype="bf16")
    small = model.config
    assert count == model.num_parameters() < 2_000_000
    assert len(layers_of(model).layers) == 6
    for name in ("model_type", "vocab_size", "tie_word_embeddings", "num_local_experts", "sliding_window"):
        assert getattr(small, name, None) == getattr(large, name, None), name
    assert load_tokenizer(target).get_vocab() == load_tokenizer(source).get_vocab()
    if family == "gemma":
        assert (small.num_key_value_heads, small.head_dim * small.num_attention_heads) == (1, small.hidden_size)
    if family == "gemma3":
        # wider heads than the width has room for, and layers of two kinds
        assert small.head_dim * small.num_attention_heads > small.hidden_size
        assert small.layer_types == large.layer_types[:6]


def test_it_is_the_same_at_every_time(tmp_path: Path) -> None:
    source = published(tmp_path / "source", "llama")
    for name in ("a", "b"):
        write_stand_in(source, tmp_path / name)
    a, b = (sorted((tmp_path / name).iterdir()) for name in ("a", "b"))
    assert [path.read_bytes() for path in a] == [path.read_bytes() for path in b]


def test_files_that_scoring_reads_come_along_and_weights_lists_do_not(tmp_path: Path) -> None:
    source = published(tmp_path / "source", "llama")
    (source / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "do_sample": True}))
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "absent.safetensors"}}))
    write_stand_in(source, tmp_path / "target")
    assert "0.6" in (tmp_path / "target" / "generation_config.json").read_text()
    assert not (tmp_path / "target" / "model.safetensors.index.json").exists()


def test_what_cannot_be_made_small_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "no-such-family"}))
    with pytest.raises(UserError, match=r"no small model of this config\.json can be made") as raised:
        write_stand_in(folder, tmp_path / "target")
    assert len(str(raised.value).splitlines()) == 1
