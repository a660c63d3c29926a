"""`python -m tests.fuzz`: thousands of changed files of every kind, and how the harness answers them.

Prints a table as in results/published/fuzz.md, then an example of everything that is neither a valid result nor one
sentence; the exit code is 1 if there is any.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from tests.fuzz.judging import fuzzed
from tests.fuzz.kinds import kinds


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--examples", type=int, default=1000, help="changed files of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="kinds whose name begins so")
    args = parser.parse_args()
    print("| kind of file | examples | valid | one sentence | foreign |\n|---|---|---|---|---|", flush=True)
    foreign: list[str] = []
    for kind in kinds():
        if kind.name.startswith(args.only):
            tally = fuzzed(kind, args.examples, start=args.seed)
            ends = [tally.ends[end] for end in ("valid", "one sentence", "foreign")]
            print(f"| {kind.name} | {' | '.join(map(str, [sum(ends), *ends]))} |", flush=True)
            foreign += [f"{kind.name}: {example}" for example in tally.foreign.values()]
    print("".join(f"\n{example}\n" for example in foreign), end="")
    return bool(foreign)


if __name__ == "__main__":
    sys.exit(main())
