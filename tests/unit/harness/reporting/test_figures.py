"""Figures: what is drawn, and that the same data give the same bytes; the page: self-contained and escaped."""

from __future__ import annotations

import json
import re
import shutil
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import reporting_data as data
from harness.errors import UserError
from harness.reporting.figures import draw, write_figures
from harness.reporting.frames import Frames, write_frames
from harness.reporting.importance_figures import active_spans, agreement_curves, importance_map
from harness.reporting.page import flagged_runs, write_page
from harness.reporting.style import Drawing, looks, save, styled
from harness.reporting.tables import write_tables
from harness.reporting.training_figures import smoothed, window_steps
from matplotlib import pyplot as plt

STUDY = data.study().model_copy(update={"published": None})


@pytest.fixture(scope="module")
def frames() -> Frames:
    return data.frames()


@pytest.fixture(scope="module")
def folder(frames: Frames, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("study")
    write_frames(frames, made)
    write_figures(frames, STUDY, made / "figures")
    write_tables(frames, STUDY, made / "tables")
    write_page(frames, STUDY, made, made / "report.html")
    return made


@pytest.mark.parametrize("begins", ["importance--tiny--grass", pytest.param("", marks=pytest.mark.exhaustive)])
def test_figures_repeat_byte_for_byte(begins: str, frames: Frames, folder: Path, tmp_path: Path) -> None:
    with styled():
        for drawing in draw(frames, STUDY):
            if drawing.name.startswith(begins):
                save(drawing, tmp_path)
            plt.close(drawing.figure)
    again = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert len(again) >= 4
    assert again == {p.name: p.read_bytes() for p in (folder / "figures").glob(f"{begins}*")}


def test_a_picture_stands_as_it_would_had_it_been_laid_out_by_itself(frames: Frames, tmp_path: Path) -> None:
    """The layout of the SVG is kept for the PNG, where nothing may stand a letter's height (1 %) from its place."""
    found = []
    for layout_is_kept in (True, False):
        with styled():
            drawing = importance_map(frames, STUDY, data.MODEL, "grass")
        figure, before = drawing.figure, [axes.get_position().bounds for axes in drawing.figure.axes]
        if layout_is_kept:
            save(drawing, tmp_path)
        else:
            figure.savefig(tmp_path / "alone.png")
            plt.close(figure)
        found.append([axes.get_position().bounds for axes in figure.axes])
        assert found[-1] != before, "nothing was laid out"
    assert np.array(found[0]) == pytest.approx(np.array(found[1]), abs=0.01)


def test_every_figure_is_there_in_both_forms_and_has_its_words(folder: Path) -> None:
    first = {p.name for p in (folder / "figures").iterdir()}
    captions = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
    assert first == {f"{name}.{s}" for name in captions for s in ("svg", "png")}
    assert {f"importance--tiny--{m}" for m in ("lisa", "grass-static", "grass")} < captions.keys()
    assert all(texts["caption"] and texts["alt"] for texts in captions.values())


def test_no_figure_is_left_open(folder: Path) -> None:
    assert not plt.get_fignums()


def test_a_cell_of_the_heat_map(frames: Frames) -> None:
    """Layer 5 at step 60 of the observed map of GRASS, seed 0, recomputed from the raw rows."""
    with styled():
        figure = importance_map(frames, STUDY, data.MODEL, "grass").figure
    run = "tiny--arithmetic--grass--seed0--50abcdef"
    at = {
        r["layer"]: r["gradient_rms"] for r in frames.observed.to_dict("records") if r["run"] == run and r["step"] == 60
    }
    mesh = figure.axes[1].collections[0]
    cells = np.asarray(mesh.get_array()).reshape(data.LAYERS, -1)
    assert cells[5, 3] == pytest.approx(at[5] / statistics.fmean(at.values()))
    edges = mesh.get_coordinates()[0, :, 0].tolist()
    assert edges[0] == 0
    assert edges[3:5] == [50, 70]
    assert edges[-1] == data.STEPS
    plt.close(figure)


def test_active_spans_join_neighbouring_periods(frames: Frames) -> None:
    believed = frames.believed[frames.believed["run"] == "tiny--arithmetic--grass--seed0--50abcdef"]
    spans = active_spans(believed, data.STEPS)
    covered = {(layer, t) for layer, start, end in spans for t in range(start, end)}
    expected = {
        (r["layer"], t)
        for r in believed.to_dict("records")
        if r["active"]
        for t in range(r["step"], r["step"] + data.PERIOD)
    }
    assert covered == expected
    assert len({(layer, end) for layer, _, end in spans} & {(layer, start) for layer, start, _ in spans}) == 0


def test_smoothing_is_a_trailing_mean(frames: Frames) -> None:
    run = "tiny--choice--full--seed0--10abcdef"
    steps = frames.steps[frames.steps["run"] == run]
    window = window_steps(data.STEPS)
    losses = steps.sort_values("step")["loss"].tolist()
    assert window == 10
    assert smoothed(steps, window)[run].loc[50] == pytest.approx(statistics.fmean(losses[41:51]))
    assert np.isnan(smoothed(steps, window)[run].loc[8])


def test_a_figure_with_a_line_a_seed_draws_no_more_than_it_can_show(
    frames: Frames, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = agreement_curves(frames, STUDY, "tiny")
    monkeypatch.setattr("harness.reporting.style.SEEDS_DRAWN", 1)
    monkeypatch.setattr("harness.reporting.importance_figures.SEEDS_DRAWN", 1)
    thinned = agreement_curves(frames, STUDY, "tiny")
    lines = [sum(len(axes.lines) for axes in drawing.figure.axes) for drawing in (whole, thinned)]
    plt.close("all")
    assert lines[1] < lines[0]
    assert "one line a seed. Above" in whole.caption
    assert "one line a seed, the first 1 of each method" in thinned.caption


def test_every_method_looks_different() -> None:
    found = looks(STUDY)
    assert len({(v.colour, v.marker, str(v.line)) for v in found.values()}) == len(found)


def test_a_study_without_any_ok_run_still_gets_its_page(frames: Frames, tmp_path: Path) -> None:
    runs = frames.runs.assign(status="skipped", status_why="no weights").astype(frames.runs.dtypes)
    nothing = replace(frames, runs=runs, trials=frames.trials.iloc[:0])
    write_frames(nothing, tmp_path)
    write_figures(nothing, STUDY, tmp_path / "figures")
    write_tables(nothing, STUDY, tmp_path / "tables")
    write_page(nothing, STUDY, tmp_path, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "0 of 32 runs are ok; 32 skipped" in text


def test_the_page_is_self_contained_and_escaped(folder: Path) -> None:
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert "Synthetic &lt;study&gt; &amp; check" in text
    assert "<study>" not in text
    assert set(re.findall(r'src="([^"]{4})', text)) == {"data"}
    assert "http://" not in text
    assert "https://" not in text
    images = re.findall(r"<img [^>]*>", text)
    assert images
    assert all(re.search(r'alt="[^"]{20,}"', image) for image in images)
    assert len(text) < 4_000_000


def test_nothing_of_a_strangers_frames_is_markup_or_a_file_of_ours(
    frames: Frames, folder: Path, tmp_path: Path
) -> None:
    theirs = tmp_path / "theirs"
    shutil.copytree(folder, theirs)
    file = theirs / "tables" / "tables.json"
    tables = json.loads(file.read_text(encoding="utf-8"))
    evil = '<script>alert(1)</script><img src="https://example.org/x">'
    for table in tables.values():
        table |= {"caption": evil, "columns": [evil for _ in table["columns"]], "footnotes": [f"^a^ {evil}"]}
        table["rows"] = [[evil for _ in row] for row in table["rows"]]
    file.write_text(json.dumps(tables), encoding="utf-8")
    captions = json.loads((theirs / "figures.json").read_text(encoding="utf-8"))
    name = next(iter(captions))
    (theirs / "figures.json").write_text(json.dumps({name: {"caption": evil, "alt": f'" onload="{evil}'}}))
    write_page(frames, STUDY, theirs, theirs / "report.html")
    text = (theirs / "report.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;" in text
    assert "<sup>a</sup>" in text
    assert text.count("<script") == 1, "ours"
    assert re.search(r'<img src="h|<[^>]*"\s+onload=', text) is None


@pytest.mark.parametrize("plant", ["outside", "linked picture", "linked folder"])
def test_a_picture_from_elsewhere_on_the_disk_is_refused(
    plant: str, frames: Frames, folder: Path, tmp_path: Path
) -> None:
    theirs = tmp_path / "theirs"
    shutil.copytree(folder, theirs)
    captions = json.loads((theirs / "figures.json").read_text(encoding="utf-8"))
    name = next(iter(captions))
    for suffix in ("svg", "png"):
        (tmp_path / f"secret.{suffix}").write_text("secret", encoding="utf-8")
        if plant == "linked picture":
            (theirs / "figures" / f"{name}.{suffix}").unlink()
            (theirs / "figures" / f"{name}.{suffix}").symlink_to(tmp_path / f"secret.{suffix}")
    if plant == "outside":
        captions = {"../../secret": captions[name]}
    if plant == "linked folder":
        shutil.rmtree(theirs / "figures")
        (theirs / "figures").symlink_to(folder / "figures")
    (theirs / "figures.json").write_text(json.dumps(captions), encoding="utf-8")
    with pytest.raises(UserError, match=r"figures\.json: no picture .* lies in .*; draw the figures again"):
        write_page(frames, STUDY, theirs, theirs / "report.html")


@pytest.mark.parametrize("write", [write_tables, write_figures])
def test_nothing_is_written_through_a_link(write: Callable[..., None], frames: Frames, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "made").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="made is a link, and what is written must stay below"):
        write(frames, STUDY, tmp_path / "made")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_the_page_says_what_does_not_count_and_what_is_claimed(folder: Path) -> None:
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert "27 of 32 runs are ok; 1 disengaged, 1 oom, 3 skipped" in text
    assert "lisa on tiny, arithmetic, seed 2: disengaged — active set never rotated" in text
    assert "lora on tiny, choice, seeds 0, 1, 2: skipped — needs peft" in text
    assert re.search(r"three-step \(tiny\): grass is better than lora \(\+37\.\d points\)", text)
    assert "Temperature and refresh period are ours." in text


def test_what_was_noted_about_counted_runs_is_said_once_for_all_seeds(frames: Frames) -> None:
    noted = [line for line in flagged_runs(frames) if "collapsed: 2.10" in line]
    assert noted
    assert all(line.startswith("grass on tiny") for line in noted)
    assert len(noted) == len(STUDY.tasks)


def test_a_sampler_that_collapses_after_a_refresh_is_noted(frames: Frames) -> None:
    """The probe had found all layers alike; the last refresh gives one layer everything."""
    run = str(frames.believed.loc[frames.believed["probability"].notna(), "run"].iloc[0])
    believed = frames.believed.copy()
    last = (believed["run"] == run) & (believed["step"] == believed.loc[believed["run"] == run, "step"].max())
    believed.loc[last, "probability"] = 0.0
    believed.loc[last & (believed["layer"] == 0), "probability"] = 1.0
    before = [line for line in flagged_runs(frames) if "the sampler collapsed" in line]
    after = [line for line in flagged_runs(replace(frames, believed=believed)) if "the sampler collapsed" in line]
    assert len(after) == len(before) + 1


def test_a_caption_names_the_papers_figure_that_is_measured_anew() -> None:
    drawings = [Drawing(name=f"{kind}--tiny", caption="Losses.", alt="a", figure=None) for kind in ("loss", "results")]
    captions = [drawing.texts({"loss": "Figure 9"})["caption"] for drawing in drawings]
    assert captions == ["Figure 9 of the paper, measured anew. Losses.", "Losses."]
    assert drawings[0].texts()["caption"] == "Losses."
