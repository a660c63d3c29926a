"""`python -m harness rehearse`: a study made small, on random models of its architectures, to see it through first."""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the stage's command line."""
    parser.add_argument("--config", type=Path, required=True, help="config/<study>.yaml")
    parser.add_argument("--out", type=Path, default=Path("rehearsal"), help="folder for its file and its models")
    parser.add_argument("--steps", type=_number, default=8, help="optimizer steps of a run (default: 8)")
    parser.add_argument("--rows", type=_number, default=128, help="training rows of a task (default: 128)")
    parser.add_argument("--items", type=_number, default=3, help="test items of a suite (default: 3)")
    parser.add_argument("--seeds", type=_number, default=2, help="of the study's seeds, the first ones (default: 2)")
    parser.add_argument("--new-tokens", type=_number, default=16, help="written for a test item (default: 16)")
    parser.add_argument("--batch", type=_number, default=2, help="rows of an optimizer step (default: 2)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")


def _number(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: a number from 1 on is wanted")
    return number


def run(args: argparse.Namespace) -> int:
    """Write the small study and its models; print the command that runs it."""
    import torch
    import yaml

    from harness.inputs.hub_models import find_without_weights
    from harness.inputs.stand_ins import write_stand_in
    from harness.records.atomic import write_text
    from harness.study.config import load_study
    from harness.study.paths import resolve
    from harness.study.rehearsal import Cut, rehearsal_of, stand_in_of
    from harness.study.sources import HubModel, PretrainedHere

    study = load_study(args.config)
    cut = Cut(
        steps=args.steps,
        train_rows=args.rows,
        items=args.items,
        seeds=args.seeds,
        new_tokens=args.new_tokens,
        batch_size=args.batch,
        device=args.device or ("cuda" if torch.cuda.is_available() else "cpu"),
    )
    mirror, models = args.out / "mirror", args.out / "models"
    for label, source in study.models.items():
        target = stand_in_of(source, label, mirror=mirror, models=models)
        if isinstance(source, PretrainedHere) or target is None:
            print(f"{label}: pretrained by the study itself, as it is")
            continue
        folder = find_without_weights(source) if isinstance(source, HubModel) else resolve(source.path)
        print(f"{label}: {write_stand_in(folder, target):,} parameters, random, in {target}")
    made = rehearsal_of(study, cut, models=models)
    file = args.out / f"{made['study']}.yaml"
    write_text(file, yaml.safe_dump(made, sort_keys=False, allow_unicode=True, width=120))
    given = {name: os.environ[name] for name in study.inputs if name in os.environ}
    settings = {"STUDY": file, "MIRROR": mirror, **given}
    words = " ".join(shlex.quote(f"{name}={value}") for name, value in settings.items())
    print(f"\n{file} is written. See it through, from prefetch to page:\n\n  snakemake --cores 2 --config {words}")
    return 0
