"""Pages for people: links lead somewhere, and what silently goes wrong is said with a check and a source."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from house import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob(".github/**/*.md")])
FOOTGUNS = (ROOT / "docs" / "footguns.md").read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_the_project_lead_somewhere(page: Path) -> None:
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        if not re.match(r"\w+:", target):
            file = page.parent / path if path else page
            if not file.exists() or (anchor and anchor not in anchors(file)):
                dead.append(target)
    assert not dead


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_that_a_page_names_are_there(page: Path) -> None:
    missing = []
    for path, name in re.findall(r"\b(tests/[\w/]+\.py)(?:::(\w+))?", page.read_text(encoding="utf-8")):
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8")) if (ROOT / path).is_file() else None
        functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)} if tree else set()
        if tree is None or (name and name not in functions):
            missing.append(f"{path}::{name}")
    assert not missing


def test_every_footgun_has_a_check_and_a_source() -> None:
    entries = re.split(r"\n(?=\*\*)", FOOTGUNS.partition("## Our own limits")[0])[1:]
    assert len(entries) > 20
    for entry in entries:
        assert entry.count("\n- *Check:*") == entry.count("\n- *Source:*") == 1, entry


def test_what_the_page_of_faults_quotes_is_in_the_code() -> None:
    files = [path for folder in ("workflow/harness", "baselines", "grass") for path in (ROOT / folder).rglob("*.py")]
    code = re.sub(r'"\s*\n\s*f?"', "", "\n".join(path.read_text(encoding="utf-8") for path in files))
    rows = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8").splitlines()[6:]
    assert len(rows) > 30
    for row in rows:
        _, _, met, test, _ = row.split("|")
        assert "::test_" in test, row
        missing = [quoted for quoted in re.findall(r"`([^`]+)`", met) if quoted not in code]
        assert not missing, row


def test_our_own_limits_are_said() -> None:
    assert FOOTGUNS.partition("## Our own limits")[2].count("\n- ") >= 5


def test_ci_runs_what_everybody_runs_and_names_no_registry() -> None:
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert "://" not in text
    steps = yaml.safe_load(text)["jobs"]["check"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]
    cached = next(step["with"] for step in steps if "cache" in step.get("with", {}))["cache-dependency-path"]
    assert all((ROOT / file).is_file() for file in cached.split())


def test_the_issue_form_asks_for_what_a_row_can_be_judged_by() -> None:
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "report.yml").read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= form.keys()
    assert [field["id"] for field in form["body"]] == ["ran", "row", "expected", "plan", "versions"]


def test_every_folder_of_the_project_stands_in_the_layout() -> None:
    """What a trial leaves in the tree is noticed before it stays: weights, states, folders that no page names."""
    told = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if told.returncode:
        pytest.skip("no checkout of git")
    files = [Path(line) for line in told.stdout.splitlines()]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w-]+)/", readme[readme.index("## Layout") :]))
    folders = {file.parts[0] for file in files if len(file.parts) > 1 and not file.parts[0].startswith(".")}
    assert folders <= named
    assert [str(file) for file in files if file.suffix in {".safetensors", ".pt", ".pth", ".bin"}] == []
