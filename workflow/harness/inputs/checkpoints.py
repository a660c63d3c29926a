"""Does a checkpoint hold what its architecture has? transformers only warns, and draws what is missing at random."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers.utils import logging

from harness.errors import UserError, first_line
from harness.step.architecture import asked_attention
from harness.step.model_classes import AutoConfig, AutoModelForCausalLM

_WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "_fsdp_wrapped_module.": "FSDP",
    "base_model.model.": "peft",
    "module.": "DistributedDataParallel",
}
"""What wrappers put into the keys if their own state is saved instead of the model's."""


def complaint(model: nn.Module, info: Mapping[str, Collection[Any]]) -> str | None:
    """What a checkpoint lacks, has beside the architecture or in another shape, with the mend; None if it fits.

    Args:
        model: loaded from it.
        info: what transformers says of the loading (`output_loading_info`): keys that it ignores by itself, such as
            tied heads and buffers that are computed, are not in it.
    """
    missing, beside = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if shapes := sorted(info["mismatched_keys"]):
        key, there, wanted = shapes[0]
        return (
            f"{_count(shapes)} of another shape than config.json says, first {key}: {_shape(there)} in the checkpoint, "
            f"{_shape(wanted)} in the architecture; take the config.json that belongs to these weights"
        )
    if missing or beside:
        lacks = f"lacks {_count(missing)} of the architecture, first {missing[0]}" if missing else ""
        has = f"holds {_count(beside)} that the architecture has not, first {beside[0]}" if beside else ""
        return f"the checkpoint {' and '.join(filter(None, [lacks, has]))}; {_mend(missing, beside)}"
    if errors := info["error_msgs"]:
        return f"its weights cannot be loaded ({first_line(ValueError(next(iter(errors))))}); fetch them again"
    return _untied(model)


def check_checkpoint(folder: Path, *, asked: str) -> nn.Module:
    """The model of a folder without its values, on the `meta` device, once its checkpoint is known to fit.

    transformers resolves files and renames keys as it does when it loads. Tensors are read one by one and dropped.

    Args:
        folder: in Hugging Face layout.
        asked: that folder as the user wrote it, for the message.

    Raises:
        UserError: the folder makes no causal language model, or its checkpoint does not fit; one line.
    """
    try:
        model, info = load_with_info(folder, device_map="meta", ignore_mismatched_sizes=True)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise UserError(
            f"{asked}: transformers makes no causal language model of it ({first_line(error)}); give the folder of one"
        ) from error
    if why := complaint(model, info):
        raise UserError(f"{asked}: {why}")
    return model


def load_with_info(folder: Path, **settings: Any) -> tuple[nn.Module, dict[str, Any]]:
    """A causal language model, and what transformers says of its loading; `settings` as for `from_pretrained`.

    Its own report of that is not printed: whoever calls this judges it, see `complaint`.
    """
    with quiet():
        config = AutoConfig.from_pretrained(folder)
        found: tuple[nn.Module, dict[str, Any]] = AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, **{"attn_implementation": asked_attention(config), **settings}
        )
    return found


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' warnings, where what they would say is judged and said by the caller."""
    usual = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(usual)


def _untied(model: nn.Module) -> str | None:
    """A head that config.json ties to the embedding, and that the checkpoint holds with other values.

    transformers then leaves it untied. On the `meta` device there are no values to tell by.
    """
    config: Any = model.config
    embedding, head = (_weight(model, f"get_{side}_embeddings") for side in ("input", "output"))
    tied = getattr(config.get_text_config(), "tie_word_embeddings", False)
    if not tied or embedding is None or head is None or embedding is head or head.is_meta:
        return None
    return (
        "config.json says tie_word_embeddings, and the checkpoint holds a head that differs from the embedding; set "
        "tie_word_embeddings to false in config.json, or remove the head from the checkpoint"
    )


def _weight(model: nn.Module, getter: str) -> Any:
    module = getattr(model, getter)()
    return getattr(module, "weight", None)


def _mend(missing: Sequence[str], beside: Sequence[str]) -> str:
    """How keys that do not meet can be made to."""
    for part, writer in _WRAPPERS.items():
        if {key.replace(part, "") for key in beside} & set(missing):
            return f"rename its keys without {part}, which {writer} puts there"
    if added := _prefix(beside, missing):
        return f"rename its keys without the prefix {added}"
    if lacked := _prefix(missing, beside):
        return f"rename its keys, with {lacked} before each"
    return "take the config.json that belongs to these weights, or save the weights again from the model itself"


def _prefix(long: Sequence[str], short: Sequence[str]) -> str | None:
    """The prefix that turns the `short` keys into `long` ones; None where there is not one for all."""
    ends = set(short)
    found = {key[:at] for key in long for at in range(1, len(key)) if key[at - 1] == "." and key[at:] in ends}
    return found.pop() if len(found) == 1 else None


def _count(keys: Sequence[Any]) -> str:
    return f"{len(keys)} tensor{'s' if len(keys) > 1 else ''}"


def _shape(size: Iterable[int]) -> str:
    return "(" + ", ".join(map(str, size)) + ")"
