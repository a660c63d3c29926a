"""Old name of `harness.step.loss`, for scripts written before 0.2; it goes with the release after that."""

from __future__ import annotations

import warnings

from harness.step.loss import chunked_token_loss, label_tokens, token_loss

__all__ = ["chunked_token_loss", "label_tokens", "token_loss"]

warnings.warn(
    "harness.training.loss is harness.step.loss now, and the old name goes with the next release",
    DeprecationWarning,
    stacklevel=2,
)
