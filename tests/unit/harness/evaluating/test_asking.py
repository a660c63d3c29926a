"""How test rows are put to a model: prompts by name, worked examples, and the tokens that lm-eval sends."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness.evaluating.asking import Asking
from harness.evaluating.lm import protocol, wrap
from harness.inputs.prompts import Prompt, Row
from harness.inputs.tokenizer import build_tokenizer
from lm_eval.api.instance import Instance
from transformers import LlamaConfig, LlamaForCausalLM

CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
EXAMPLES = [
    Row(instruction="How many apples?", input="", output="The answer is 3.", answer="3"),
    Row(instruction="How many books?", input="", output="The answer is 4.", answer="4"),
]
ROW = Row(instruction="How many pens?", input="", output="The answer is 5.", answer="5")


@pytest.fixture
def tokenizer() -> Any:
    made = build_tokenizer()
    made.add_special_tokens({"additional_special_tokens": ["<end>"]})
    made.chat_template = CHAT
    return made


def lm(tokenizer: Any) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=512, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return wrap(LlamaForCausalLM(config).eval(), tokenizer, batch_size=4)


@pytest.mark.parametrize("name", ["llm-adapters", "alpaca", "plain"])
def test_worked_examples_stand_before_the_question_in_the_prompts_own_template(tokenizer: Any, name: Any) -> None:
    prompt = Prompt(name, tokenizer)
    text = Asking(prompt=prompt, examples=EXAMPLES).text(ROW)
    alone = Asking(prompt=prompt).text(ROW)
    assert alone == prompt.evaluation(ROW)
    assert text.endswith("\n\n" + alone)
    first, second, _ = text.split("\n\n" + alone[: alone.index("How many")])
    assert first == prompt.evaluation(EXAMPLES[0]) + (" " if name == "plain" else "") + "The answer is 3."
    assert second.endswith("The answer is 4.")


def test_worked_examples_are_turns_of_a_chat(tokenizer: Any) -> None:
    asking = Asking(prompt=Prompt("chat", tokenizer), examples=EXAMPLES)
    assert asking.text(ROW).count("[user]") == 3
    assert asking.text(ROW).endswith("[assistant] The answer is 4. <end> [user] How many pens? <end> [assistant] ")
    assert asking.tokens(ROW).count(tokenizer.bos_token_id) == 1


def test_a_model_that_goes_on_with_the_next_example_is_stopped(tokenizer: Any) -> None:
    """Else the last number of what is read would come from a question that the model made up."""
    for name in ("llm-adapters", "alpaca", "plain"):
        asking = Asking(prompt=Prompt(name, tokenizer), examples=EXAMPLES)  # type: ignore[arg-type]
        going_on = f"The answer is 5.\n\n{asking.prompt.evaluation(EXAMPLES[0])}"
        kept = min((going_on.split(stop)[0] for stop in asking.stops), key=len)
        assert kept.strip() == "The answer is 5."
    assert Asking(prompt=Prompt("llm-adapters", tokenizer)).stops == []
    # the prompt's last character is a line break, so the mark that follows it has none of its own
    stops = Asking(prompt=Prompt("alpaca", tokenizer)).stops
    assert any("### Instruction:\nHow many 7?".startswith(stop) for stop in stops)


@pytest.mark.parametrize("name", ["llm-adapters", "alpaca", "plain", "chat"])
def test_lm_eval_sends_the_tokens_of_the_prompt(tokenizer: Any, name: Any) -> None:
    asking = Asking(prompt=Prompt(name, tokenizer), examples=EXAMPLES[:1])
    spelling = Row(**{**ROW, "instruction": "How many <end> pens?"})
    model = lm(tokenizer)
    tokens = {asking.text(row): asking.tokens(row) for row in (ROW, spelling)}
    model.ask(tokens, stops=asking.stops, in_turns=name == "chat")
    ids, mask = model.tok_batch_encode(list(tokens))
    for sent, seen, expected in zip(ids.tolist(), mask.tolist(), tokens.values(), strict=True):
        assert sent[-sum(seen) :] == expected
        assert expected.count(tokenizer.bos_token_id) == 1
    # what a row spells is text; the chat template's own control tokens are control tokens
    end = tokenizer.convert_tokens_to_ids("<end>")
    assert [row.count(end) for row in tokens.values()] == ([3, 3] if name == "chat" else [0, 0])
    ids, _ = model.tok_batch_encode(list(tokens), left_truncate_len=5)
    assert ids.shape == (2, 5)
    model.ask_as_lm_eval()
    assert model.tok_encode("How many pens?") == tokenizer("How many pens?")["input_ids"]


def test_a_control_token_ends_an_answer_as_the_end_token_does(tokenizer: Any) -> None:
    """lm-eval decodes without control tokens: it would not find the end of a turn, and read what follows it."""
    asking = Asking(prompt=Prompt("chat", tokenizer))
    model = lm(tokenizer)
    end, word, other = (tokenizer.convert_tokens_to_ids(t) for t in ("<end>", "apples", "pens"))
    model.ask({asking.text(ROW): asking.tokens(ROW)}, stops=asking.stops, in_turns=True)
    assert model.model.generation_config.eos_token_id == [tokenizer.eos_token_id, end]
    script = iter([word, end, other, other])

    def forward(*args: Any, usual: Callable[..., Any] = model.model.forward, **kwargs: Any) -> Any:
        made = usual(*args, **kwargs)
        made.logits[:] = 0.0
        made.logits[..., next(script)] = 9.0
        return made

    model.model.forward = forward
    request = Instance("generate_until", {}, (asking.text(ROW), {"until": asking.stops, "max_gen_toks": 4}), 0)
    assert model.generate_until([request])[0].strip() == "apples"


def test_likelihood_batches_are_bounded_by_memory_and_change_nothing(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from harness.evaluating import model as module

    requests = [Instance("loglikelihood", {}, (f"How many {n}?", f" {n} apples"), 0) for n in range(7)]
    model = lm(tokenizer)
    seen: list[int] = []

    def call(batch: Any, usual: Callable[..., Any] = model._model_call, **kwargs: Any) -> Any:
        seen.append(len(batch))
        return usual(batch, **kwargs)

    model._model_call = call
    usual = model.loglikelihood(requests)
    assert max(seen) == 4
    seen.clear()
    longest = max(len(tokenizer(f"How many {n}? {n} apples")["input_ids"]) for n in range(7))
    monkeypatch.setattr(module, "LOGITS_BYTES", 2 * 2 * longest * len(tokenizer) * 4)
    small = model.loglikelihood(requests)
    assert max(seen) == 2
    assert [value for value, _ in small] == pytest.approx([value for value, _ in usual], abs=1e-4)
    assert model.batch_size == 4


def test_protocols_have_names_of_their_own(tokenizer: Any) -> None:
    asked = [Asking(prompt=Prompt(name, tokenizer), examples=shots)
             for name in ("llm-adapters", "chat") for shots in ([], EXAMPLES)]  # type: ignore[arg-type] # fmt: skip
    names = [protocol(one, choices=choices) for one in asked for choices in (None, "labels")]  # type: ignore[arg-type]
    names += [protocol(one, beams=4) for one in asked]
    assert len(set(names)) == len(names)
    assert names[0] == "llm-adapters (greedy)"
    assert len({protocol(one, choices="texts") for one in asked}) == 1
