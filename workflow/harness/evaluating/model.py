"""A loaded model as lm-eval sees it: tokens as the run's prompt has them, and memory bounded by tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from harness.progress import Progress

LOGITS_BYTES = 2**29
"""Of the logits, and of their logarithms, that one batch of answers holds at most while likelihoods are computed."""


class HarnessLM(HFLM):  # type: ignore[misc]
    """lm-eval's Hugging Face model around one that is loaded already.

    lm-eval passes prompts as text. A prompt that was announced by `ask` has the tokens given there, so that scoring and
    training read the same ones: one beginning of text, and control tokens where the template puts them, not where a
    row spells them. All other text is tokenised by lm-eval as usual.
    """

    _known: Mapping[str, list[int]] = {}
    _in_turns = False
    _plain = False
    batch_size_per_gpu: int
    cache_hook: Any
    label = "scoring"
    """Of the progress lines."""

    def ask(self, tokens: Mapping[str, list[int]], *, stops: Iterable[str], in_turns: bool) -> None:
        """Announce a suite of ours.

        Args:
            tokens: of every prompt, by its text.
            stops: texts at which an answer ends; control tokens among them end it as the end token does.
            in_turns: the prompts are conversations: an answer begins with a token of its own.
        """
        self._known, self._in_turns, self._plain = tokens, in_turns, True
        self._end_at(stops)

    def ask_as_lm_eval(self, *, stops: Iterable[str] = ()) -> None:
        """Leave prompts to lm-eval again; `stops` as for `ask`."""
        self._known, self._in_turns, self._plain = {}, False, False
        self._end_at(stops)

    def _end_at(self, stops: Iterable[str]) -> None:
        # lm-eval looks for a stop in text from which control tokens were taken out, so it would not find one there
        vocabulary = self.tokenizer.get_vocab()
        special = {str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        ends = [self.tokenizer.eos_token_id, *(vocabulary[stop] for stop in stops if stop in special)]
        self.model.generation_config.eos_token_id = list(dict.fromkeys(ends))

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids of a text."""
        ids = self._known.get(string)
        if ids is None and self._plain and add_special_tokens is None:
            ids = list(self.tokenizer(string, split_special_tokens=True)["input_ids"])
        if ids is None:
            ids = super().tok_encode(string, add_special_tokens, **kwargs)
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def tok_batch_encode(
        self, strings: list[str], padding_side: str = "left", left_truncate_len: int | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask, (texts, longest text), padded on the left."""
        if any(string not in self._known for string in strings):
            found: tuple[Tensor, Tensor] = super().tok_batch_encode(strings, padding_side, left_truncate_len, **kwargs)
            return found
        rows = [self.tok_encode(string, left_truncate_len=left_truncate_len) for string in strings]
        gaps = [max(map(len, rows)) - len(row) for row in rows]
        pad = self.tokenizer.pad_token_id
        return (
            torch.tensor([[pad] * gap + row for row, gap in zip(rows, gaps, strict=True)]),
            torch.tensor([[0] * gap + [1] * len(row) for row, gap in zip(rows, gaps, strict=True)]),
        )

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if self._in_turns and context in self._known:
            answer = self.tokenizer(continuation, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            return self._known[context], list(answer)
        pair: tuple[list[int], list[int]] = super()._encode_pair(context, continuation)
        return pair

    @contextmanager
    def _counted(self, requests: Sequence[Any]) -> Iterator[None]:
        """Show progress: lm-eval hands each answer to its cache as soon as it has it."""
        usual = self.cache_hook
        with Progress(len(requests), self.label, unit="answer") as progress:
            self.cache_hook = _Counter(progress, usual)
            try:
                yield
            finally:
                self.cache_hook = usual

    # Without lm-eval's bars: only this argument switches them off, and `lm_eval.evaluate` does not pass it.

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
        """What the model writes."""
        with self._counted(requests):
            answers: list[str] = super().generate_until(requests, disable_tqdm=True)
        return answers

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Summed log-probability of each continuation, in nats, and whether it is the greedy one."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
        """Log-probability of each whole text, in nats."""
        found: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        longest = max(len(context) + len(answer) for _, context, answer in requests)
        row_bytes = 2 * longest * self.model.config.get_text_config().vocab_size * 4
        given: int = self.batch_size_per_gpu
        self.batch_size_per_gpu = max(1, min(given, LOGITS_BYTES // row_bytes))
        try:
            with self._counted(requests):
                found: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, *args, **kwargs)
        finally:
            self.batch_size_per_gpu = given
        return found


@dataclass
class _Counter:
    """Stands before lm-eval's cache, and counts what passes."""

    progress: Progress
    cache: Any

    def add_partial(self, *answer: Any) -> None:
        self.cache.add_partial(*answer)
        self.progress.advance()
