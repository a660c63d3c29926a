"""The page in a real browser: a click sorts a table, words typed above it hide rows, and nothing is fetched."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import reporting_data as data
from harness.reporting.figures import write_figures
from harness.reporting.frames import write_frames
from harness.reporting.page import write_page
from harness.reporting.tables import write_tables
from harness.study.views import View

pytestmark = pytest.mark.usefixtures("empty_figures")

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
VIEW = View(
    title="By name", task="arithmetic", columns={"two steps": {"suites": ("two-step",)}},  # type: ignore[dict-item]
)  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    study = data.study().model_copy(update={"published": None, "views": {"by-name": VIEW}})
    frames, made = data.frames(), tmp_path_factory.mktemp("study")
    write_frames(frames, made)
    write_figures(frames, study, made / "figures")
    write_tables(frames, study, made / "tables")
    write_page(frames, study, made, made / "report.html")
    return (made / "report.html").read_text(encoding="utf-8")


def after(page: str, action: str, folder: Path, width: int) -> list[list[str]]:
    """Cells of the table by name once `action` was done in a browser; hidden rows are left out."""
    (folder / "page.html").write_text(
        page.replace(
            "</body>", f"<script>const figure = document.querySelector('#tables figure');{action}</script></body>"
        ),
        encoding="utf-8",
    )
    assert BROWSER is not None
    done = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
            f"--window-size={width},900", "--dump-dom", (folder / "page.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    table = done.stdout.split('id="tables"')[1].split("</table>")[0]
    rows = re.findall(r"<tr(?! hidden)[^>]*>(.*?)</tr>", table.split("<tbody>")[1], re.S)
    return [re.findall(r"<td[^>]*>(.*?)</td>", row, re.S) for row in rows]


def click(column: int, times: int = 1) -> str:
    return f"for (let i = 0; i < {times}; i++) figure.querySelectorAll('th')[{column}].click();"


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_a_click_on_a_head_sorts_by_that_column(page: str, tmp_path: Path, width: int) -> None:
    def numbers(rows: list[list[str]]) -> list[float]:
        return [float(row[2].split()[0]) for row in rows]

    as_written = after(page, "", tmp_path, width)
    first, second, third = (after(page, click(2, times), tmp_path, width) for times in (1, 2, 3))
    assert numbers(first) == sorted(numbers(as_written)) != numbers(as_written)
    assert numbers(second) == sorted(numbers(as_written), reverse=True)
    assert third == as_written


@needs_browser
def test_unknown_values_stay_at_the_end(page: str, tmp_path: Path) -> None:
    with_dash = page.replace(
        "</body>", "<script>document.querySelector('#tables td:nth-child(3)').textContent = '\u2014'</script></body>"
    )
    for times in (1, 2):
        assert after(with_dash, click(2, times), tmp_path, 1280)[-1][2] == "\u2014"


@needs_browser
def test_words_above_a_long_table_hide_the_other_rows(page: str, tmp_path: Path) -> None:
    long = (
        "const field = document.querySelector('#made input');"
        "field.value = 'lora arithmetic'; field.dispatchEvent(new Event('input'));"
        "figure.querySelector('tbody').replaceChildren(...document.querySelectorAll('#made tbody tr:not([hidden])'));"
    )
    shown = after(page, long, tmp_path, 1280)
    assert len(shown) == len(data.SEEDS)
    assert all("lora" in "".join(row) and "arithmetic" in "".join(row) for row in shown)


def test_the_box_answers_first(page: str) -> None:
    box = page.split("<aside")[1].split("</aside>")[0]
    assert page.index("<aside") < page.index("<section") < page.index('id="scope"')
    said = re.findall(r"<li>(.*?)</li>", box)
    assert 0 < len(said) <= 10
    assert re.match(
        r"Accuracy, 12 comparisons of grass: better in \d+ \(.*\), by [\d.]+ to [\d.]+ points; no claim", said[0]
    )
