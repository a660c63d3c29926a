"""`python -m harness advise`: which methods fit on a card, which should be fastest, and the code for that one."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from harness.errors import UserError

if TYPE_CHECKING:
    from harness.efficiency.advice import Advice, Option
    from harness.efficiency.spec import EfficiencyStudy


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the stage's command line."""
    parser.add_argument("--config", type=Path, default=Path("config/efficiency.yaml"), help="an efficiency study")
    parser.add_argument(
        "--model", required=True, help="a model of the study, a folder with a config.json, or <org>/<name> of the hub"
    )
    parser.add_argument("--vram", required=True, help="memory of the card, such as 24GiB")
    parser.add_argument("--batch", type=int, default=1, help="rows of the micro-batch")
    parser.add_argument("--length", type=int, default=1024, help="tokens a row")
    parser.add_argument("--cores", type=int, default=2, help="forecasts side by side")
    parser.add_argument("--out", type=Path, default=Path("results/advice"), help="folder that keeps the forecasts")


def run(args: argparse.Namespace) -> int:
    """Print what fits, what does not, what could not be forecast, and the best one's code; 1 after a fault of ours."""
    from harness.efficiency.advice import advise
    from harness.efficiency.spec import load_efficiency
    from harness.forecasting.snippets import snippet
    from harness.records.units import gib, parse_bytes
    from harness.step.spec import shape_of

    vram = parse_bytes(args.vram)
    if args.cores < 1:
        raise UserError(f"--cores {args.cores}: must be at least 1")
    study, shape = load_efficiency(args.config), shape_of(args.batch, args.length)
    found = advise(
        study, model=args.model, shape=shape, vram_bytes=vram, folder=args.out, cores=args.cores, told=_progress
    )
    print(f"{args.model}: one step of {args.batch} x {args.length} tokens on a card of {gib(vram)} GiB")
    for line in _answer(study, found):
        print(line)
    if found.fitting:
        best = found.fitting[0]
        model = f"<a {args.model}: its folder, or its name on the hub>" if args.model in study.models else args.model
        print(f"\n# {best.method}, {best.settings}\n{snippet(best.cell, model=model)}")
    return 0 if all(option.record is not None for option in found.options) else 1


def _progress(total: int) -> Callable[[str], None]:
    """Counts forecasts as they are made."""
    from harness.progress import Progress

    progress = Progress(total, "advise", unit="forecast")
    return lambda line: progress.advance()


def _answer(study: EfficiencyStudy, found: Advice) -> Iterator[str]:
    """The tables, the most wanted first."""
    from harness.forecasting.needed import CONTEXT_BYTES, OVERHEAD_FACTOR
    from harness.records.units import gib

    fitting, too_large, all_settings = found.fitting, found.too_large, list(study.settings)
    unit = next((option.tokens_per_s for option in found.options if option.tokens_per_s), 1.0)
    needs = "".join(f"{f'GiB {settings}':>12}" for settings in all_settings)
    if fitting:
        yield f"the fastest that fits: {fitting[0].method}, {fitting[0].settings}; its code stands below"
        yield f"\nfits, fastest first\n  {'method':<16}{'take':<8}{'speed':>7}{needs}"
        for option in fitting:
            row = f"{option.method:<16}{option.settings:<8}{option.tokens_per_s / unit:>7.2f}"
            yield f"  {row}{_needs(found, option, all_settings)}"
    elif too_large:
        least = too_large[0]
        yield (
            f"nothing fits: the least is {gib(least.needed_bytes or 0)} GiB, of {least.method}, {least.settings}; try "
            "fewer tokens, a smaller model or a larger card"
        )
    else:
        yield "nothing could be forecast, so nothing is known of what fits; the reasons:"
    if too_large:
        yield f"\ndoes not fit, smallest first\n  {'method':<16}{'lacks GiB':<15}{needs}"
        for option in too_large:
            lacks = gib((option.needed_bytes or 0) - found.vram_bytes)
            yield f"  {option.method:<16}{f'{lacks} {option.settings}':<15}{_needs(found, option, all_settings)}"
    if found.reasons:
        yield "\nno forecast"
        for why, options in found.reasons.items():
            yield f"  {', '.join(_under(options, all_settings))}: {why}"
    if fitting or too_large:
        yield (
            f"\nGiB: what the card must have, {OVERHEAD_FACTOR - 1:.0%} more than the predicted peak and "
            f"{gib(CONTEXT_BYTES)} GiB of context; under each of the settings"
        )
        for label, settings in study.settings.items():
            checkpoints, chunks = settings.activation_checkpointing, settings.chunked_loss
            yield (
                f"  {label}: {'with' if checkpoints else 'without'} activation checkpointing, "
                f"{'the loss in chunks' if chunks else 'the loss at once'}"
            )
        yield (
            "speed: tokens a second relative to the first method of the study that has a forecast, a bound from the "
            "number of operations alone, nothing measured. How well a method learns is not in this order."
        )


def _needs(found: Advice, option: Option, all_settings: list[str]) -> str:
    """Memory under each of the settings."""
    from harness.records.units import gib

    every = (found.of(option.method, settings).needed_bytes for settings in all_settings)
    return "".join(f"{'-' if needed is None else gib(needed):>12}" for needed in every)


def _under(options: list[Option], all_settings: list[str]) -> Iterator[str]:
    """Methods, with the settings where it is not the same under all of them."""
    for method in dict.fromkeys(option.method for option in options):
        under = [option.settings for option in options if option.method == method]
        yield method if len(under) == len(all_settings) else f"{method} ({', '.join(under)})"
