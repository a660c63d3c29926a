"""What YAML makes of a file is never guessed at: tags, words read as values and broken syntax are named in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness.study.config import load_study
from harness.study.strict_yaml import ConfigError
from study_files import complaint, load


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        (
            "title: A study",
            "title: !!python/object/apply:os.system [touch hacked]",
            "mine.yaml:2: title: the YAML tag '!!python/object/apply:os.system' is not used here: write a plain value",
        ),
        ("title: A study", "title: !foo x", "mine.yaml:2: title: the YAML tag '!foo' is not used here: write a plain"),
        ("{module: full}", "!foo {module: full}", "mine.yaml:24: methods.full: the YAML tag '!foo' is not used here"),
        ("seeds: [0, 1]", "seeds: !!set {0, 1}", "mine.yaml:3: seeds: the YAML tag '!!set' is not used here"),
        ("title: A", "!foo title: A", "mine.yaml:2: a key is one plain word: no tag, no list, no mapping"),
        ("title: A study", "title: !!int x", "mine.yaml:2: title: YAML cannot read 'x' as int"),
        ("title: A study", "title: 2026-01-01", "mine.yaml:2: title: YAML reads 2026-01-01 as a date: put it in quote"),
        ("title: A study", "? [a, b]\n: x", "mine.yaml:2: a key is one plain word: no tag, no list, no mapping"),
        ("{module: full}", "&a {module: full, options: *a}", "mine.yaml:24: methods.full.options: this value holds"),
    ],
)
def test_yaml_tags_and_other_cleverness_are_refused(tmp_path: Path, right: str, wrong: str, said: str) -> None:
    assert complaint(tmp_path, (right, wrong)).startswith(said)


def test_anchors_and_merge_keys_say_a_thing_once(tmp_path: Path) -> None:
    merged = "&a {module: full, lr: 0.1}\n  other: {<<: *a, lr: 0.2}"
    study = load(tmp_path, ("  full: {module: full}", f"  full: {merged}"))
    assert (study.methods["full"].lr, study.methods["other"].lr) == (0.1, 0.2)
    assert study.methods["other"].module == "full"
    wrong = complaint(tmp_path, ("  full: {module: full}", f"  full: {merged.replace('lr: 0.2', 'sed: [1]')}"))
    assert wrong == "mine.yaml:25: methods.other.sed: unknown key; did you mean 'seeds'?"


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        ("seeds: [0, 1]", "seeds: [0, 1", "(while parsing a flow sequence, begun on line 3)"),
        ("title: A study", "title: 'A study", "(while scanning a quoted scalar, begun on line 2)"),
        ("  steps: 10", "\tsteps: 10", "indent with spaces, not tabs"),
        ("title: A study", "title: A study: mine", "put text with ': ' in it in quotes, and look at the indentation"),
        ("title: A study", "title: \x01", "special characters are not allowed"),
        ("{module: full}", "*nobody", "found undefined alias 'nobody'"),
    ],
)
def test_a_syntax_error_says_where_it_began_or_how_to_mend_it(
    tmp_path: Path, right: str, wrong: str, said: str
) -> None:
    message = complaint(tmp_path, (right, wrong))
    assert ": not YAML: " in message
    assert message.endswith(said)


def test_a_file_that_holds_no_mapping_is_refused(tmp_path: Path) -> None:
    for empty in ("", "\n", "# only a comment\n"):
        assert (
            complaint(tmp_path, text=empty) == "mine.yaml:1: the file is empty; copy config/embedded.yaml and edit it"
        )
    for other in ("- study: mine\n", "mine\n"):
        said = complaint(tmp_path, text=other)
        assert said == "mine.yaml:1: `key: value` lines are wanted, this file holds a list or a single value"
    (tmp_path / "mine.yaml").write_bytes(b"study: \xff\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml:1: not UTF-8 text \(.utf-8. codec can't decode byte 0xff"):
        load_study(tmp_path / "mine.yaml")


def test_a_missing_file_names_those_beside_it(tmp_path: Path) -> None:
    load(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_study(tmp_path / "yours.yaml")
    assert str(caught.value).startswith(f"{tmp_path}/yours.yaml: no such file; there are ")
    assert str(tmp_path / "mine.yaml") in str(caught.value)


def test_a_key_that_stands_twice_is_refused_at_any_depth(tmp_path: Path) -> None:
    said = complaint(tmp_path, ("title: A", "study: yours\ntitle: A"))
    assert said == "mine.yaml:2: the key 'study' stands twice in this mapping, first on line 1"
    said = complaint(tmp_path, ("  lora: {", "  full: {"))
    assert said == "mine.yaml:25: the key 'full' stands twice in this mapping, first on line 24"


@pytest.mark.parametrize(("key", "read"), [("no", "false"), ("on", "true"), ("7", "7"), ("~", "null")])
def test_a_key_that_yaml_reads_as_something_else_is_refused(tmp_path: Path, key: str, read: str) -> None:
    said = complaint(tmp_path, ("  lora: {", f"  {key}: {{"))
    assert said == f"mine.yaml:25: YAML reads the key '{key}' as {read}: put it in quotes"


def test_such_a_key_in_quotes_is_a_label(tmp_path: Path) -> None:
    assert "no" in load(tmp_path, ("  lora: {", '  "no": {')).methods


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        (
            "schedule: linear",
            "schedule: no",
            "mine.yaml:35: recipe.schedule: must be 'linear', 'cosine' or 'constant', not false "
            "(YAML reads the bare word no as false)",
        ),
        (
            "title: A study",
            "title: On",
            "mine.yaml:2: title: text is wanted, not true: put it in quotes (YAML reads the bare word On as true)",
        ),
        (
            "  steps: 10",
            "  steps: yes",
            "mine.yaml:28: recipe.steps: a whole number is wanted, not true (YAML reads the bare word yes as true)",
        ),
    ],
)
def test_a_word_that_yaml_reads_as_true_or_false_is_shown_as_it_was_written(
    tmp_path: Path, right: str, wrong: str, said: str
) -> None:
    assert complaint(tmp_path, (right, wrong)) == said


def test_an_unknown_kind_lists_the_kinds(tmp_path: Path) -> None:
    said = complaint(tmp_path, ("kind: pretrain", "kind: wrong"))
    assert said == "mine.yaml:6: models.tiny.kind: must be one of 'pretrain', 'local', 'hub', not 'wrong'"
    said = complaint(tmp_path, ("two-step: {kind: generated", "two-step: {kind: file"))
    assert (
        said == "mine.yaml:21: tasks.sums.suites.two-step.kind: must be one of 'generated', 'files', 'hub', 'lm-eval', "
        "not 'file'"
    )
    said = complaint(tmp_path, ("    kind: pretrain\n", ""))
    assert said == "mine.yaml:5: models.tiny.kind: this key is missing; it is one of hub, local, pretrain"
