"""Rows of a data set of the Hugging Face hub, or of its copy in a mirror folder."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from harness.errors import UserError, first_line
from harness.study.paths import MIRROR
from harness.study.sources import HubData


def read_data_set(source: HubData) -> tuple[list[tuple[str, Any]], list[Path]]:
    """Every row with its place for messages ("<repo> test, row 3"), and the local files they came from.

    A folder `MIRROR/<org>/<name>` is taken before the network. Nothing is kept but the hub client's own cache.

    Raises:
        UserError: no such data set, configuration, split or revision, a closed one, no network; one line.
    """
    import datasets

    # its own lines and bars would stand between ours
    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity_error()
    found = in_mirror(source.repo, source.config)
    where = f"{source.repo} at {source.revision}" if found is None else found["path"]
    settings = found or {"path": source.repo, "name": source.config, "revision": source.revision}
    try:
        with tempfile.TemporaryDirectory(prefix="harness-data-") as cache:
            # the two halves of `load_dataset`: only the builder knows which files it reads
            builder = datasets.load_dataset_builder(**settings, cache_dir=cache)
            builder.download_and_prepare()
            values = builder.as_dataset(split=source.split).to_list()
    except (ValueError, RuntimeError, OSError, datasets.exceptions.DatasetsError) as error:
        raise UserError(why_not(error, source.repo, where)) from error
    files = [Path(file) for part in (builder.config.data_files or {}).values() for file in part] if found else []
    return [(f"{source.repo} {source.split}, row {n}", value) for n, value in enumerate(values, start=1)], files


def in_mirror(repo: str, config: str | None) -> dict[str, Any] | None:
    """What `datasets` is told to read the copy of a data set in the mirror folder; None if there is none."""
    mirror = os.environ.get(MIRROR)
    folder = Path(mirror) / repo if mirror else None
    if folder is None or not folder.is_dir():
        return None
    if config and (folder / config).is_dir() and not (folder / "README.md").is_file():
        # a copy without its card: configurations are folders, as on the hub, but nothing names them
        return {"path": str(folder), "name": None, "data_dir": config}
    return {"path": str(folder), "name": config}


def why_not(error: Exception, repo: str, where: str) -> str:
    """Why a data set could not be read, and the mend, in one line that begins with `where` it was looked for."""
    mirror = os.environ.get(MIRROR)
    said = first_line(error).rstrip(".")
    if isinstance(error, ConnectionError):
        absent = f"not in {MIRROR}={mirror}, and " if mirror else ""
        mend = f"put it into {mirror}/{repo}" if mirror else f"add --config {MIRROR}=<folder with {repo}>"
        return f"{where}: {absent}the hub cannot be reached ({said}); fetch it with a network, or {mend}"
    if "gated dataset" in said:
        page = f"https://huggingface.co/datasets/{repo}"
        return f"{where}: a closed data set; accept its terms on {page} and set HF_TOKEN"
    if "Revision" in said:
        return f"{where}: {said}; correct `revision`"
    if "doesn't exist on the Hub" in said:
        return f"{where}: not on the hub, or closed to you; correct `repo`, or set HF_TOKEN"
    if "Unknown split" in said:
        return f"{where}: {said}; correct `split`"
    if "BuilderConfig" in said or "Config name is missing" in said:
        return f"{where}: {said}; correct `config`"
    return f"{where}: cannot be read as a data set ({said}); correct the entry, or fetch the files and use kind: files"
