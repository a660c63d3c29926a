"""A study with a mistake in it is refused before any work, in one line: file, line, key, and how to mend it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from house import ROOT
from study_files import STUDY, complaint, load


def test_the_study_that_is_broken_below_is_sound(tmp_path: Path) -> None:
    assert load(tmp_path).study == "mine"


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        ("observation: {", "observatoin: {", "mine.yaml:37: observatoin: unknown key; did you mean 'observation'?"),
        ("warmup_steps", "warmup_step", "mine.yaml:33: recipe.warmup_step: unknown key; did you mean 'warmup_steps'?"),
        ("{module: full}", "{modul: full}", "mine.yaml:24: methods.full.modul: unknown key; did you mean 'module'?"),
        (
            "rank: 4",
            "rnk: 4",
            "mine.yaml:25: methods.lora.options.rnk: unknown key; did you mean 'rank'?",
        ),
        (
            "rows: 8, scoring",
            "row: 8, scoring",
            "mine.yaml:21: tasks.sums.suites.two-step.row: unknown key; did you mean 'rows'?",
        ),
        ("fact_share", "facts", "mine.yaml:11: models.tiny.corpus.facts: unknown key; did you mean 'fact_share'?"),
        ("recipe: {steps", "recipe: {step", "mine.yaml:22: tasks.sums.recipe.step: unknown key; did you mean 'steps'?"),
        (
            "{module: full}",
            "{module: full, recipe: {batchsize: 8}}",
            "mine.yaml:24: methods.full.recipe.batchsize: unknown key; did you mean 'batch_size'?",
        ),
    ],
)
def test_a_misspelt_key_is_named_at_every_depth_with_the_nearest_valid_one(
    tmp_path: Path, right: str, wrong: str, said: str
) -> None:
    assert complaint(tmp_path, (right, wrong)) == said


def test_a_key_like_no_other_gets_the_list_of_valid_ones(tmp_path: Path) -> None:
    said = complaint(tmp_path, ("alpha: 8", "alpha: 8, zzz: 1"))
    where, keys = (
        "mine.yaml:25: methods.lora.options.zzz",
        "adapter_dtype, alpha, dropout, init, lr_ratio, rank, rslora, targets",
    )
    assert said == f"{where}: unknown key; valid keys: {keys}"


def test_a_hint_is_a_key_of_that_kind_of_suite_and_no_other(tmp_path: Path) -> None:
    # `limit` belongs to suites read from files
    said = complaint(tmp_path, ("rows: 8, scoring", "rows: 8, limit: 3, scoring"))
    keys = "kind, max_new_tokens, rows, scoring, seed, variant"
    assert said == f"mine.yaml:21: tasks.sums.suites.two-step.limit: unknown key; valid keys: {keys}"


def test_labels_that_are_also_kinds_confuse_no_message(tmp_path: Path) -> None:
    said = complaint(tmp_path, ("two-step: {", "generated: {"), ("rows: 8, scoring", "row: 8, scoring"))
    assert said == "mine.yaml:21: tasks.sums.suites.generated.row: unknown key; did you mean 'rows'?"


def test_a_missing_key_is_named_with_the_line_of_its_mapping(tmp_path: Path) -> None:
    assert complaint(tmp_path, ("    width: 16\n", "")) == "mine.yaml:5: models.tiny.width: this key is missing"


def test_an_unknown_method_lists_those_there_are(tmp_path: Path) -> None:
    said = complaint(tmp_path, ("{module: full}", "{module: fulll}"))
    assert said.startswith("mine.yaml:24: methods.full.module: there is no method file baselines/fulll.py; there are: ")
    assert {"base", "full", "grass", "lisa", "lora"} <= set(said.split("there are: ")[1].split(", "))


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        ("lr: 1.0e-3}", "lr: 1e-5}", "mine.yaml:26: methods.fixed.lr: YAML reads '1e-5' as text: write 1.0e-5, "),
        ("lr: 1.0e-3}", "lr: 2.5e5}", "mine.yaml:26: methods.fixed.lr: YAML reads '2.5e5' as text: write 2.5e+5, "),
        ("grid: [1.0e-3", "grid: [1e-3", "mine.yaml:36: search.grid.0: YAML reads '1e-3' as text: write 1.0e-3, "),
        ("  steps: 10", "  steps: 1e3", "mine.yaml:28: recipe.steps: YAML reads '1e3' as text: write 1000, "),
        ("  steps: 10", "  steps: '10'", "mine.yaml:28: recipe.steps: YAML reads '10' as text: write 10, "),
    ],
)
def test_a_number_that_yaml_takes_for_text_is_refused_with_what_to_write(
    tmp_path: Path, right: str, wrong: str, said: str
) -> None:
    message = complaint(tmp_path, (right, wrong))
    assert message.startswith(said)
    assert message.endswith("without quotes")
    # and what it says to write is accepted
    mended = message.split("write ")[1].split(",")[0]
    load(tmp_path, (right, wrong.replace(wrong.split(": ")[1].strip("[}'"), mended).replace("'", "")))


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        ("lr: 1.0e-3}", "lr: fast}", "mine.yaml:26: methods.fixed.lr: a number is wanted, not the text 'fast'"),
        ("lr: 1.0e-3}", "lr: nan}", "mine.yaml:26: methods.fixed.lr: a number is wanted, not the text 'nan'"),
        ("lr: 1.0e-3}", "lr: .inf}", "mine.yaml:26: methods.fixed.lr: a finite number is wanted, not .inf"),
        ("lr: 1.0e-3}", "lr: 0}", "mine.yaml:26: methods.fixed.lr: must be above 0.0, not 0"),
        ("  steps: 10", "  steps: 10.5", "mine.yaml:28: recipe.steps: a whole number is wanted, not 10.5"),
        ("  steps: 10", "  steps:", "mine.yaml:28: recipe.steps: a whole number is wanted, not an empty value"),
        ("{module: full}", "", "mine.yaml:24: methods.full: `key: value` lines are wanted, not an empty value; valid"),
        ("fact_share: 0.8", "fact_share: 80", "mine.yaml:11: models.tiny.corpus.fact_share: must be at most 1.0"),
        ("seeds: [0, 1]", "seeds: 3", "mine.yaml:3: seeds: a list is wanted, not 3: write [3]"),
        (
            "grid: [1.0e-3, 3.0e-3, 1.0e-2]",
            "grid: [1.0e-3]",
            "mine.yaml:36: search.grid: at least 3 wanted, given 1",
        ),
        ("width: 16", "width: 18", "mine.yaml:8: models.tiny.width: must be a multiple of twice the heads (2)"),
        ("search: {", "# search: {", "mine.yaml:24: methods.full: no learning rate: give it an lr, or the study a"),
        ("{module: full}", "{module: base, lr: 0.1}", "mine.yaml:24: methods.full.lr: base takes no step: remove"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_in_plain_words(tmp_path: Path, right: str, wrong: str, said: str) -> None:
    assert complaint(tmp_path, (right, wrong)).startswith(said)


def test_seed_0_is_a_seed(tmp_path: Path) -> None:
    study = load(tmp_path, ("seeds: [0, 1]", "seeds: [0]"), ("{module: full}", "{module: full, seeds: [0]}"))
    assert study.seeds == (0,)
    assert study.methods["full"].seeds == (0,)


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        ("seeds: [0, 1]", "seeds: [0, -1]", "mine.yaml:3: seeds: must be distinct whole numbers from 0 to 4294967295"),
        ("seeds: [0, 1]", "seeds: [1, 1]", "mine.yaml:3: seeds: must be distinct whole numbers from 0 to 4294967295"),
        (
            "seeds: [0, 1]",
            "seeds: [4294967296]",
            "mine.yaml:3: seeds: must be distinct whole numbers from 0 to 4294967295",
        ),
        (
            "seeds: [0, 1]",
            f"seeds: {list(range(200, 4200))}",
            "mine.yaml:1: 12000 runs are asked for, at most 10000 may be",
        ),
        ("study: mine", f"study: {'m' * 41}", "mine.yaml:1: study: at most 40 letters are wanted"),
        ("seeds: [0, 1]", "seeds: []", "mine.yaml:3: seeds: at least 1 wanted, given 0"),
        ("{module: full}", "{module: full, seeds: [2, 2]}", "mine.yaml:24: methods.full.seeds: must be distinct"),
        # an empty list once meant the study's seeds
        ("{module: full}", "{module: full, seeds: []}", "mine.yaml:24: methods.full.seeds: at least 1 wanted"),
        (
            "seeds: [100]",
            "seeds: [-1]",
            "mine.yaml:36: search.seeds: must be distinct whole numbers from 0 to 4294967295",
        ),
        ("seeds: [100]", "seeds: [100, 1]", "mine.yaml:36: search.seeds: must differ from the seeds of all runs"),
        ("{module: full}", "{module: full, seeds: [100]}", "mine.yaml:36: search.seeds: must differ from the seeds"),
        ("grid: [1.0e-3, 3.0e-3", "grid: [1.0e-3, 1.0e-3", "mine.yaml:36: search.grid: must be distinct rates above 0"),
        ("grid: [1.0e-3", "grid: [-1.0e-3", "mine.yaml:36: search.grid: must be distinct rates above 0"),
    ],
)
def test_negative_repeated_and_overlapping_seeds_and_rates_are_refused(
    tmp_path: Path, right: str, wrong: str, said: str
) -> None:
    assert complaint(tmp_path, (right, wrong)).startswith(said)


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        (
            "  full: {",
            "  full tuning: {",
            "mine.yaml:24: methods.full tuning: a label holds lower-case letters, digits",
        ),
        ("  full: {", "  ../full: {", "mine.yaml:24: methods.../full: a label holds"),
        ("  full: {", "  Full: {", "mine.yaml:24: methods.Full: a label holds"),
        ("  full: {", '  "full\\n": {', "mine.yaml:24: methods.full\\n: a label holds"),
        ("  tiny:", "  Tiny_Llama:", "mine.yaml:5: models.Tiny_Llama: a label holds"),
        ("two-step: {", "two/step: {", "mine.yaml:21: tasks.sums.suites.two/step: a label holds"),
        ("study: mine", "study: some/mine", "mine.yaml:1: study: a label holds"),
    ],
)
def test_a_label_that_makes_no_file_name_is_refused(tmp_path: Path, right: str, wrong: str, said: str) -> None:
    assert complaint(tmp_path, (right, wrong)).startswith(said)


def test_a_wrong_label_comes_with_a_right_one(tmp_path: Path) -> None:
    assert complaint(tmp_path, ("  tiny:", "  Tiny_Llama 1.1B:")).endswith(": write tiny-llama-1.1b")


@pytest.mark.parametrize("name", ["inputs", "searches", "runs", "evals", "state", "published"])
def test_a_study_cannot_take_the_name_of_a_results_folder(tmp_path: Path, name: str) -> None:
    said = complaint(tmp_path, ("study: mine", f"study: {name}"))
    assert said == f"mine.yaml:1: study: '{name}' is a folder of its own under results/: choose another label"


FILES = (
    "{kind: generated, family: arithmetic, seed: 1, train_rows: 40, validation_rows: 8}",
    "{kind: files, paths: ['${GRASS_TEST_DATA}/math.json'], seed: 1, validation_rows: 8}",
)


def test_a_missing_data_file_is_named(tmp_path: Path) -> None:
    here = (FILES[0], FILES[1].replace("${GRASS_TEST_DATA}", "no-folder"))
    said = complaint(tmp_path, here)
    assert said.startswith("mine.yaml:19: tasks.sums.train.paths.0: there is no no-folder/math.json; paths count from")


def test_an_unset_variable_is_named_with_what_should_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRASS_TEST_DATA", raising=False)
    inputs = ("title: A study", "inputs: {GRASS_TEST_DATA: a clone of LLM-Adapters, OTHER: x}\ntitle: A study")
    said = complaint(tmp_path, FILES, inputs)
    assert said == (
        "mine.yaml:20: tasks.sums.train.paths.0: GRASS_TEST_DATA is not set: export GRASS_TEST_DATA=<path> "
        "or add --config GRASS_TEST_DATA=<path>; GRASS_TEST_DATA is a clone of LLM-Adapters"
    )


def test_a_variable_set_to_the_wrong_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRASS_TEST_DATA", str(tmp_path))
    said = complaint(tmp_path, FILES)
    wanted = f"there is no {tmp_path}/math.json; correct the variable in ${{GRASS_TEST_DATA}}/math.json"
    assert said == f"mine.yaml:19: tasks.sums.train.paths.0: {wanted}"
    (tmp_path / "math.json").write_text("[]")
    load(tmp_path, FILES)


def test_a_missing_file_of_rows_to_leave_out_is_named(tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text("question,answer\n", encoding="utf-8")
    own = f"{{kind: files, paths: [{tmp_path}/own.csv], without: [no/test.json], seed: 1, validation_rows: 8}}"
    said = complaint(tmp_path, (FILES[0], own))
    assert said.startswith("mine.yaml:19: tasks.sums.train.without.0: there is no no/test.json; ")


HUB = "kind: hub, repo: org/name, split: train, revision: abc, seed: 1, validation_rows: 8"


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            "columns: {output: b}",
            "columns: name the column that holds the `instruction` (or `messages`, for conversations)",
        ),
        ("columns: {instruction: a}", "columns: name the column that holds the `output`, or the `answer`, or both"),
        (
            "columns: {messages: a, input: b}",
            "columns.messages: a conversation holds instruction, input and output: remove those keys",
        ),
        ("columns: {instruction: a, outptu: b}", "columns.outptu: unknown key; did you mean 'output'?"),
        ("columns: {instruction: a, output: 3}", "columns.output: text is wanted, not 3: put it in quotes"),
    ],
)
def test_columns_that_do_not_make_a_row_are_refused(tmp_path: Path, rows: str, said: str) -> None:
    assert complaint(tmp_path, (FILES[0], f"{{{HUB}, {rows}}}")) == f"mine.yaml:19: tasks.sums.train.{said}"


def test_a_data_set_of_the_hub_has_an_organisation_and_a_revision(tmp_path: Path) -> None:
    load(tmp_path, (FILES[0], f"{{{HUB}}}"))
    said = complaint(tmp_path, (FILES[0], f"{{{HUB.replace('org/name', 'name')}}}"))
    assert said == "mine.yaml:19: tasks.sums.train.repo: <organisation>/<name> is wanted, such as openai/gsm8k"
    said = complaint(tmp_path, (FILES[0], f"{{{HUB.replace(', revision: abc', '')}}}"))
    assert said == "mine.yaml:19: tasks.sums.train.revision: this key is missing"


def test_a_missing_model_folder_and_a_missing_table_of_published_numbers_are_named(tmp_path: Path) -> None:
    model = STUDY[STUDY.index("    kind: pretrain") : STUDY.index("tasks:")]
    local = (model, "    kind: local\n    path: nowhere/llama\n")
    assert complaint(tmp_path, local).startswith("mine.yaml:7: models.tiny.path: there is no nowhere/llama; ")
    said = complaint(tmp_path, ("title:", "published: config/published/no.yaml\ntitle:"))
    assert said.startswith("mine.yaml:2: published: there is no file config/published/no.yaml; ")


def test_a_micro_batch_must_divide_the_batch(tmp_path: Path) -> None:
    said = complaint(tmp_path, ("micro_batch_size: 4", "micro_batch_size: 3"))
    rule = "micro_batch_size 3 does not divide batch_size 8"
    assert said == f"mine.yaml:30: recipe.micro_batch_size: {rule} (task sums, method full)"


def test_warm_up_must_end_before_the_run_does(tmp_path: Path) -> None:
    said = complaint(tmp_path, ("warmup_steps: 2", "warmup_steps: 12"))
    # the task's own 12 steps are what the warm-up does not fit into
    assert said == (
        "mine.yaml:22: tasks.sums.recipe.steps: warmup_steps 12 must be below steps 12 (task sums, method full)"
    )


def test_weights_in_bf16_cannot_be_computed_with_in_fp32(tmp_path: Path) -> None:
    said = complaint(tmp_path, ("warmup_steps: 2", "warmup_steps: 2\n  weight_dtype: bf16\n  compute_dtype: fp32"))
    rule = "compute_dtype fp32 needs fp32 weights: leave it out, or change weight_dtype bf16"
    assert said == f"mine.yaml:35: recipe.compute_dtype: {rule} (task sums, method full)"


def test_a_recipe_made_wrong_by_a_method_is_named_at_that_method(tmp_path: Path) -> None:
    changed = "{module: lora, recipe: {batch_size: 6}, options: {rank: 4, alpha: 8}}"
    said = complaint(tmp_path, ("{module: lora, options: {rank: 4, alpha: 8}}", changed))
    rule = "micro_batch_size 4 does not divide batch_size 6"
    assert said == f"mine.yaml:25: methods.lora.recipe.batch_size: {rule} (task sums, method lora)"


def test_the_command_line_says_it_in_one_line_and_exits_with_2(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(STUDY.replace("observation:", "observatoin:"))
    command = [sys.executable, "-m", "harness", "plan", "--config", str(path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert done.stdout == ""
    wanted = f"harness plan: {path}:37: observatoin: unknown key; did you mean 'observation'?\n"
    assert done.stderr == wanted
    assert not (tmp_path / "results").exists()


@pytest.mark.pipeline
def test_snakemake_shows_the_same_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(STUDY.replace("observation:", "observatoin:"))
    command = [sys.executable, "-m", "snakemake", "-s", str(ROOT / "Snakefile"), "-n", "--cores", "1"]
    done = subprocess.run(
        [*command, "--directory", str(tmp_path), "--config", f"STUDY={path}"],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    shown = done.stdout + done.stderr
    assert done.returncode != 0
    assert "mine.yaml:37: observatoin: unknown key; did you mean 'observation'?" in shown
    assert "Traceback" not in shown
    assert not (tmp_path / "results").exists()


@pytest.mark.pipeline
def test_python_that_stands_in_a_study_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"__use_yte__: true\n?open({str(tmp_path / 'run')!r}, 'w').close(): 1\n{STUDY}")
    command = [sys.executable, "-m", "snakemake", "-s", str(ROOT / "Snakefile"), "-n", "--cores", "1"]
    done = subprocess.run(
        [*command, "--directory", str(tmp_path), "--config", f"STUDY={path}"],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert "mine.yaml:1: __use_yte__: unknown key" in done.stdout + done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["plan", "--config", "config/efficiency.yaml"], "this is an efficiency study: python -m harness efficiency"),
        (
            ["forecast", "--model", "tiny", "--method", "lora", "--config", "config/embedded.yaml"],
            "this is a study of runs, not of memory and speed: snakemake --config STUDY=config/embedded.yaml",
        ),
    ],
)
def test_a_study_of_the_other_kind_is_named(
    command: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from harness.__main__ import main

    monkeypatch.chdir(ROOT)
    assert main(command) == 2
    assert said in capsys.readouterr().err
