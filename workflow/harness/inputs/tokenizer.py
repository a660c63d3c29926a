"""Word-level tokenizer of the embedded study, made from the generator's own words.

A word, a number from 0 to 40 and a punctuation mark are one token each; the fixed phrases of the template and of the
questions are one token as a whole, so that the exact published template costs four tokens. White space only
separates: the training and the evaluation template give the same tokens.
"""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from harness.inputs import generated, prompts

PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"

_PHRASES = (
    prompts.TASK_SENTENCE,
    prompts.INSTRUCTION_MARK,
    prompts.RESPONSE_MARK,
    generated.ASKED,
    generated.CHOICE_OPENING,
    generated.CHOICE_OPTIONS,
    generated.CHOICE_FORMAT,
    generated.CHOICE_OUTPUT,
)
# "answer3" stays whole; a number is one piece and every mark its own.
_PIECE = r"[A-Za-z]+[0-9]*|[0-9]+|[^\sA-Za-z0-9]"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer, with pad id 0 as in the protocol, padding side left, a start token before every text.

    Decoding puts one space between tokens ("8 - 2 = 6 ."), on which the extraction rules for numbers and answers work.
    """
    special = [PAD, BOS, EOS, UNK]
    vocabulary = {token: i for i, token in enumerate([*special, *generated.words()])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    core.normalizer = normalizers.Replace(Regex(r"\s+"), " ")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(Regex(_PIECE), behavior="isolated"),
        ]
    )
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    # Matched in the raw text before words are split; they swallow the white space around them.
    core.add_tokens([AddedToken(phrase, lstrip=True, rstrip=True, normalized=False) for phrase in _PHRASES])
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
