"""Resources of each job, as upper bounds from its spec alone: host memory, time, GPUs. Imports no torch.

A cluster scheduler kills a job that exceeds its request, so every figure errs on the large side: it follows from
arithmetic and from rates of slow machines (a newer card takes a tenth of the time). A killed job resumes where it
stopped: runs have resume state, searches keep finished trials. On a single machine the figures have no effect:
Snakemake does not track memory and time there, and the harness leases the GPU itself.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from baselines import find_method
from baselines.method import Recipe
from harness.errors import UserError
from harness.records.inputs import ModelRecord
from harness.records.reading import read
from harness.records.units import GIB
from harness.study.jobs import MODEL, EvalJob, ModelJob, ProbeJob, SearchJob, SuiteJob, Training
from harness.study.paths import Paths, mirrored, resolve
from harness.study.sources import GeneratedSuite, HubModel, LmEvalSuite, LocalModel, PretrainedHere

BASE_BYTES = 8 * GIB
"""A process with torch, transformers and a GPU's context (3 to 4 GiB), rows, and the activations of models so small
that they train on a CPU."""
START_S = 900.0
"""Imports, loading weights from a slow disk, saving them again."""
UNKNOWN_PARAMETERS = 9_000_000_000
"""Assumed for a hub model that has not been fetched yet and whose name has no size: the 8B class. A larger model needs
more."""
NAMES_ROUND_DOWN = 1.3
"""Most parameters of a model, by those in its name."""
_SIZE = re.compile(r"(?<![A-Za-z0-9.])(?:(\d+)x)?(\d+(?:\.\d+)?)([BbMm])(?![A-Za-z0-9])")
ADAPTER_SHARE = 0.1
"""Upper bound of adapters' parameters, as a share of the model's: rank 128 on five matrices a layer of Llama-2-7B has
0.04."""
UNKNOWN_ROWS = 11_000
"""Assumed rows of a test file without a limit: HellaSwag, the largest of the protocol, has 10,042."""
UNKNOWN_TOKENS = 256
"""Assumed length of an answer in a task of lm-eval: its own default."""
MOST_CHOICES = 5
"""Assumed answers to choose among: the most in the files of the protocol."""
VOCABULARY = 1_000
"""Upper bound for a model pretrained here: its tokenizer has letters, digits and some hundred words."""
WEIGHT_BYTES = {"fp32": 4, "bf16": 2}
MOMENT_BYTES = {**WEIGHT_BYTES, "int8": 1.1}
"""With int8, codes and scales are 1.02; tensors too small for them are few in a model that fills memory."""
_FETCHED_BYTES_PER_S, _READ_BYTES_PER_S = 2e7, 2e8
"""Of a model's files, over the network and from a disk."""
_TRAIN_FLOP, _READ_FLOP = 8.0, 2.0
"""FLOP per parameter and token: forward, recomputed forward and backward; and forward alone."""


@dataclass(frozen=True)
class Pace:
    """How fast a machine is."""

    step_s: float
    """Overhead of one optimizer step beyond its arithmetic: launches, copies, logs; also of one generated token."""
    flop_per_s: Mapping[tuple[str, str], float]
    """By device and weight dtype."""

    def of(self, recipe: Recipe) -> float:
        """FLOP per second of a run."""
        return self.flop_per_s[recipe.device, recipe.compute_dtype or recipe.weight_dtype]


SLOW = Pace(
    step_s=0.2,
    flop_per_s={("cpu", "fp32"): 3e9, ("cpu", "bf16"): 1e9, ("cuda", "fp32"): 1e13, ("cuda", "bf16"): 6e13},
)
"""One slow core; on a GPU half of an A100's peak without TF32, and a fifth of its peak in bf16: an upper bound."""
USUAL = Pace(
    step_s=0.03,
    flop_per_s={("cpu", "fp32"): 3e10, ("cpu", "bf16"): 1e10, ("cuda", "fp32"): 1.5e13, ("cuda", "bf16"): 1.5e14},
)
"""One core of today; on a GPU three quarters of an A100's peak without TF32, and half of its peak in bf16: a guess."""


@dataclass(frozen=True)
class Needs:
    """Upper bounds of one job."""

    mem_mb: int
    """Host memory, in Snakemake's unit."""
    minutes: int
    gpus: int = 0
    seconds: float = 0.0
    """Time without the reserve for a slow start that `minutes` has."""


SMALL = Needs(mem_mb=8_000, minutes=30)
"""Needs of a job that makes files, tables or figures from rows or records, or forecasts on fake tensors."""

SHORT_MINUTES = 60
"""Most minutes of a scoring that a cluster is given in a group with others."""


def of_model(job: ModelJob, paths: Paths, *, pace: Pace = SLOW) -> Needs:
    """Pretraining, hashing or fetching a model."""
    source = job.source
    if not isinstance(source, PretrainedHere):
        fetched = isinstance(source, HubModel)
        seconds = 2 * parameters(job, paths) / (_FETCHED_BYTES_PER_S if fetched else _READ_BYTES_PER_S)
        return Needs(mem_mb=SMALL.mem_mb, minutes=120 if fetched else 60, seconds=seconds)
    count = parameters(job, paths)
    step_s = pace.step_s + _TRAIN_FLOP * count * source.rows * source.length / pace.flop_per_s["cpu", "fp32"]
    return _needs(held_bytes=20 * count, seconds=source.steps * step_s)


