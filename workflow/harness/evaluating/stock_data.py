"""Data of lm-eval's own tasks: fetched once, before training, and read from the suite's folder when runs are scored.

lm-eval loads data while it makes a task, through `datasets.load_dataset`. Before training this is the hub or a mirror
folder, and a copy of each data set is kept; after it, the copy stands for the hub. So every run is scored on the same
rows, whatever the hub has become, and nothing has to be fetched when ten hours of training are over.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from harness.errors import UserError, first_line
from harness.inputs.hub_rows import in_mirror, why_not
from harness.records.atomic import sha256, write_json, write_record
from harness.records.code import STOCK_SUITE
from harness.records.inputs import RowsRecord
from harness.records.provenance import provenance
from harness.records.reading import read_json
from harness.study.jobs import SuiteJob
from harness.study.lm_eval_names import tasks_folder, unknown_task
from harness.study.sources import LmEvalSuite

INDEX = "tasks.json"
"""In the suite's folder: which of lm-eval's folders hold its tasks, and which data set lies where."""
SEED = 1234
"""Of the few-shot examples: lm-eval's own default."""
FAILURES = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip
"""What the code of a task raises if it cannot be used here; tasks are foreign programs."""

Load = Callable[..., Any]


def fetch(job: SuiteJob, folder: Path) -> RowsRecord:
    """Fetch a task's data into `folder` and try the task on two items; manifest.json is last and marks completion.

    A folder MIRROR/<org>/<name> is taken before the network.

    Raises:
        UserError: there is no such task, its data cannot be had, or it cannot be scored here: it runs code, looks at
            pictures, or needs a metric that would have to be fetched.
    """
    source = job.source
    assert isinstance(source, LmEvalSuite)
    quiet()
    shutil.rmtree(folder / "data", ignore_errors=True)  # of a fetch that was cut off
    manager = _all_tasks()
    if source.task not in manager.all_tasks:
        raise UserError(f"{job.label}: {unknown_task(source.task, manager.all_tasks)}")
    kept: list[dict[str, Any]] = []
    with (
        tempfile.TemporaryDirectory(prefix="harness-data-") as scratch,
        _loading(_keeping(kept, folder, Path(scratch))),
    ):
        loaded = _made(manager, source)
    write_json(folder / INDEX, {"folders": _folders(manager, loaded), "data": kept})
    _try(loaded, source)
    counts = {name: len(task.eval_docs) for name, task in loaded["tasks"].items()}
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name not in {"spec.json"})
    record = RowsRecord(
        name=job.name,
        files_sha256={str(file.relative_to(folder)): sha256(file) for file in files},
        rows={name: min(count, source.limit or count) for name, count in counts.items()},
        provenance=provenance(roots=STOCK_SUITE, inputs={}),
    )
    write_record(folder / "manifest.json", record)
    return record


def load(source: LmEvalSuite, folder: Path) -> dict[str, Any]:
    """The tasks, groups and group map of a suite whose data lie in `folder`, ready to be evaluated.

    Raises:
        UserError: the folder holds no data, or lm-eval wants others than were fetched: its version has changed.
    """
    from lm_eval.tasks import TaskManager

    quiet()
    index = read_json(folder / INDEX)
    root = tasks_folder()
    assert root is not None
    # only the folders of this task: reading all of lm-eval's takes seconds, in every evaluation
    manager = TaskManager(include_path=[str(root / name) for name in index["folders"]], include_defaults=False)
    with _loading(_kept(index["data"], folder)):
        return _made(manager, source)


@cache
def _all_tasks() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager()


def quiet() -> None:
    """Switch off the lines and bars of lm-eval and of `datasets`."""
    import datasets

    logging.getLogger("lm_eval").setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity_error()


def _made(manager: Any, source: LmEvalSuite) -> dict[str, Any]:
    """Tasks with the suite's shots, as `lm_eval.simple_evaluate` sets them."""
    try:
        loaded: dict[str, Any] = manager.load(source.task)
    except FAILURES as error:
        raise UserError(f"lm-eval task {source.task} cannot be made: {first_line(error)}; choose another") from error
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        if own is None or (source.num_fewshot is not None and own != 0):
            task.set_config(key="num_fewshot", value=source.num_fewshot or 0)
        task.set_fewshot_seed(seed=SEED)
    return loaded


