"""The one door to the harness: `python -m harness <stage> ...`.

Each stage is a module of `harness.stages` with `add_arguments` and `run`; only the one asked for is imported.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys

STAGES = {
    "plan": "list a study's runs, their state and their disk",
    "prefetch": "make rows, suites and fetched models ready",
    "pretrain": "pretrain a study's own small model",
    "search": "choose a learning rate",
    "fit": "forecast a run's memory, so that what cannot fit its GPU never starts",
    "train": "one training run",
    "evaluate": "score a trained model",
    "collect": "join a study's records into flat tables",
    "tables": "write a study's tables",
    "figures": "draw a study's figures",
    "page": "write a study's page",
    "publish": "copy a finished study to results/published/",
    "check": "hold one method to the contract: a table of checks",
    "forecast": "predict the peak memory of a step, without a GPU",
    "efficiency": "measure or forecast memory and speed of a step",
    "advise": "compare methods on a model and a card's memory, without a GPU",
    "schema": "write the JSON schemas of configs and records",
}


def main(arguments: list[str] | None = None) -> int:
    """Run one stage; a complaint about input is one line on stderr and exit code 2."""
    words = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m harness",
        epilog="\n".join(f"  {name:<10}{what}" for name, what in STAGES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stage", choices=STAGES, metavar="stage", help="one of those below")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="the stage's own arguments; try `<stage> --help`")
    chosen = parser.parse_args(words)
    # before torch is imported: a thread pool the size of the machine slows two jobs side by side by a factor of 40
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    stage = importlib.import_module(f"harness.stages.{chosen.stage}")
    own = argparse.ArgumentParser(prog=f"python -m harness {chosen.stage}", description=stage.__doc__)
    stage.add_arguments(own)
    from harness.study.strict_yaml import ConfigError

    try:
        return int(stage.run(own.parse_args(chosen.rest)))
    except BrokenPipeError:
        # `plan | head`: the reader has seen enough; Python's own flush at exit must not complain either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ConfigError, ValueError) as error:
        print(f"harness {chosen.stage}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
