"""The only entry point of the harness: `python -m harness <stage> ...`.

Each stage is a module of `harness.stages` with `add_arguments` and `run`; only the one asked for is imported. A job of
a study also says with `output` what it writes: of two processes with one output, the second one waits.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from contextlib import nullcontext
from pathlib import Path

from harness.errors import OWN_FAULT, UserError, missing_package, without_secrets
from harness.records.locks import one_at_a_time
from harness.sign import signing
from harness.stderr import copied_stderr

STAGES = {
    "plan": "list a study's runs, their state and their disk",
    "rehearse": "make a study small, on random models of its architectures, to see it through before it is run",
    "status": "what a study under way does now: done, running, failed",
    "prefetch": "make rows, suites and fetched models ready",
    "pretrain": "pretrain a study's own small model",
    "probe": "measure the importance of an untrained model's layers",
    "search": "choose a learning rate",
    "train": "one training run",
    "evaluate": "score a trained model",
    "collect": "join a study's records into flat tables",
    "tables": "write a study's tables",
    "figures": "draw a study's figures",
    "page": "write a study's page",
    "partial": "write tables, figures and page of what is there, where jobs failed",
    "publish": "copy a finished study to results/published/",
    "check": "hold one method to the contract: a table of checks",
    "forecast": "predict the peak memory of a step or of a study's run, without a GPU",
    "efficiency": "measure or forecast memory and speed of a step",
    "advise": "compare methods on a model and a card's memory, without a GPU",
    "schema": "write the JSON schemas of configs and records",
}


def main(arguments: list[str] | None = None) -> int:
    """Run one stage.

    Returns:
        The stage's own exit code; 2 after a mistake of the user's, shown as one line on stderr; 1 after a bug in this
        project, shown with its traceback.
    """
    words = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m harness",
        epilog="\n".join(f"  {name:<12}{what}" for name, what in STAGES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stage", choices=STAGES, metavar="stage", help="one of those below")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="the stage's own arguments; try `<stage> --help`")
    chosen = parser.parse_args(words)
    of_all = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    of_all.add_argument("--log", type=Path, metavar="FILE", help="a copy of all that is said on stderr, begun anew")
    log = of_all.parse_known_args(chosen.rest)[0].log
    # set before torch is imported: with one thread per core, two parallel jobs slow each other down by a factor of 40
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        with nullcontext() if log is None else copied_stderr(log):
            return _run(chosen.stage, chosen.rest, of_all)
    except UserError as error:  # of the log
        _complain(chosen.stage, str(error))
        return 2


def _run(name: str, words: list[str], of_all: argparse.ArgumentParser) -> int:
    try:
        stage = importlib.import_module(f"harness.stages.{name}")
        own = argparse.ArgumentParser(prog=f"python -m harness {name}", description=stage.__doc__, parents=[of_all])
        stage.add_arguments(own)
        args = own.parse_args(words)
        output = stage.output(args) if hasattr(stage, "output") else None
        with nullcontext(True) if output is None else one_at_a_time(output) as to_do:
            if not to_do:
                return 0
            with nullcontext() if output is None else signing(output):
                return int(stage.run(args))
    except BrokenPipeError:
        # as in `plan | head`: the reader closed the pipe; Python's own flush at exit must not fail either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except UserError as error:
        _complain(name, str(error))
        return 2
    except ModuleNotFoundError as error:
        package = missing_package(error)
        if package is None:
            return _own_fault(name)
        _complain(name, f"the package {package} is not installed: pip install 'grass-bench[bench]'")
        return 2
    except KeyboardInterrupt:
        _complain(name, "stopped by SIGINT")
        return 130
    except Exception:  # noqa: BLE001  this is the outermost frame: print every error in full
        return _own_fault(name)


def _complain(stage: str, message: str) -> None:
    print(f"harness {stage}: {' '.join(message.splitlines())}", file=sys.stderr)


def _own_fault(stage: str) -> int:
    sys.stderr.write(without_secrets(traceback.format_exc()))
    _complain(stage, OWN_FAULT)
    return 1


if __name__ == "__main__":
    sys.exit(main())
