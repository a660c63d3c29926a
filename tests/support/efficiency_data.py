"""A small efficiency study, made-up records of it, and a worker that computes nothing: what its tests share."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

from harness.efficiency.jobs import Hello, Job, Reply
from harness.efficiency.plan import Entry, Group, Unit, plan
from harness.efficiency.record import CellRecord, ForecastRecord, MemoryBlock, TimingBlock
from harness.efficiency.spec import EfficiencyStudy, load_efficiency
from harness.efficiency.store import MeasureOptions, Store, cell_sha256, packages
from harness.records.code import code_of, measurement, step_forecast
from harness.records.device import DeviceKind, DeviceRecord
from harness.records.provenance import provenance
from harness.records.units import GIB
from harness.reporting.efficiency.rows import Rows, read_rows
from harness.reporting.published import Published, load_published
from harness.step.spec import Geometry
from house import ROOT

CARD = "Test GPU"
MAIN = "llama-2-7b"
TINY = """\
study: efficiency
title: A rehearsal
models:
  tiny:
    architecture: llama
    hidden_size: 32
    intermediate_size: 48
    num_hidden_layers: 4
    num_attention_heads: 2
    num_key_value_heads: 1
    head_dim: 16
    vocab_size: 64
    tie_word_embeddings: false
    parameters: 35104
methods:
  lora: {module: lora, options: {rank: 4, alpha: 8, adapter_dtype: weights}}
  grass-decoder:
    module: grass
    options:
      active_layers: 2
      sample_every: 50
      probe_steps: 2
      offload: move
      train_embedding: false
      train_head: false
settings:
  lean: {activation_checkpointing: true, chunked_loss: true}
shapes:
  4x1024: {batch: 2, length: 16}
numerics: {weight_dtype: bf16, state_dtype: bf16, max_grad_norm: 1.0}
anchor: {cuda: tiny, cpu: tiny}
compared: [lora, grass-decoder]
corners: [{settings: lean, shape: 4x1024}]
resident: {offload: resident}
overhead: {method: grass-decoder, settings: lean, shape: 4x1024, active_layers: [2, 4]}
order:
  - kind: corners
    beside: [{method: grass-decoder, options: {offload: resident}, settings: lean, shape: 4x1024}]
  - {kind: variants, methods: [grass-decoder], options: {active_layers: 4}}
  - {kind: everything}
reference: lora
published: {settings: lean, metrics: {peak_memory: {batch: 1, settings: [lean]}}, models: {}, unnamed: tiny}
"""
"""One group on a CPU: lora, grass-decoder and grass-decoder with resident states; then one with more active layers."""


@cache
def study() -> EfficiencyStudy:
    """The study of the repository."""
    return load_efficiency(ROOT / "config" / "efficiency.yaml")


@cache
def published() -> Published:
    """The published numbers of the repository."""
    return load_published(ROOT / "config" / "published" / "grass.yaml")


def tiny_file(folder: Path, *edits: tuple[str, str]) -> Path:
    """The small study as a file, with some of its text replaced."""
    return _edited(TINY, folder, edits)


def study_file(folder: Path, *edits: tuple[str, str]) -> Path:
    """A copy of the repository's study, with some of its text replaced."""
    return _edited((ROOT / "config" / "efficiency.yaml").read_text(encoding="utf-8"), folder, edits)


def _edited(text: str, folder: Path, edits: tuple[tuple[str, str], ...]) -> Path:
    for old, new in edits:
        assert old in text, old
        text = text.replace(old, new)
    path = folder / "efficiency.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def tiny_entries(folder: Path) -> dict[str, Entry]:
    """The small study's cells by label, with a LISA that keeps moments beside the others."""
    lisa = "  lisa: {module: lisa, options: {active_layers: 2, sample_every: 50, state: keep}}\nsettings:\n"
    compared = ("[lora, grass-decoder]", "[lora, grass-decoder, lisa]")
    read = load_efficiency(tiny_file(folder, ("settings:\n", lisa), compared))
    return {e.named.label: e for g in plan(read, "cpu") for e in g.entries if e.named.shape == "4x1024"}


