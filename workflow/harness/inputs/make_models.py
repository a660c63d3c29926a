"""Prepares models: finds them in a folder or fetches them from the hub, checks them, and writes a manifest."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

from harness.errors import UserError
from harness.inputs.checkpoints import check_checkpoint
from harness.inputs.hub_models import find_model
from harness.inputs.models import load_tokenizer
from harness.records.atomic import sha256, write_record
from harness.records.code import FOUND_MODEL
from harness.records.inputs import CameFrom, ModelRecord
from harness.records.provenance import provenance
from harness.records.record import Provenance
from harness.step.architecture import attention_of
from harness.step.facts import layers_of, unreached_as_buffers
from harness.step.outcomes import CannotRunError
from harness.study.identity import WEIGHTS, files_of, stamp_files
from harness.study.jobs import ModelJob
from harness.study.paths import resolve
from harness.study.sources import HubModel, PretrainedHere

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


def make_model(job: ModelJob, folder: Path) -> ModelRecord:
    """Find or fetch a model and write manifest.json into `folder`; for one pretrained here see `inputs.pretrain`.

    A fetched model is stored in `folder`/model; one of a local folder or of a mirror stays where it is and is only
    hashed. The manifest is
    written last: if it exists, the model is complete.

    Raises UserError, in one line, for a folder that holds no model, for a download that fails, and for a model that is
    to be pretrained.
    """
    started = time.perf_counter()
    source = job.source
    if isinstance(source, PretrainedHere):
        raise UserError(f"{job.name}: this model is pretrained here; use `pretrain`, not `prefetch`")
    origin = provenance(roots=FOUND_MODEL, inputs={})
    if isinstance(source, HubModel):
        found = find_model(source, folder / "model")
        weights, where, kind, revision = found.folder, found.text, found.came_from, found.revision
    else:
        weights, where, kind, revision = resolve(source.path), source.path, "local", None
    return describe_model(
        job.name,
        weights,
        where=where,
        came_from=kind,
        revision=revision,
        into=folder,
        started=started,
        provenance=origin,
    )


def describe_model(
    name: str,
    weights: Path,
    *,
    where: str,
    came_from: CameFrom,
    into: Path,
    started: float,
    provenance: Provenance,
    revision: str | None = None,
    losses: Sequence[tuple[int, float]] = (),
) -> ModelRecord:
    """Check a model's folder and write its manifest.

    Args:
        name: of the record.
        weights: the folder.
        where: that folder's path as written in the manifest.
        came_from: how it came there.
        into: folder of the manifest.
        started: when the preparation began (s, `time.perf_counter`).
        provenance: of the record.
        revision: the commit of a model of the hub, where it is known.
        losses: of pretraining, (step, nats per token).

    Raises:
        UserError: the folder holds no model, its checkpoint does not fit its architecture, or its tokenizer its
            embedding; one line.
    """
    files = _checked_files(weights, asked=where)
    model = check_checkpoint(weights, asked=where)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    unreached_as_buffers(model, as_built=model)
    try:
        layers_of(model)
    except CannotRunError as error:
        raise UserError(f"{where}: {error}") from error
    load_tokenizer(weights)
    attention = attention_of(model)
    # noted before they are hashed: a file that changes meanwhile is noticed by its time
    stamp_files(files, into)
    record = ModelRecord(
        name=name,
        folder=where,
        came_from=came_from,
        revision=revision,
        files_sha256={file.name: sha256(file) for file in files},
        parameters=parameters,
        attention=attention.kind,
        attention_why=attention.why,
        pretraining_loss=list(losses),
        wall_s=time.perf_counter() - started,
        provenance=provenance,
    )
    write_record(into / "manifest.json", record)
    return record


def _checked_files(folder: Path, *, asked: str) -> list[Path]:
    """The files that make up a model; raises UserError naming the first kind that is missing."""
    if not folder.is_dir():
        raise UserError(f"{asked}: no such folder; give the folder of a model in Hugging Face layout")
    if not (folder / "config.json").is_file():
        raise UserError(f"{asked}: no config.json in it; give the folder of a model in Hugging Face layout")
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise UserError(
            f"{asked}: no tokenizer in it (one of {', '.join(_TOKENIZERS)}); copy the model's tokenizer there"
        )
    if not any(True for pattern in WEIGHTS for _ in folder.glob(pattern)):
        raise UserError(f"{asked}: no weights in it ({' or '.join(WEIGHTS)}); download or convert them")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        # Offline, the hub client takes a partial download for complete; a copied folder may lack a shard too.
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{asked}: {index.name} has no readable weight_map; fetch it again") from error
        missing = sorted(name for name in shards if not (folder / name).is_file())
        if missing:
            raise UserError(
                f"{asked}: {len(missing)} of {len(shards)} shards missing, first {missing[0]}; fetch them again"
            )
    return files_of(folder)
