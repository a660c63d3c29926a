"""`python -m harness advise`: which methods fit on a card, which should be fastest, and the code for that one."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the stage's command line."""
    parser.add_argument("--config", type=Path, default=Path("config/efficiency.yaml"), help="an efficiency study")
    parser.add_argument("--model", required=True, help="a model of the study, or a folder with a config.json")
    parser.add_argument("--vram", required=True, help="memory of the card, such as 24GiB")
    parser.add_argument("--batch", type=int, default=1, help="rows of the micro-batch")
    parser.add_argument("--length", type=int, default=1024, help="tokens a row")


def run(args: argparse.Namespace) -> int:
    """Print one row a method and setting as they come, then the best one's code; nothing is written."""
    from harness.efficiency.spec import cell_of, load_efficiency
    from harness.records.units import gib, parse_bytes
    from harness.step.spec import shape_of

    vram = parse_bytes(args.vram)
    study, shape = load_efficiency(args.config), shape_of(args.batch, args.length)
    cells = [
        (method, settings, cell_of(study, model=args.model, method=method, settings=settings, shape=shape))
        for settings in study.settings
        for method in study.methods
    ]

    from harness.forecasting.advise import CONTEXT_BYTES, OVERHEAD_FACTOR, Choice, best, choices
    from harness.forecasting.snippets import snippet

    print(f"{args.model}, {args.batch} x {args.length} tokens, a card of {gib(vram)} GiB\n")
    print(f"{'method':<16}{'settings':<10}{'peak GiB':>9}{'needs GiB':>11}  {'fits':<6}{'speed':>7}")
    found: list[Choice] = []
    for choice in choices(cells, vram_bytes=vram):
        found.append(choice)
        if choice.forecast is None or choice.cost is None or choice.needed_bytes is None:
            print(f"{choice.method:<16}{choice.settings:<10}no forecast: {choice.reason}", flush=True)
            continue
        fits = "yes" if choice.fits(vram) else "no"
        figures = f"{gib(choice.forecast.peak_bytes):>9}{gib(choice.needed_bytes):>11}  {fits:<6}"
        speed = choice.cost.tokens_per_s / next(c.cost for c in found if c.cost is not None).tokens_per_s
        print(f"{choice.method:<16}{choice.settings:<10}{figures}{speed:>7.2f}", flush=True)
    print(
        f"\nneeds: {OVERHEAD_FACTOR - 1:.0%} more than the predicted peak, and {gib(CONTEXT_BYTES)} GiB of context\n"
        "speed: relative to the first row that has one, a bound from the number of operations alone, nothing measured"
    )
    chosen = best(found, vram_bytes=vram)
    if chosen is None:
        forecast = any(choice.forecast is not None for choice in found)
        print(
            "nothing fits: try fewer tokens, a smaller model or a larger card"
            if forecast
            else "nothing could be forecast: the reasons stand in the rows above"
        )
    else:
        model = f"<a {args.model} on disk or on the hub>" if args.model in study.models else args.model
        print(f"the fastest that fits: {chosen.method}, {chosen.settings}\n\n{snippet(chosen.cell, model=model)}")
    return 0