def _try(loaded: dict[str, Any], source: LmEvalSuite) -> None:
    """Score two items of each task with random answers: what fails here would fail after training."""
    from lm_eval import evaluate
    from lm_eval.models.dummy import DummyLM

    class Guessing(DummyLM):  # type: ignore[misc]
        def apply_chat_template(self, chat_history: Sequence[dict[str, str]], **settings: Any) -> str:
            return "\n".join(turn["content"] for turn in chat_history)

    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(f"lm-eval task {name}: it runs code that the model writes, which is not done here")
        if getattr(task, "MULTIMODAL", False):
            raise UserError(f"lm-eval task {name}: it asks about pictures or sounds; choose a task of text")
        metrics = getattr(task, "_metric_fn_list", {})
        missing = [metric for metric, function in metrics.items() if function is None]
        if missing and task.config.process_results is None:
            raise UserError(
                f"lm-eval task {name}: metric {missing[0]} comes from the library `evaluate`, which fetches it from "
                "the network, and that failed; connect once, or choose a task whose metrics are lm-eval's own"
            )
    try:
        evaluate(
            lm=Guessing(), task_dict=loaded, limit=2, bootstrap_iters=0,
            apply_chat_template=source.apply_chat_template, fewshot_as_multiturn=source.apply_chat_template,
        )  # fmt: skip
    except FAILURES as error:
        raise UserError(
            f"lm-eval task {source.task} cannot be scored here: {first_line(error)}; choose another, or other "
            "`num_fewshot`"
        ) from error


def _folders(manager: Any, loaded: dict[str, Any]) -> list[str]:
    """Folders below lm-eval's tasks that define these tasks and groups."""
    root = tasks_folder()
    assert root is not None
    entries = [manager.task_index.get(name) for name in (*loaded["tasks"], *loaded.get("groups", ()))]
    files = [entry.yaml_path for entry in entries if entry is not None and entry.yaml_path is not None]
    return sorted({str(file.parent.relative_to(root.resolve())) for file in map(Path.resolve, files)})


@contextmanager
def _loading(load: Callable[[Load, Any, Any, dict[str, Any]], Any]) -> Iterator[None]:
    """While it lasts, `datasets.load_dataset` is `load`, which gets the usual one, path, name and other settings."""
    import datasets

    usual = datasets.load_dataset
    datasets.load_dataset = lambda path, name=None, **settings: load(usual, path, name, settings)
    try:
        yield
    finally:
        datasets.load_dataset = usual


def _wanted(path: Any, name: Any, settings: dict[str, Any]) -> str:
    """What tells one data set from another."""
    return json.dumps([path, name, settings], sort_keys=True, default=str)


def _keeping(kept: list[dict[str, Any]], folder: Path, scratch: Path) -> Callable[..., Any]:
    def load(usual: Load, path: Any, name: Any, settings: dict[str, Any]) -> Any:
        wanted = _wanted(path, name, settings)
        if any(one["wanted"] == wanted for one in kept):
            return _read(folder / next(one["folder"] for one in kept if one["wanted"] == wanted))
        found = in_mirror(str(path), name)
        # nothing of a mirror folder goes into the hub client's cache, where another mirror would find it
        given = {"path": path, "name": name} if found is None else found | {"cache_dir": str(scratch)}
        try:
            data = usual(**(settings | given))
        except FAILURES as error:
            raise UserError(_why(error, str(path), found)) from error
        if not hasattr(data, "save_to_disk"):
            raise UserError(f"{path}: its rows are streamed and cannot be kept; choose another task")
        place = f"data/{len(kept)}"
        data.save_to_disk(str(folder / place))
        kept.append({"data_set": str(path), "config": name, "wanted": wanted, "folder": place})
        return data

    return load


def _kept(kept: Sequence[dict[str, Any]], folder: Path) -> Callable[..., Any]:
    def load(usual: Load, path: Any, name: Any, settings: dict[str, Any]) -> Any:
        wanted = _wanted(path, name, settings)
        for one in kept:
            if one["wanted"] == wanted:
                return _read(folder / one["folder"])
        raise UserError(f"{folder}: lm-eval wants {path} {name or ''}, which was not fetched; delete it and run again")

    return load


def _read(folder: Path) -> Any:
    import datasets

    return datasets.load_from_disk(str(folder))


def _why(error: Exception, path: str, found: dict[str, Any] | None) -> str:
    where = path if found is None else found["path"]
    if isinstance(error, ConnectionError) or "gated dataset" in str(error) or "doesn't exist on the Hub" in str(error):
        return why_not(error, path, where)
    said = first_line(error)
    return f"{where}: cannot be read as its task of lm-eval wants it ({said}); mend the copy, or choose another task"