def job(of: Entry, do: Any = "memory", **changes: Any) -> Job:
    """A block of a cell on the CPU."""
    asked = {"timed_steps": 10, "warmup_steps": 5, "repeats": 2} | changes
    return Job(do=do, named=of.named, cell=of.cell, device="cpu", **asked)


@cache
def entry(model: str, method: str, settings: str, shape: str, variant: str = "", device: DeviceKind = "cuda") -> Entry:
    """One cell of the repository's plan."""
    label = f"{method}+{variant}" if variant else method
    return _entries(device)[f"{model}/{label}/{settings}/{shape}"]


@cache
def _entries(device: DeviceKind) -> dict[str, Entry]:
    return {e.words: e for group in plan(study(), device) for e in group.entries}


def words(groups: list[Group]) -> list[str]:
    """All cells of a plan, in its order."""
    return [e.words for group in groups for e in group.entries]


def said(unit: Unit) -> str:
    """A block in few words."""
    return f"{unit.entry.named.label} {unit.do}{unit.repeat if unit.do == 'timing' else ''}"


ASKED = MeasureOptions(device="cuda", warmup_steps=5, timed_steps=10, repeats=3)


def device_record(kind: DeviceKind = "cuda", name: str = CARD) -> DeviceRecord:
    """A made-up device."""
    return DeviceRecord(
        kind=kind,
        name=name,
        total_bytes=80 * GIB if kind == "cuda" else None,
        alloc_conf="",
        threads=1,
        card=None,
        card_why="made up",
        transfer=None,
        transfer_why="made up",
    )


def memory_block(gib: float | None, **changes: Any) -> MemoryBlock:
    """A memory block with this peak; None: of a CPU."""
    peak = None if gib is None else round(gib * GIB)
    fields: dict[str, Any] = {
        "allocated_peak_bytes": peak,
        "reserved_peak_bytes": peak,
        "peak_phase": None if peak is None else "backward",
        "worst_draw": None,
        "device_allocated_peak_bytes": {} if peak is None else {"load": 1, "probe": peak - GIB, "backward": peak},
        "device_reserved_peak_bytes": {},
        "allocated_before_bytes": None,
        "device_state_bytes": None,
        "alloc_retries": None,
        "device_why": "the run was on the CPU" if peak is None else None,
        "nvml_process_peak_bytes": None,
        "nvml_device_peak_bytes": None,
        "nvml_poll_s": None,
        "host_peak_bytes": {},
        "state_peak_bytes": None,
        "cgroup_peak_bytes": None,
        "method_pinned_peak_bytes": None,
        "torch_pinned_peak_bytes": None,
        "load_s": 1.0,
        "wall_s": 2.0,
    }
    return MemoryBlock(**fields | changes)


def timing_block(repeat: int, tokens_per_s: float, *, tokens: int = 4096, draws: bool = False) -> TimingBlock:
    """Ten equal steps at this rate."""
    step = tokens / tokens_per_s
    return TimingBlock(
        repeat=repeat,
        clock="cuda events",
        warmup_steps=5,
        timed_steps=10,
        period_steps=5,
        own_period_steps=50 if draws else None,
        step_s=(step,) * 10,
        step_median_s=step,
        step_p95_s=step,
        window_s=10 * step,
        tokens=10 * tokens,
        window_tokens_per_s=tokens_per_s,
        tokens_per_s=tokens_per_s,
        mfu_share=0.4,
        draws=((0, 3), (1, 2)) if draws else (),
        mean_reach=0.7 if draws else 1.0,
        moved_bytes_per_step=GIB if draws else None,
        exposed_copy_s_per_step=0.001 if draws else None,
        probe_batches=2 if draws else 0,
        probe_s=2 * step if draws else None,
        card_after=None,
        started_utc="2026-01-01T00:00:00+00:00",
        wall_s=3.0,
    )


def cell_record(of: Entry, gib: float | None = None, speeds: tuple[float, ...] = (), **changes: Any) -> CellRecord:
    """A made-up record, as today's code would make it."""
    device = device_record()
    fields: dict[str, Any] = {
        "cell": of.named,
        "status": "ok",
        "module": of.cell.module,
        "options": of.cell.options,
        "settings": of.cell.settings,
        "shape": of.cell.shape,
        "numerics": of.cell.numerics,
        "seed": 0,
        "parameters": 10,
        "trainable_parameters": 5,
        "device": device,
        "memory": None if gib is None else memory_block(gib),
        "timing": tuple(timing_block(i, v, draws=of.cell.module == "grass") for i, v in enumerate(speeds)),
        "asked_sha256": ASKED.sha256(of),
        "code_sha256": code_of(measurement(of.cell.module)).sha256,
        "provenance": provenance(roots=("harness.efficiency.plan",), inputs={}, device=device.name),
    }
    return CellRecord(**fields | changes)