def of_training(training: Training, paths: Paths, *, runs: int = 1, processes: int = 1, pace: Pace = SLOW) -> Needs:
    """Training runs one after the other, each in one process or in several that share its steps.

    The host holds at most: the weights while they are loaded and saved, their gradients if training runs on the CPU,
    and both moments of every parameter, which methods that offload keep there.
    """
    recipe = training.recipe
    count = parameters(training.model, paths)
    weight, state = WEIGHT_BYTES[recipe.weight_dtype], MOMENT_BYTES[recipe.state_dtype]
    step_s = pace.step_s + _TRAIN_FLOP * count * recipe.batch_size * recipe.max_length / pace.of(recipe)
    return _needs(
        held_bytes=processes * (3 * weight + 2 * state) * count + (processes - 1) * BASE_BYTES,
        seconds=runs * recipe.steps * step_s if find_method(training.module).TRAINS else 0.0,
        gpus=processes * (recipe.device == "cuda"),
    )


def of_probe(job: ProbeJob, paths: Paths, *, pace: Pace = SLOW) -> Needs:
    """Forward and backward passes of a probe; at most one gradient is alive at a time."""
    count = parameters(job.model, paths)
    flop = _TRAIN_FLOP * count * job.probes.rows * job.max_length
    batch_s = pace.step_s + flop / pace.flop_per_s[job.device, job.weight_dtype]
    return _needs(
        held_bytes=2 * WEIGHT_BYTES[job.weight_dtype] * count,
        seconds=job.probes.batches * batch_s,
        gpus=int(job.device == "cuda"),
    )


def of_search(search: SearchJob, paths: Paths) -> Needs:
    """Every trial of a search, with all extensions of its grid."""
    trials = (len(search.search.grid) + search.search.max_extensions) * len(search.search.seeds)
    return of_training(search.trial, paths, runs=trials)


def of_evaluation(job: EvalJob, training: Training, paths: Paths, *, batch_size: int, pace: Pace = SLOW) -> Needs:
    """Scoring of every suite: each row is read twice, for its answer and for the loss, and answered token by token."""
    recipe = training.recipe
    count = parameters(training.model, paths)
    token_s = _READ_FLOP * count / pace.of(recipe)
    seconds = sum(_suite_seconds(suite, job.max_length, token_s, pace.step_s, batch_size) for suite in job.all_suites)
    return _needs(
        held_bytes=2 * WEIGHT_BYTES[recipe.weight_dtype] * count, seconds=seconds, gpus=int(recipe.device == "cuda")
    )


def _suite_seconds(suite: SuiteJob, max_length: int, token_s: float, step_s: float, batch_size: int) -> float:
    source = suite.source
    rows = source.rows if isinstance(source, GeneratedSuite) else source.limit or UNKNOWN_ROWS
    written = UNKNOWN_TOKENS if isinstance(source, LmEvalSuite) else source.max_new_tokens
    if written is None:  # by likelihood: each row is read once for each of its answers
        return MOST_CHOICES * rows * max_length * token_s
    return 2 * rows * max_length * token_s + math.ceil(rows / batch_size) * written * (step_s + batch_size * token_s)


def weight_bytes(training: Training, paths: Paths) -> int:
    """Bytes of a model's weights in the dtype of its runs: what an exported model takes on disk."""
    return parameters(training.model, paths) * WEIGHT_BYTES[training.recipe.weight_dtype]


def state_bytes(training: Training, paths: Paths) -> int:
    """Upper bound of a run's resume state: weights and both moments of whatever trains."""
    weight, moment = WEIGHT_BYTES[training.recipe.weight_dtype], MOMENT_BYTES[training.recipe.state_dtype]
    share = ADAPTER_SHARE if "peft" in find_method(training.module).REQUIRES else 1.0
    return round(share * parameters(training.model, paths) * (weight + 2 * moment))


def parameters(job: ModelJob, paths: Paths) -> int:
    """Upper bound of a model's parameters: counted, from its file sizes, from its name, else `UNKNOWN_PARAMETERS`."""
    source = job.source
    if isinstance(source, PretrainedHere):
        layer = 4 * source.width**2 + 3 * source.width * source.feed_forward + 2 * source.width
        return source.layers * layer + 2 * VOCABULARY * source.width
    manifest = paths.output(MODEL, job.name)
    counted = read(manifest, ModelRecord).parameters if manifest.is_file() else None
    text = source.path if isinstance(source, LocalModel) else mirrored(source.repo)
    named = parameters_in(source.repo) if isinstance(source, HubModel) else None
    return counted or (text and _parameters_of_files(text)) or named or UNKNOWN_PARAMETERS


def parameters_in(name: str) -> int | None:
    """Upper bound by the size in a repository's name: `Llama-2-7b`, `SmolLM2-135M`, `Mixtral-8x7B`; None without one.

    Names round down: Gemma-2B has 2.5 billion, Gemma-7B 8.5.
    """
    found = [
        int(times or 1) * float(number) * {"m": 1e6, "b": 1e9}[unit.lower()]
        for times, number, unit in _SIZE.findall(name.rpartition("/")[2])
    ]
    return round(NAMES_ROUND_DOWN * max(found)) if found else None


def _parameters_of_files(text: str) -> int:
    try:
        folder = resolve(text)
    except UserError:  # in a dry run the input files may be missing
        return 0
    # two bytes per parameter, the fewest before quantisation
    return _file_bytes(folder.glob(pattern) for pattern in ("*.safetensors", "*.bin")) // 2


def _file_bytes(found: Iterable[Iterable[Path]]) -> int:
    return sum(file.stat().st_size for files in found for file in files)


def _needs(*, held_bytes: float, seconds: float, gpus: int = 0) -> Needs:
    return Needs(
        mem_mb=math.ceil((BASE_BYTES + held_bytes) / 1e6),
        minutes=math.ceil((START_S + seconds) / 60),
        gpus=gpus,
        seconds=seconds,
    )
