"""Written answers, likelihood, lm-eval and forgetting: each in a table of its own; tasks without suites."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import reporting_data as data
from harness.reporting.figures import write_figures
from harness.reporting.frames import Frames, read_frames, rows_to_frame, write_frames
from harness.reporting.page import write_page
from harness.reporting.tables import write_tables
from harness.study.spec import Study

pytestmark = pytest.mark.usefixtures("empty_figures")

LIKELY = {"kind": "files", "path": "x", "scoring": "likelihood"}
KEPT = LIKELY | {"choices": "texts"}
ITEMS = 40
LOSS = {"full": 0.40, "lora": 0.50, "lisa": 0.47, "grass-static": 0.45, "grass": 0.42}


def study() -> Study:
    """The made-up study with its second task scored by likelihood and lm-eval, and a third without suites."""
    body = data.study().model_dump(mode="json") | {"published": None}
    tasks = body["tasks"]
    tasks["choice"]["suites"] = {
        "held-out": LIKELY | {"choices": "labels"},
        "stock": {"kind": "lm-eval", "task": "arc_easy"},
    }
    tasks["plain"] = {key: tasks["choice"][key] for key in ("train", "recipe")}
    body["methods"]["base-5"] = {"module": "base", "shots": 5, "seeds": [0]}
    body["forgetting"] = {"kept": KEPT, "kept-stock": {"kind": "lm-eval", "task": "piqa"}}
    body["comparisons"] = {"pair": {"title": "A pair", "methods": ["full", "grass"], "reading": "nothing"}}
    return Study.model_validate_json(json.dumps(body))


def frames() -> Frames:
    made = data.frames()
    rng = np.random.default_rng(5)
    tables: dict[str, list[dict[str, Any]]] = {
        name: getattr(made, name).to_dict("records") for name in ("runs", "scores", "documents")
    }
    tables |= {"lm_eval": [], "lm_eval_documents": []}
    for name in ("scores", "documents"):
        for row in tables[name]:
            if row["suite"] == "held-out":
                row |= {"scoring": "likelihood", "protocol": "likelihood"} if name == "scores" else {}
                row["accuracy_normalised" if name == "scores" else "correct_normalised"] = (
                    0.5 if name == "scores" else bool(row["document"] % 2)
                )
    for run in list(tables["runs"]):
        if run["task"] == "choice":
            again = run | {"task": "plain", "run": run["run"].replace("choice", "plain"), "status": "ok"}
            if run["method"] != "base":
                again["validation_loss"] = LOSS[run["method"]] + 0.001 * run["seed"] * (1 + len(run["method"]) % 2)
            tables["runs"].append(again)
    base = tables["runs"][0]
    tables["runs"] += [base | {"method": "base-5", "run": base["run"].replace("--base--", "--base-5--")}]
    for run in tables["runs"]:
        if run["status"] == "ok" and run["method"] != "base-5":
            _kept(tables, run["run"], drop=0.0 if run["method"] == "base" else 0.25, rng=rng)
            if run["task"] == "choice":
                _stock(tables, run["run"], "stock", "arc_easy", 0.5 + 0.01 * run["seed"])
    added = {name: rows_to_frame(name, [{c: r.get(c) for c in data.FRAMES[name]} for r in rows])
             for name, rows in tables.items()}  # fmt: skip
    return replace(made, **added)


def _kept(tables: dict[str, list[dict[str, Any]]], run: str, *, drop: float, rng: np.random.Generator) -> None:
    right = (np.arange(ITEMS) % 4 != 0) & (rng.random(ITEMS) >= drop)
    tables["documents"] += [
        {"run": run, "suite": "kept", "document": d, "correct": bool(right[d]), "correct_normalised": bool(right[d]),
         "parsed": True, "tokens": 0} for d in range(ITEMS)
    ]  # fmt: skip
    tables["scores"].append(
        {"run": run, "suite": "kept", "scoring": "likelihood", "protocol": "likelihood of texts", "rows": ITEMS,
         "correct": int(right.sum()), "accuracy": float(right.mean()), "accuracy_normalised": float(right.mean()),
         "chance": 0.25, "heldout_tokens": 0, "unparsed_share": 0.0, "truncated_rows": 0, "leaked_rows": 0,
         "limited": True}
    )  # fmt: skip
    _stock(tables, run, "kept-stock", "piqa", 0.6 - drop)


def _stock(tables: dict[str, list[dict[str, Any]]], run: str, suite: str, task: str, value: float) -> None:
    keys = {"run": run, "suite": suite, "lm_task": task, "metric": "acc", "filter": "none"}
    tables["lm_eval"].append(
        keys
        | {"value": value, "stderr": 0.05, "higher_is_better": True, "version": "1.0", "num_fewshot": 0}
        | {"chat_template": False, "items": ITEMS, "limited": False}
    )
    tables["lm_eval_documents"] += [keys | {"document": d, "value": value} for d in range(ITEMS)]


@pytest.fixture(scope="module")
def whole() -> Frames:
    return frames()


@pytest.fixture(scope="module")
def folder(whole: Frames, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("study")
    write_frames(whole, made)
    write_figures(whole, study(), made / "figures")
    write_tables(whole, study(), made / "tables")
    write_page(whole, study(), made, made / "report.html")
    return made


def table(folder: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(folder / "tables" / f"{name}.csv")


def test_no_table_holds_two_protocols(folder: Path) -> None:
    suites = {
        name: set(table(folder, name)["suite"])
        for name in ("accuracy", "likelihood", "likelihood_normalised", "lm_eval", "heldout_loss", "forgetting",
                     "difference_accuracy", "difference_likelihood", "comparison_pair")
    }  # fmt: skip
    written = {"two-step", "three-step"}
    assert suites["accuracy"] == suites["difference_accuracy"] == written
    assert suites["likelihood"] == suites["likelihood_normalised"] == suites["difference_likelihood"] == {"held-out"}
    assert suites["lm_eval"] == {"stock"}
    assert suites["forgetting"] == {"kept", "kept-stock"}
    assert suites["comparison_pair"] == written | {"validation"}
    assert suites["heldout_loss"] == written | {"held-out", "validation"}
    assert "[" not in (folder / "tables" / "likelihood.md").read_text().replace("[0", "")  # nothing is unparsed


def test_forgetting_is_after_minus_before_on_the_same_items(whole: Frames, folder: Path) -> None:
    rows = table(folder, "forgetting")
    assert set(rows["method"]) == {"full", "lora", "lisa", "grass-static", "grass"}
    row = rows[
        (rows["trained_on"] == "arithmetic") & (rows["suite"] == "kept") & (rows["method"] == "grass")
        & (rows["score"] == "accuracy")
    ].iloc[0]  # fmt: skip
    scores = whole.scores[whole.scores["suite"] == "kept"].set_index("run")["accuracy"]
    after = [float(v) for run, v in scores.items() if "arithmetic--grass--" in run]
    before = next(float(v) for run, v in scores.items() if "arithmetic--base--" in run)
    assert (row["before"], row["after_mean"], row["ok_runs"]) == pytest.approx((before, statistics.mean(after), 3))
    assert row["difference"] == pytest.approx(statistics.mean(after) - before)
    assert row["difference_low"] < row["difference"] < row["difference_high"] < 0
    assert row["items"] == ITEMS
    # half the width is about two standard errors of the mean difference over items
    documents = whole.documents[whole.documents["suite"] == "kept"]
    by_item = documents[documents["run"].str.contains("arithmetic--grass--")].groupby("document")["correct"].mean()
    base = documents[documents["run"].str.contains("arithmetic--base--")].set_index("document")["correct"]
    error = float((by_item.astype(float) - base.astype(float)).std() / ITEMS**0.5)
    assert (row["difference_high"] - row["difference_low"]) / 2 == pytest.approx(1.96 * error, rel=0.15)
    # one seed has an interval over items too, and no spread
    one = rows[(rows["trained_on"] == "choice") & (rows["method"] == "lora")]
    assert one["ok_runs"].tolist() == [0] * len(one)
    shown = (folder / "tables" / "forgetting.md").read_text()
    assert "(3 skipped" in shown
    assert "piqa acc" in shown
    assert "−25.0" not in shown.split("piqa acc")[1].splitlines()[0]  # lm-eval's own units


def test_lm_eval_keeps_its_metric_version_and_standard_error(folder: Path) -> None:
    rows = table(folder, "lm_eval")
    row = rows[rows["method"] == "grass"].iloc[0]
    assert (row["lm_task"], row["metric"], row["version"], row["num_fewshot"]) == ("arc_easy", "acc", 1.0, 0)
    assert (row["value_mean"], row["value_sd"], row["stderr_mean"]) == pytest.approx((0.51, 0.01, 0.05))
    shown = (folder / "tables" / "lm_eval.md").read_text()
    assert "choice / stock: acc" in shown
    assert "0.5100 ± 0.0100 (3) [0.0500]" in shown
    assert "choice / stock: lm-eval task arc_easy, version 1.0, 0-shot, 40 items." in shown


def test_a_task_without_suites_stands_with_its_validation_loss(whole: Frames, folder: Path) -> None:
    rows = table(folder, "heldout_loss")
    row = rows[(rows["task"] == "plain") & (rows["method"] == "full")].iloc[0]
    runs = whole.runs[(whole.runs["task"] == "plain") & (whole.runs["method"] == "full")]
    assert row["heldout_loss_mean_nats_per_token"] == pytest.approx(runs["validation_loss"].mean())
    shown = (folder / "tables" / "heldout_loss.md").read_text()
    assert "plain / validation: no suite; this is the loss on the task's validation rows, which the s" in shown
    differences = table(folder, "difference_heldout_loss")
    row = differences[(differences["task"] == "plain") & (differences["rival"] == "lora")].iloc[0]
    assert row["difference_nats_per_token"] < 0
    assert row["seed_t_high_nats_per_token"] < 0
    assert np.isnan(row["bootstrap_low_nats_per_token"])
    assert row["verdict"] == "lower"
    shown = (folder / "tables" / "difference_heldout_loss.md").read_text()
    assert "the t interval alone decides" in shown
    assert "3 × —" in shown


def test_worked_examples_are_stated_where_a_method_has_them(folder: Path) -> None:
    for name in ("accuracy", "heldout_loss"):
        assert (
            "base-5: 5 worked examples, the first training rows of the task"
            in (folder / "tables" / f"{name}.md").read_text()
        )


def test_the_page_shows_each_table_once_and_links_forgetting(folder: Path) -> None:
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert '<a href="#forgetting">' in page
    for text in ("Accuracy by likelihood (", "per character of the answer", "Tasks of lm-eval,", "Forgetting: suites"):
        assert page.count(f"<figcaption>{text}") >= 1 or text in page
    assert page.count("<figcaption>Tasks of lm-eval,") == 1
    assert page.count("<figcaption>Forgetting: suites") == 1


def test_a_study_of_tasks_without_suites_gets_its_page(whole: Frames, tmp_path: Path) -> None:
    body = study().model_dump(mode="json")
    body["tasks"] = {"plain": body["tasks"]["plain"]}
    body["forgetting"] = {}
    alone = Study.model_validate_json(json.dumps(body))
    runs = whole.runs[whole.runs["task"] == "plain"]
    empty = {name: rows_to_frame(name, []) for name in data.FRAMES}
    kept = replace(
        whole, **{name: empty[name] for name in ("scores", "documents", "lm_eval", "lm_eval_documents")}, runs=runs
    )
    write_frames(kept, tmp_path)
    write_figures(kept, alone, tmp_path / "figures")
    write_tables(kept, alone, tmp_path / "tables")
    write_page(kept, alone, tmp_path, tmp_path / "report.html")
    names = set(json.loads((tmp_path / "tables" / "tables.json").read_text()))
    assert "accuracy" not in names
    assert {"heldout_loss", "difference_heldout_loss", "comparison_pair"} <= names
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "grass is lower" not in page
    assert "plain / validation" in page


def test_tables_of_studies_published_before_are_read(tmp_path: Path) -> None:
    write_frames(data.frames(), tmp_path)
    for name in ("lm_eval", "lm_eval_documents"):
        (tmp_path / f"{name}.parquet").unlink()
    assert read_frames(tmp_path).lm_eval.empty