def forecast_record(of: Entry, gib: float, **changes: Any) -> ForecastRecord:
    """A made-up forecast: most of it weights, the rest activations."""
    peak = round(gib * GIB)
    fields: dict[str, Any] = {
        "cell": of.named,
        "status": "ok",
        "peak_bytes": peak,
        "peak_phase": "backward",
        "by_phase_bytes": {"load": 1, "probe": peak, "backward": peak},
        "by_kind_bytes": {"weights": 3 * (peak // 4), "activations": peak - 3 * (peak // 4), "loss": 0},
        "bound_tokens_per_s": 1000.0,
        "wall_s": 1.0,
        "packages": packages(),
        "asked_sha256": cell_sha256(of.cell),
        "code_sha256": code_of(step_forecast(of.cell.module)).sha256,
    }
    return ForecastRecord(**fields | changes)


def rows_of(store: Store) -> Rows:
    """All that a store knows of the repository's study."""
    return read_rows(study(), store)


PEAKS = {
    "lora": 19.4,
    "grass": 17.4,
    "grass-decoder": 17.0,
    "full": 50.2,
    "lisa": 19.9,
    "lisa-keep": 42.0,
    "dora": 22.9,
}
SPEEDS = {
    "lora": 1000.0, "grass": 1080.0, "grass-decoder": 1250.0, "full": 700.0, "lisa": 1010.0, "lisa-keep": 1005.0,
    "dora": 800.0,
}  # fmt: skip


def forecast_methods(store: Store, settings: str, shape: str, more: float = 0.0, **changes: Any) -> None:
    """Made-up forecasts of every compared method on the main model."""
    for method, peak in PEAKS.items():
        of = entry(MAIN, method, settings, shape)
        store.keep(forecast_record(of, peak + more, **changes))


def measure_methods(store: Store, settings: str, shape: str, factor: float = 1.0, **changes: Any) -> None:
    """Three repeats a method, 1 % apart; peaks 2 % above the forecast's."""
    for method, peak in PEAKS.items():
        of = entry(MAIN, method, settings, shape)
        speeds = tuple(SPEEDS[method] * factor * drift for drift in (1.0, 0.99, 0.98))
        store.keep(cell_record(of, 1.02 * peak, speeds, **changes))


# ---------------------------------------------------------------- a worker that computes nothing

NO_TIME = Geometry(
    architecture="llama",
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    vocab_size=64,
    tie_word_embeddings=False,
    parameters=35104,
)
"""A model that takes no time."""

_SCRIPT = """\
import os, sys, time
sys.path[:0] = {path!r}
from harness.efficiency.jobs import Hello, Reply
from harness.efficiency.worker import main

def execute(job):
    print("noise that a library makes")
    timing = Reply.model_validate_json({timing!r}.replace('"repeat":0', '"repeat":%d' % job.repeat))
    {body}
    return Reply.model_validate_json({memory!r}) if job.do == "memory" else timing

sys.exit(main(lambda device: (Hello.model_validate_json({hello!r}), execute)))
"""


def worker_command(folder: Path, body: str = "pass") -> list[str]:
    """A command that serves jobs with made-up blocks, after the statement `body` in which `job` is known."""
    replies = {
        "memory": Reply(status="ok", memory=memory_block(None), parameters=10, trainable_parameters=5),
        "timing": Reply(status="ok", timing=timing_block(0, 1000.0), parameters=10, trainable_parameters=5),
        "hello": Hello(device=device_record("cpu", "cpu")),
    }
    texts = {name: reply.model_dump_json() for name, reply in replies.items()}
    path = folder / "worker.py"
    path.write_text(_SCRIPT.format(path=[p for p in sys.path if p], body=body, **texts), encoding="utf-8")
    return [sys.executable, str(path)]
