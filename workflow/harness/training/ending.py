"""What follows the last step: validation, export, and whether the export is the model that was trained.

None of it costs the trained model. Where memory runs out, the run goes on without the figure, and the record says why;
any other exception leaves the resume state of the last step, from which the same job goes on.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from harness.errors import first_line
from harness.inputs.models import load_model, load_tokenizer
from harness.records import atomic
from harness.records.measured import EVALUATION
from harness.records.run import Check
from harness.step.outcomes import DivergedError, is_out_of_memory, out_of_memory_why
from harness.training.loading import Inputs, Loaded
from harness.training.validation import mean_loss

COMPARED_ROWS = 4
"""Validation rows that the trained and the exported model are both asked for."""
TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2}
"""Largest relative difference of their losses, by weight dtype: adapters merged into bf16 weights are rounded."""


@dataclass
class Ending:
    """The late phases of one run, and what came of them.

    Args:
        in_phase: context manager that gives memory peaks and errors to a phase.
        release: returns freed memory to the device.
    """

    in_phase: Callable[[str], AbstractContextManager[None]]
    release: Callable[[], None]
    validation_loss: float | None = None
    """Mean nats per answer token over the whole validation split."""
    validation_why: str | None = None
    checkpoint: str | None = None
    checkpoint_why: str | None = None
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def validate(self, run: Loaded) -> None:
        """Evaluate the whole validation split.

        Raises:
            DivergedError: the loss is not finite.
        """
        loss, self.validation_why = self._loss(run, len(run.validation))
        if loss is not None and not math.isfinite(loss):
            raise DivergedError(f"the validation loss is {loss}")
        self.validation_loss = loss

    def export(self, run: Loaded, folder: Path | None, inputs: Inputs) -> None:
        """Write a plain model folder, and compare it; if nothing was trained, the original folder is the checkpoint.

        Args:
            run: it cannot train any more after this.
            folder: of the run; None keeps nothing.
            inputs: of the run.
        """
        if folder is None:
            return
        if not run.method.TRAINS:
            self.checkpoint = inputs.model_text or str(inputs.model)
            return
        # before the export, which may merge adapters into the trained module
        trained = None if self.validation_loss is None else self._loss(run, COMPARED_ROWS)[0]
        try:
            with self.in_phase("save"), atomic.whole_folder(folder / "model") as temporary:
                run.method.export(temporary)
                load_tokenizer(inputs.model).save_pretrained(temporary)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            self.checkpoint_why = out_of_memory_why(error, "save")
            return
        self.checkpoint = str(folder / "model")
        check = None if trained is None else self._compared(run, folder / "model", trained)
        if check is None:
            self.notes.append("there was no memory to compare the exported model with the trained one")
        else:
            self.checks.append(check)

    def _loss(self, run: Loaded, rows: int) -> tuple[float | None, str | None]:
        """Mean loss of the trained module on the first `rows` validation rows; or None and why memory ran out."""
        try:
            with self.in_phase(EVALUATION):
                loss = mean_loss(
                    run.module,
                    run.validation[:rows],
                    tokens_at_once=_tokens(run),
                    pad_id=run.pad_id,
                    on_halved=lambda tokens: self.notes.append(
                        f"validation ran out of memory and went on with {tokens} tokens at once"
                    ),
                )
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return None, out_of_memory_why(error, EVALUATION)
        finally:
            self.release()
        return loss, None

    def _compared(self, run: Loaded, folder: Path, trained: float) -> Check | None:
        """Whether plain transformers finds the trained module's loss; None if there is no memory to load the model.

        Merged adapters, tied weights and renamed tensors can each make an export another model without an error. The
        trained model is freed first, so there are never two of them in memory.
        """
        recipe = run.method.recipe
        tolerance = TOLERANCE[recipe.weight_dtype]
        _free_weights(run)
        self.release()
        try:
            with self.in_phase(EVALUATION):
                model = load_model(folder, weight_dtype=recipe.weight_dtype).to(recipe.device)
                rows = run.validation[:COMPARED_ROWS]
                loss = mean_loss(model, rows, tokens_at_once=_tokens(run), pad_id=run.pad_id)
        except (MemoryError, OSError, ValueError, RuntimeError) as error:
            if is_out_of_memory(error):
                return None
            observed, ok = f"transformers cannot use it: {first_line(error)}", False
        else:
            observed, ok = (
                f"loss {trained:.4f} trained, {loss:.4f} exported",
                abs(loss - trained) <= tolerance * trained,
            )
        return Check(
            name="the exported model is the trained one",
            promised=f"the same loss to {100 * tolerance:g} %",
            observed=observed,
            ok=ok,
        )


def _tokens(run: Loaded) -> int:
    """Tokens of a forward pass that is only looked at: as many as one of training may have."""
    return run.method.recipe.micro_batch_size * run.method.recipe.max_length


def _free_weights(run: Loaded) -> None:
    """Free weights, gradients and optimizer states, whoever else refers to the model."""
    if run.method.optimizer is not None:
        run.method.optimizer.state.clear()
    for parameter in [*run.module.parameters(), *run.own_parameters]:
        parameter.grad = None
        parameter.data = parameter.data.new_empty(0)
    gc.collect()
