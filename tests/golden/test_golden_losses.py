"""The first eight training losses of every method, as they were when somebody last looked at them and found them right.

A change of these numbers is a change of what the methods do. Where it is wanted, write them anew and say why in the
commit (torch's own kernels may move them too: the file says which version made them):

    python tests/golden/test_golden_losses.py
"""

from __future__ import annotations

import json
import math
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.checking.tiny import tiny_inputs, tiny_training
from harness.records.atomic import write_text
from harness.records.reading import read_jsonl
from harness.training.loading import Inputs
from harness.training.loop import train

from baselines import find_method, method_names

FILE = Path(__file__).with_name("losses.json")
STEPS = 8
RTOL = 1e-4
"""Another machine's or torch's rounding stays well below this after eight steps; another rule does not."""


def cases() -> list[tuple[str, dict[str, Any]]]:
    """Every example of every method that takes steps."""
    return [
        (module, options)
        for module in method_names()
        if find_method(module).TRAINS
        for options in find_method(module).EXAMPLES
    ]


def name_of(module: str, options: dict[str, Any]) -> str:
    """The method and its options, as one reads them in the config."""
    return f"{module} {json.dumps(options, sort_keys=True)}"


def losses(module: str, options: dict[str, Any], inputs: Inputs, folder: Path) -> list[float]:
    """Mean loss per label token of each step (nats)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            # a random model's layers matter alike, and have no outliers
            warnings.filterwarnings("ignore", message="GRASS |OWS ")
            method = find_method(module)
            record = train(
                tiny_training(module, options, steps=STEPS, **method.EXAMPLE_RECIPE),
                name=module, lr=method.EXAMPLE_LR, lr_searched=False, seed=0, inputs=inputs, folder=folder,
            )  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    assert record.status == "ok", record.status_why
    return [step["loss"] for step in read_jsonl(folder / "steps.jsonl")]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return tiny_inputs(tmp_path_factory.mktemp("golden"))


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return loaded


def test_every_method_has_its_golden_losses_and_no_other_does(golden: dict[str, Any]) -> None:
    assert set(golden["losses"]) == {name_of(module, options) for module, options in cases()}, (
        "methods or examples changed: python tests/golden/test_golden_losses.py"
    )


@pytest.mark.parametrize(("module", "options"), cases(), ids=lambda v: v if isinstance(v, str) else "")
def test_the_first_losses_are_the_golden_ones(
    module: str, options: dict[str, Any], golden: dict[str, Any], inputs: Inputs, tmp_path: Path
) -> None:
    expected = golden["losses"].get(name_of(module, options))
    assert expected is not None, "no golden losses of this method: python tests/golden/test_golden_losses.py"
    found = losses(module, options, inputs, tmp_path)
    wrong = [i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if not math.isclose(a, b, rel_tol=RTOL)]
    assert not wrong, (
        f"from step {wrong[0]} on: {found}, golden {expected} (torch {torch.__version__}, golden {golden['torch']})"
    )


def test_no_two_methods_have_the_same_golden_losses(golden: dict[str, Any]) -> None:
    """Equal to the last digit after the first update would mean that an option does nothing.

    The tolerance is wider than that: dropout of 0.1, or GRASS without its refresh, lie within it in eight steps. The
    contract suite tells those apart.
    """
    after_first = [tuple(values[1:]) for values in golden["losses"].values()]
    assert len(set(after_first)) == len(after_first)


def regenerate() -> None:
    """Write losses.json from today's code."""
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        inputs = tiny_inputs(Path(scratch) / "inputs")
        found = {
            name_of(module, options): [
                round(loss, 6) for loss in losses(module, options, inputs, Path(scratch) / str(number))
            ]
            for number, (module, options) in enumerate(cases())
        }
    about = {
        "what": f"mean nats per label token of the first {STEPS} steps on harness.checking.tiny, seed 0",
        "made by": "python tests/golden/test_golden_losses.py",
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }
    lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(values)}" for name, values in found.items())
    head = json.dumps(about, indent=2)[:-2]
    write_text(FILE, f'{head},\n  "losses": {{\n{lines}\n  }}\n}}\n')
    print(f"{len(found)} methods written to {FILE}")


if __name__ == "__main__":
    regenerate()
