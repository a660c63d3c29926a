"""Importance before training: gradient norms of an untrained model's layers on batches of a task's training rows.

Measured by GRASS's own prober (`grass.probing`), one batch at a time, so that the spread over batches is known: it says
how far two measurements of the same task lie apart. Within a layer, norms and its other blocks are told apart as well.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from grass.layers import declared_module
from grass.probing import Prober
from harness.errors import UserError
from harness.inputs.models import load_model, load_tokenizer
from harness.inputs.prompts import Prompt
from harness.inputs.rows import read_rows
from harness.inputs.tokens import check_ids, encode_rows
from harness.measuring.device import AllocatorMeter
from harness.progress import Progress
from harness.records.code import PROBE
from harness.records.columns import NORMS
from harness.records.provenance import provenance
from harness.records.run import DataUse, ProbedBatch, ProbeRecord
from harness.step.architecture import check_length
from harness.step.facts import layers_of
from harness.step.loss import label_tokens
from harness.step.outcomes import DivergedError, outcome_of
from harness.study.jobs import ProbeJob
from harness.training.batches import Batches, CalibrationBatches
from harness.training.loading import Inputs

OWN = "own"
"""The kind of matrices that a layer holds itself, outside its blocks."""


def probe(job: ProbeJob, inputs: Inputs) -> ProbeRecord:
    """Measure every batch and return the record; bad outcomes are recorded, bugs raise.

    Raises:
        UserError: the task has fewer training rows than the probe takes.
    """
    started = time.perf_counter()
    run = _Probe(job)
    status, why = outcome_of(lambda: run.whole(inputs), phase=lambda: run.current_phase)
    return ProbeRecord(
        name=job.name,
        status=status,
        status_why=why,
        model=job.model.label,
        task=job.rows.label,
        probes=job.probes.model_dump(mode="json"),
        prompt=job.prompt,
        max_length=job.max_length,
        loss_on=job.loss_on,
        weight_dtype=job.weight_dtype,
        layer_parameters=[sum(map(_size, kinds.values())) for kinds in run.layers] or None,
        parameters_by_kind={kind: [_size(kinds.get(kind, ())) for kinds in run.layers] for kind in run.kinds} or None,
        data=run.data,
        batches=run.batches,
        wall_s=time.perf_counter() - started,
        provenance=provenance(roots=PROBE, inputs=inputs.files(), device=AllocatorMeter(job.device).device_name),
    )


def kinds_of(layer: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Parameters of a decoder layer by kind: norms, and every other block under the name that the model gives it.

    A module that holds vectors only is a norm, wherever it lies. All other parameters belong to the layer's child that
    contains them, such as `self_attn` and `mlp`.
    """
    found: dict[str, list[nn.Parameter]] = {}
    for name, module in layer.named_modules():
        own = list(module.parameters(recurse=False))
        if own:
            vectors_only = all(p.dim() <= 1 for p in own)
            found.setdefault(NORMS if vectors_only else name.partition(".")[0] or OWN, []).extend(own)
    return found


class _Probe:
    """The parts of one probe; what was measured before a bad outcome stays."""

    def __init__(self, job: ProbeJob) -> None:
        self.job = job
        self.layers: list[dict[str, list[nn.Parameter]]] = []
        self.kinds: list[str] = []
        self.data: DataUse | None = None
        self.batches: list[ProbedBatch] = []
        self.current_phase = "load"

    def whole(self, inputs: Inputs) -> None:
        """Load, then measure.

        Raises:
            CannotRunError, DivergedError, MemoryError, RuntimeError: bad outcomes, for `outcome_of`.
        """
        model, batches = self._load(inputs)
        self.current_phase = "probe"
        self._measure(model, batches)

    def _load(self, inputs: Inputs) -> tuple[nn.Module, CalibrationBatches]:
        job, wanted = self.job, self.job.probes.batches * self.job.probes.rows
        tokenizer = load_tokenizer(inputs.model)
        rows, self.data = encode_rows(
            Prompt(job.prompt, tokenizer),
            read_rows(inputs.rows / "train.json"),
            max_length=job.max_length,
            loss_on=job.loss_on,
        )
        if len(rows) < wanted:
            raise UserError(
                f"probes: {job.probes.batches} batches of {job.probes.rows} rows are {wanted} rows, but task "
                f"{job.rows.label} has {len(rows)} training rows that keep an answer; ask for fewer"
            )
        model = load_model(inputs.model, weight_dtype=job.weight_dtype)
        check_length(model, job.max_length, what="recipe.max_length")
        ids = (row.input_ids for row in rows)
        check_ids(ids, tokenizer=tokenizer, embedding=declared_module(model, "get_input_embeddings"))
        model = model.to(job.device)
        self.layers = [kinds_of(layer) for layer in layers_of(model).layers]
        self.kinds = list(dict.fromkeys(kind for kinds in self.layers for kind in kinds))
        batches = Batches(
            rows,
            batch_size=job.probes.rows,
            micro_batch_size=job.probes.rows,
            seed=job.probes.seed,
            pad_id=tokenizer.pad_token_id,
            device=job.device,
        )
        return model, CalibrationBatches(batches, autocast=job.autocast)

    def _measure(self, model: nn.Module, calibration: CalibrationBatches) -> None:
        groups = [(layer, kind) for layer, kinds in enumerate(self.layers) for kind in kinds]
        prober = Prober(model, [self.layers[layer][kind] for layer, kind in groups], list(model.parameters()))
        losses: list[float] = []

        def loss_of(module: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
            loss = calibration.loss(module, batch)
            losses.append(float(loss.detach()))
            return loss

        prober.loss = loss_of
        with Progress(self.job.probes.batches, f"probe {self.job.name}") as progress:
            for number, batch in enumerate(calibration.batches(self.job.probes.batches)):
                norms = prober.measure([batch], exact=None, together=1)
                self._keep(number, batch, losses[-1], dict(zip(groups, norms, strict=True)))
                progress.advance(f"loss {losses[-1]:.3f}")

    def _keep(
        self, number: int, batch: Mapping[str, Tensor], loss: float, norms: Mapping[tuple[int, str], float]
    ) -> None:
        """Record one batch.

        Raises:
            DivergedError: its loss or a norm is not finite; the batch is recorded all the same.
        """
        by_layer = [
            _together([(norms[layer, kind], _size(own)) for kind, own in kinds.items()])
            for layer, kinds in enumerate(self.layers)
        ]
        layers = range(len(self.layers))
        self.batches.append(
            ProbedBatch(
                loss=_finite(loss),
                tokens=int(batch["attention_mask"].sum()),
                label_tokens=label_tokens(batch),
                gradient_rms=[_finite(r) for r in by_layer],
                gradient_rms_by_kind={
                    kind: [_finite(norms.get((layer, kind), math.nan)) for layer in layers] for kind in self.kinds
                },
            )
        )
        wrong = next((layer for layer, r in enumerate(by_layer) if not math.isfinite(r)), None)
        if wrong is not None or not math.isfinite(loss):
            norm = "" if wrong is None else f", gradient norm {by_layer[wrong]} of layer {wrong}"
            raise DivergedError(f"in batch {number}: loss {loss}{norm}")


def _together(parts: Sequence[tuple[float, int]]) -> float:
    """Root mean square of all entries, from that of each part and its number of entries."""
    return math.sqrt(math.fsum(r * r * count for r, count in parts) / sum(count for _, count in parts))


def _size(parameters: Sequence[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
