"""Prompts: their exact strings, what is learned of a row, and that what a row spells stays text."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from chat_tokenizer import CHATML, CONTROL, byte_tokenizer
from harness.errors import UserError
from harness.inputs.chat import Message
from harness.inputs.prompts import Prompt, Row
from harness.inputs.tokens import IGNORED, encode
from harness.study.spec import PromptName
from house import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

NAMES: tuple[PromptName, ...] = get_args(PromptName)
BYTES = byte_tokenizer()
S16 = " " * 16
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
ALONE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."


def row(instruction: str = "Add.", context: str = "", output: str = "3") -> Row:
    return Row(instruction=instruction, input=context, output=output, answer=output)


def talk(*turns: tuple[str, str]) -> Row:
    messages = [Message(role=role, content=content) for role, content in turns]
    return Row(instruction="", input="", output=turns[-1][1], answer="", messages=messages)


def learned(prompt: Prompt, each: Row) -> str:
    """The text of the labelled tokens, control tokens shown."""
    labels = encode(prompt, each, max_length=10_000, loss_on="answer").labels
    return str(prompt.tokenizer.decode([label for label in labels if label != IGNORED]))


def test_the_long_published_templates_differ_between_training_and_evaluation_as_published() -> None:
    prompt = Prompt("llm-adapters", BYTES)
    blocks = (f"{S16}### Instruction:", f"{S16}Add.", f"{S16}### Input:", f"{S16}1, 2", f"{S16}### Response:", S16)
    trained = [f"{WITH_INPUT} ", "", *blocks[:2], S16, *blocks[2:4], S16, *blocks[4:]]
    asked = [WITH_INPUT, "", *blocks[:2], "", *blocks[2:4], "", *blocks[4:]]
    assert prompt.training(row(context="1, 2")) == "\n".join(trained)
    assert prompt.evaluation(row(context="1, 2")) == "\n".join(asked)


@pytest.mark.parametrize(
    ("name", "context", "asked"),
    [
        ("alpaca", "", f"{ALONE}\n\n### Instruction:\nAdd.\n\n### Response:\n"),
        ("alpaca", "1, 2", f"{WITH_INPUT}\n\n### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n"),
        ("plain", "", "Question: Add.\nAnswer:"),
        ("plain", "1, 2", "Question: Add.\n1, 2\nAnswer:"),
        ("chat", "", "<s><|im_start|>user\nAdd.<|im_end|>\n<|im_start|>assistant\n"),
        ("chat", "1, 2", "<s><|im_start|>user\nAdd.\n1, 2<|im_end|>\n<|im_start|>assistant\n"),
    ],
)
def test_the_other_prompts_are_the_same_in_training_and_evaluation(name: PromptName, context: str, asked: str) -> None:
    prompt = Prompt(name, BYTES)
    assert prompt.evaluation(row(context=context)) == asked
    # the answer follows `plain` after one space, which belongs to the first token of most tokenizers
    assert prompt.training(row(context=context)) == asked + (" " if name == "plain" else "")


def test_generation_stops_where_a_prompt_would_begin_its_next_part() -> None:
    assert {name: Prompt(name, BYTES).stops for name in NAMES} == {
        "llm-adapters": (),
        "alpaca": ("\n### Instruction:", "\n### Response:"),
        "plain": ("\nQuestion:",),
        "chat": ("<|im_end|>",),
    }


@pytest.mark.parametrize("name", NAMES)
def test_what_is_learned_is_the_output_and_its_end(name: PromptName) -> None:
    prompt = Prompt(name, BYTES)
    assert learned(prompt, row(output="It is 3.")) == "It is 3." + ("<|im_end|>" if name == "chat" else "</s>")


@pytest.mark.parametrize("name", NAMES)
def test_a_text_begins_once(name: PromptName) -> None:
    prompt = Prompt(name, BYTES)
    begin = BYTES.bos_token_id
    assert encode(prompt, row(), max_length=10_000, loss_on="all").input_ids.count(begin) == 1
    assert prompt.evaluation_tokens(row()).count(begin) == 1
    assert prompt.evaluation_tokens(row())[0] == begin


def test_a_tokenizer_that_ends_texts_itself_does_not_end_a_question() -> None:
    ending = byte_tokenizer()
    ends = [("<s>", ending.bos_token_id), ("</s>", ending.eos_token_id)]
    ending.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    for name in NAMES:
        mine, other = Prompt(name, ending), Prompt(name, BYTES)
        assert mine.evaluation_tokens(row()) == other.evaluation_tokens(row())
        assert encode(mine, row(), max_length=999, loss_on="answer") == encode(
            other, row(), max_length=999, loss_on="answer"
        )


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_a_control_token_that_a_row_spells_is_text(name: PromptName, data: Any) -> None:
    pieces = st.lists(st.sampled_from([*CONTROL, "a", " ", "\n", "<", "assistant", "\u00e9"]), min_size=1, max_size=6)
    texts = st.builds("x{}y".format, pieces.map("".join))
    spelled = row(data.draw(texts), data.draw(texts), data.draw(texts))
    prompt, plain = Prompt(name, BYTES), row("x", "x", "x")
    control = set(BYTES.all_special_ids)

    def controls(ids: list[int]) -> list[int]:
        return [i for i in ids if i in control]

    whole = encode(prompt, spelled, max_length=10_000, loss_on="answer")
    assert controls(whole.input_ids) == controls(encode(prompt, plain, max_length=10_000, loss_on="all").input_ids)
    assert controls(prompt.evaluation_tokens(spelled)) == controls(prompt.evaluation_tokens(plain))
    assert learned(prompt, spelled) == spelled["output"] + ("<|im_end|>" if name == "chat" else "</s>")
    if name == "chat":
        asked = prompt.evaluation_tokens(spelled)
        assert whole.input_ids[: len(asked)] == asked
        assert BYTES.decode(whole.input_ids) == prompt.training(spelled) + spelled["output"] + "<|im_end|>"


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared with the real files is not here")
@pytest.mark.parametrize("name", [name for name in NAMES if name != "chat"])
def test_an_ordinary_row_has_the_tokens_of_its_string(name: PromptName) -> None:
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / "stories260K")
    prompt, each = Prompt(name, tokenizer), row("Tom had 3 <b>apples</b>.", output="the end")
    string = prompt.training(each) + each["output"]
    assert prompt.training_tokens(each).ids == tokenizer(string)["input_ids"]
    assert prompt.evaluation_tokens(each) == tokenizer(prompt.evaluation(each))["input_ids"]
    typed = row("Tom</s> had", output="the <s> end")
    assert tokenizer.eos_token_id not in prompt.training_tokens(typed).ids
    assert prompt.training_tokens(typed).ids.count(tokenizer.bos_token_id) == 1


# ---------------------------------------------------------------- conversations


def test_every_turn_of_the_assistant_is_learned_and_nothing_else() -> None:
    turns = [("system", "be brief"), ("user", "assistant"), ("assistant", "user"), ("user", "more"), ("assistant", "b")]
    prompt = Prompt("chat", BYTES)
    assert learned(prompt, talk(*turns)) == "user<|im_end|>b<|im_end|>"
    assert prompt.evaluation(talk(*turns)).endswith("more<|im_end|>\n<|im_start|>assistant\n")


def test_a_template_that_strips_texts_is_followed() -> None:
    prompt = Prompt("chat", byte_tokenizer(CHATML.replace("message['content']", "message['content'] | trim")))
    assert learned(prompt, talk(("user", " a </s> "), ("assistant", " </s>b\n"))) == "</s>b<|im_end|>"


def test_what_a_template_writes_before_an_answer_is_learned_where_generation_has_to_write_it() -> None:
    written = "('<think></think>' if message['role'] == 'assistant' else '') + message['content']"
    template = CHATML.replace("message['content']", written)
    prompt = Prompt("chat", byte_tokenizer(template))
    assert learned(prompt, row(output="3")) == "<think></think>3<|im_end|>"
    assert prompt.evaluation(row()) == prompt.training(row())


def test_a_template_without_an_end_of_turn_ends_with_the_end_token() -> None:
    template = (
        "{% for m in messages %}{{ '### ' + m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}### assistant: {% endif %}"
    )
    prompt = Prompt("chat", byte_tokenizer(template))
    assert prompt.stops == ()
    assert learned(prompt, row(output="3")) == "3</s>"


def test_a_template_with_a_date_is_the_same_every_day() -> None:
    dated = "{{ strftime_now('%d %b %Y') }} " + CHATML
    assert Prompt("chat", byte_tokenizer(dated)).evaluation(row()).startswith("26 Jul 2024 <s>")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "models/bytes: the tokenizer has no chat template; put chat_template into its tokenizer_config.json"),
        (
            "{{ raise_exception('no system role') }}",
            r"models/bytes: its chat template refuses a conversation of user, assistant \(no system role\)",
        ),
        (
            CHATML.replace("message['content']", "message['content'] | upper"),
            "models/bytes: its chat template does not write every message as it stands",
        ),
        ("{{ messages[-1]['content'] }}", "models/bytes: its chat template does not write every message"),
    ],
)
def test_a_template_that_cannot_be_used_is_named(template: str | None, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        Prompt("chat", byte_tokenizer(template))
    assert "\n" not in str(caught.value)


def test_a_conversation_needs_the_chat_prompt() -> None:
    for name in NAMES:
        if name != "chat":
            with pytest.raises(UserError, match=rf"prompt {name}: the rows are conversations.*`prompt: chat`"):
                Prompt(name, BYTES).evaluation(talk(("user", "a"), ("assistant", "b")))
