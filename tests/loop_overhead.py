"""What the harness's training loop costs beside a bare one: `python -m tests.loop_overhead [--rounds 3] [--out FILE]`.

Both train the same random Llama of about 30 M parameters on the same batches, by AdamW with clipping and a linear
schedule, on one thread; whole loops take turns in one process. The harness's is `harness.training.loop.train` itself,
from its first step to its last: with everything that watches a run, without and with the observer's probe, without and
with resume states. Shown are ratios of processor time. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "workflow"), str(ROOT)]

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
from harness.checking.tiny import tiny_training  # noqa: E402
from harness.inputs.generated import training_rows  # noqa: E402
from harness.inputs.tokenizer import build_tokenizer  # noqa: E402
from harness.measuring.processors import ProcessorTime, crowded_why  # noqa: E402
from harness.records.atomic import write_json  # noqa: E402
from harness.step.loss import loss_of  # noqa: E402
from harness.study.jobs import Training  # noqa: E402
from harness.study.spec import Observation  # noqa: E402
from harness.training import loop  # noqa: E402
from harness.training.loading import Inputs, load  # noqa: E402
from harness.training.schedule import lr_factor  # noqa: E402

WIDTH, LAYERS, LR = 512, 10, 3e-4
ROWS, STEPS, CHECKPOINT = 4, 60, 30
OBSERVED = Observation(every_steps=25, rows=4)
"""As config/quick.yaml has it: a step's rows, at every 25th step."""
ALLOWED = 1.02
"""Of the loop that watches, without the observer's probe, which is a measurement of its own."""


def write_inputs(folder: Path) -> Inputs:
    """A random model with the embedded study's tokenizer, and arithmetic rows."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=1376, num_hidden_layers=LAYERS,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=128, tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for split in ("train", "validation"):
        rows = training_rows("arithmetic", split=split, count=ROWS * (STEPS + 1), seed=1)  # type: ignore[arg-type]
        write_json(folder / "rows" / f"{split}.json", rows)
    return Inputs(model=folder / "model", rows=folder / "rows")


def bare(training: Training, inputs: Inputs) -> Callable[[], Callable[[], float]]:
    """A loop as one would write it: prepared by the first call, run by the second, which returns the last loss."""

    def prepare() -> Callable[[], float]:
        run = load(training, lr=LR, seed=0, inputs=inputs, observation=None)
        model, recipe, loss_sum = run.module, training.recipe, loss_of(chunked=False, autocast=False)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)
        model.train()

        def train() -> float:
            value = 0.0
            for step in range(recipe.steps):
                for group in optimizer.param_groups:
                    group["lr"] = LR * lr_factor(step, recipe)
                (batch,) = run.batches.step(step)
                loss = loss_sum(model, batch) / run.batches.label_tokens(step)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                value = float(loss.detach())
            return value

        return train

    return prepare


def harness_run(training: Training, inputs: Inputs, **named: Any) -> tuple[ProcessorTime, float, float]:
    """Processor time and wall time of the steps of a whole run, and its last loss."""
    spent: list[tuple[ProcessorTime, float]] = []
    steps = loop._Run._train

    def timed(*given: Any, **more: Any) -> None:
        began, at = ProcessorTime.now(), time.perf_counter()
        steps(*given, **more)
        spent.append((ProcessorTime.now().since(began), time.perf_counter() - at))

    with mock.patch.object(loop._Run, "_train", timed):
        record = loop.train(
            training, name="benchmark", lr=LR, lr_searched=False, seed=0, inputs=inputs, folder=None,
            checkpoint_every=CHECKPOINT, **named,
        )  # fmt: skip
    assert record.status == "ok", record.status_why
    ((used, wall),) = spent
    assert record.train_loss is not None
    return used, wall, record.train_loss


def bare_run(prepare: Callable[[], Callable[[], float]]) -> tuple[ProcessorTime, float, float]:
    """The same of the bare loop."""
    train = prepare()
    began, at = ProcessorTime.now(), time.perf_counter()
    loss = train()
    return ProcessorTime.now().since(began), time.perf_counter() - at, loss


def measure(rounds: int, folder: Path) -> str:
    """All loops by turns; a page."""
    torch.set_num_threads(1)
    inputs = write_inputs(folder)
    recipe = {"steps": STEPS, "batch_size": ROWS, "micro_batch_size": ROWS, "max_length": 48}
    training = tiny_training("full", {}, **recipe)
    turns: dict[str, Callable[[], tuple[ProcessorTime, float, float]]] = {
        "bare loop, torch AdamW fused": lambda: bare_run(bare(training, inputs)),
        "harness, all that watches": lambda: harness_run(training, inputs),
        "and resume states": lambda: harness_run(
            training, inputs, state_folder=Path(tempfile.mkdtemp(dir=folder)) / "state"
        ),
        "and the observer's probe": lambda: harness_run(training, inputs, observation=OBSERVED),
    }
    spent: dict[str, list[float]] = {name: [] for name in turns}
    disturbed: list[str] = []
    for number in range(rounds):
        for name in list(turns)[:: -1 if number % 2 else 1]:
            used, wall, _ = turns[name]()
            spent[name].append(used.ran_s)
            if why := crowded_why(ran_s=used.ran_s, waited_s=used.waited_s, wall_s=wall):
                disturbed.append(why)
            print(f"round {number + 1}, {name}: {used.ran_s:.2f} s of processor time, {wall:.2f} s", flush=True)
    bare_s = spent["bare loop, torch AdamW fused"]
    lines = [
        "# What the harness's training loop costs",
        "",
        f"Made by `python -m tests.loop_overhead --rounds {rounds}`: a Llama of width {WIDTH} and {LAYERS} layers, "
        f"fp32, {STEPS} steps of {ROWS} rows, one thread; whole loops by turns in one process, {rounds} rounds.",
        "",
        "| loop | processor time, s (median) | to the bare loop (median, least to most) |",
        "| --- | --- | --- |",
    ]
    for name, seconds in spent.items():
        pairs = sorted(a / b for a, b in zip(seconds, bare_s, strict=True))
        ratio = f"{median(pairs):.3f} ({pairs[0]:.3f} to {pairs[-1]:.3f})"
        lines.append(f"| {name} | {median(seconds):.2f} | {ratio if name != next(iter(spent)) else '1'} |")
    lines += [
        "",
        f"Allowed is {ALLOWED} for the loop that watches. The observer's probe, {OBSERVED.rows} rows at every "
        f"{OBSERVED.every_steps}th step, is a measurement that a study asks for; resume states are written every "
        f"{CHECKPOINT} steps here, every 100 in a study. Neither counts in a run's tokens/s.",
        "",
        f"{len(disturbed)} of {rounds * len(turns)} loops were disturbed by other work"
        + (f", the last one: {disturbed[-1]}." if disturbed else "."),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure, print, and write where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        page = measure(given.rounds, Path(folder))
    print(page)
    if given.out is not None:
        given.out.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
