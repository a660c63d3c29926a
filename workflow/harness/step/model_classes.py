"""transformers' classes of models, imported without scikit-learn.

transformers imports it, and with it scipy's statistics, for assisted decoding, which nothing here uses: two of the six
processor seconds that a training process needs before its first step.
"""

from __future__ import annotations

import sys
from importlib import import_module

_UNUSED, _USER = "sklearn", "transformers.generation.candidate_generator"

if _UNUSED in sys.modules:
    import_module(_USER)
else:
    # a module that is None counts as not installed
    sys.modules[_UNUSED] = None  # type: ignore[assignment]
    try:
        import_module(_USER)
    finally:
        del sys.modules[_UNUSED]

from transformers import (  # noqa: E402
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

__all__ = ["AutoConfig", "AutoModelForCausalLM", "AutoTokenizer", "GenerationConfig", "LlamaConfig", "LlamaForCausalLM"]
