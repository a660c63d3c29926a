"""A small share of `python -m tests.fuzz`, the same files every time: a valid result, or one sentence."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import yaml
from harness.errors import UserError
from harness.records.reading import read_jsonl
from harness.study.strict_yaml import MOST_BYTES, MOST_VALUES, read_yaml

from tests.fuzz.changes import BOMB, MERGES
from tests.fuzz.judging import end_of, fuzzed
from tests.fuzz.kinds import Kind, kinds

EXAMPLES = 12
_SLOW = {"study config": 6, "efficiency config": 6, "published numbers": 6}


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.name)
def test_a_changed_file_gives_a_valid_result_or_one_sentence(kind: Kind) -> None:
    tally = fuzzed(kind, _SLOW.get(kind.name, EXAMPLES), start=1)
    assert not tally.foreign, "\n".join(tally.foreign.values())
    assert tally.ends["one sentence"], "no file was changed so that it is refused"


@pytest.mark.parametrize("text", [BOMB, MERGES], ids=["aliases", "merge keys"])
def test_aliases_count_wherever_they_stand(tmp_path: Path, text: str) -> None:
    (tmp_path / "study.yaml").write_text(text)
    start = time.process_time()
    with pytest.raises(UserError, match=f"study.yaml:1: more than {MOST_VALUES:,} keys and values"):
        read_yaml(tmp_path / "study.yaml")
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: " + "[" * 60 + "]" * 60, "more than 40 lists and mappings within one another"),
        ("a: " + "[" * 3000, "more than 40 lists and mappings within one another"),
        ("a: " + "x" * MOST_BYTES, "larger than 400 kB"),
        ("a: 0x" + "f" * 6000, "a number below 9.2e+18 is wanted"),
        (yaml.safe_dump({"9" * 5000: 1}).replace("'", "").replace("? ", "").replace("\n:", ":"), ""),
    ],
)
def test_what_is_too_large_is_refused_in_one_sentence(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "study.yaml").write_text(text)
    end, detail = end_of(read_yaml, tmp_path / "study.yaml")
    assert end == "one sentence", detail
    assert said in detail


@pytest.mark.parametrize("line", ["[1]", "3", "null", "[" * 100_000, "9" * 5000, '{"a": '])
def test_a_line_of_a_log_that_is_no_object_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "steps.jsonl").write_text(f'{{"step": 0}}\n{line}\n')
    end, detail = end_of(read_jsonl, tmp_path / "steps.jsonl")
    assert end == "one sentence", detail
    assert "steps.jsonl, line 2: " in detail
