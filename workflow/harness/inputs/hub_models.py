"""Models of the Hugging Face hub, at a pinned revision: from a mirror folder, over the network, or from its cache."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from httpx import ConnectError, HTTPError, TimeoutException
from huggingface_hub import HfApi, get_token, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from harness.errors import UserError, first_line
from harness.records.atomic import sha256
from harness.records.inputs import CameFrom
from harness.study.paths import MIRROR, mirrored, missing_in_mirror, resolve
from harness.study.sources import HubModel

_WEIGHTS = ("model*.safetensors", "*.safetensors", "pytorch_model*.bin")
"""Of these, the first that a repository has: many hold the same weights in several formats."""
_TEXTS = ("*.json", "*.model", "*.txt", "*.jinja")
_CONFIG = "config.json"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_NETWORK = (
    f"fetch it where there is a network, give --config {MIRROR}=<folder with <org>/<name>/ in it>, or use kind: local"
)


@dataclass(frozen=True)
class Found:
    """A hub model on this machine."""

    folder: Path
    text: str
    """The folder as its record names it."""
    came_from: CameFrom
    revision: str | None
    """The commit; None where a mirror folder does not say."""


def find_model(source: HubModel, folder: Path) -> Found:
    """The model in the mirror, else fetched into `folder`, where files that are whole are not fetched anew.

    Every file that is fetched is held to the hash that the hub has of it.

    Raises:
        UserError: in one line: the mirror has no such model, or another revision; no such repository or revision, a
            closed one, no network, a file with other content than the hub says.
    """
    text = mirrored(source.repo)
    if text is not None:
        return _in_mirror(source, text)
    here = os.path.relpath(folder)
    try:
        commit, files = _listed(source)
    except (ConnectError, TimeoutException, OfflineModeIsEnabled) as error:
        try:
            return Found(folder, here, "hub cache", _from_cache(source, folder))
        except LocalEntryNotFoundError:
            raise UserError(_why(error, source)) from error
    except (HTTPError, OSError, HFValidationError) as error:
        raise UserError(_why(error, source)) from error
    try:
        # into its final place: the hub client goes on within a file while the connection can be had again, and keeps
        # the files that are whole if it cannot
        snapshot_download(source.repo, revision=commit, local_dir=folder, allow_patterns=[file.path for file in files])
    except (HTTPError, OSError) as error:
        if isinstance(error, HfHubHTTPError):
            raise UserError(_why(error, source)) from error
        raise UserError(
            f"{source.repo} at {source.revision}: the download broke off ({first_line(error)}); run again, what is "
            "whole is not fetched anew"
        ) from error
    _check_content(files, folder, source)
    return Found(folder, here, "hub", commit)


def find_configuration(repo: str) -> Path:
    """A folder with a model's config.json: the mirror's, else the hub client's cache, into which that file is fetched.

    Raises:
        UserError: as `find_model`, or the repository has no such file.
    """
    return _small_files(HubModel(kind="hub", repo=repo, revision="main"), (_CONFIG,))


def find_without_weights(source: HubModel) -> Path:
    """A folder with a model's configuration and tokenizer; from where, and what is raised: as `find_configuration`."""
    return _small_files(source, _TEXTS)


def _small_files(source: HubModel, patterns: Sequence[str]) -> Path:
    text = mirrored(source.repo)
    if text is not None:
        folder = _in_mirror(source, text).folder
        if not (folder / _CONFIG).is_file():
            raise UserError(f"{folder}: no {_CONFIG} in it; fetch the model into the mirror again")
        return folder
    fetch = partial(snapshot_download, source.repo, revision=source.revision, allow_patterns=list(patterns))
    try:
        # asked first, since a download tries a hub that is out of reach for half a minute
        HfApi().model_info(source.repo, revision=source.revision)
        folder = Path(fetch())
    except (ConnectError, TimeoutException, OfflineModeIsEnabled) as error:
        try:
            folder = Path(fetch(local_files_only=True))
        except LocalEntryNotFoundError:
            folder = Path()
        if not (folder / _CONFIG).is_file():
            raise UserError(
                f"{source.repo}: the hub cannot be reached ({first_line(error)}), nor is its {_CONFIG} in the hub "
                f"client's cache; set {MIRROR}=<folder with {source.repo}/ in it>, or give the model's folder"
            ) from error
    except (HTTPError, OSError, HFValidationError) as error:
        raise UserError(_why(error, source)) from error
    if not (folder / _CONFIG).is_file():
        raise UserError(f"{source.repo}: no {_CONFIG} in it; name a repository of a transformers model")
    return folder


def _listed(source: HubModel) -> tuple[str, list[RepoFile]]:
    """The commit that the revision is, and the files of a model there: configuration, tokenizer, one set of weights."""
    api = HfApi()
    commit = _pinned(source) or str(api.model_info(source.repo, revision=source.revision).sha)
    entries = api.list_repo_tree(source.repo, revision=commit)
    files = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
    weights = next((found for pattern in _WEIGHTS if (found := fnmatch.filter(files, pattern))), [])
    texts = (name for pattern in _TEXTS for name in fnmatch.filter(files, pattern))
    return commit, [files[name] for name in sorted({*weights, *texts})]


def _from_cache(source: HubModel, folder: Path) -> str | None:
    """What an earlier fetch left in `folder`, else the snapshot in the hub's cache, linked there; returns the commit.

    Raises:
        LocalEntryNotFoundError: neither is there, or not whole.
    """
    offline = partial(
        snapshot_download,
        source.repo,
        revision=source.revision,
        local_files_only=True,
        allow_patterns=[*_TEXTS, _WEIGHTS[0]],
    )
    if (folder / "config.json").is_file():
        offline(local_dir=folder)
        return _commit_in(folder) or _pinned(source)
    snapshot = Path(offline())
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.is_dir():
        shutil.rmtree(folder)
    folder.symlink_to(snapshot, target_is_directory=True)
    return snapshot.name


def _in_mirror(source: HubModel, text: str) -> Found:
    folder = resolve(text)
    if not folder.is_dir():
        raise UserError(missing_in_mirror(source.repo))
    commit, pinned = _commit_in(folder), _pinned(source)
    if commit and pinned and commit != pinned:
        raise UserError(
            f"{folder}: was fetched at revision {commit}, and the study pins {pinned}; fetch that one into the mirror, "
            f"or leave {MIRROR} out"
        )
    return Found(folder, text, "mirror", commit)


def _pinned(source: HubModel) -> str | None:
    return source.revision if _COMMIT.fullmatch(source.revision) else None


def _commit_in(folder: Path) -> str | None:
    """The commit that the hub client noted when it fetched a folder; None for a folder that came another way."""
    note = folder / ".cache" / "huggingface" / "download" / "config.json.metadata"
    lines = note.read_text(encoding="utf-8").splitlines() if note.is_file() else []
    return lines[0] if lines and _COMMIT.fullmatch(lines[0]) else None


def _check_content(files: Sequence[RepoFile], folder: Path, source: HubModel) -> None:
    """Hold every file to the hash that the hub has of it; one that differs is removed, to be fetched again."""
    for file in files:
        path = folder / file.path
        wanted, here = (file.lfs.sha256, sha256(path)) if file.lfs is not None else (file.blob_id, _git_hash(path))
        if here != wanted:
            path.unlink()
            raise UserError(
                f"{source.repo} at {source.revision}: {file.path} came with other content than the hub records ({here} "
                f"instead of {wanted}); it was removed, run again to fetch it anew"
            )


def _git_hash(path: Path) -> str:
    """The hash that git has of a file's content."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _why(error: Exception, source: HubModel) -> str:
    """One line: what the hub, or the way to it, refuses, and the mend."""
    name, page = f"{source.repo} at {source.revision}", f"https://huggingface.co/{source.repo}"
    token = "the account of your HF_TOKEN" if get_token() else "your account, and set HF_TOKEN to a token of it"
    if isinstance(error, GatedRepoError):
        return f"{name}: gated by its licence; accept it on {page} with {token}"
    if isinstance(error, RevisionNotFoundError):
        return f"{name}: the repository has no such revision; correct `revision` to a commit of {page}/commits/main"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, RepositoryNotFoundError) or status in (401, 403):
        return f"{name}: not on the hub, or closed to you; correct `repo`, or set HF_TOKEN to a token that may read it"
    if isinstance(error, HFValidationError):
        return f"{name}: no name of a repository ({first_line(error)}); correct `repo` to <org>/<name>"
    if status is not None:
        return f"{name}: the hub answers {status}; run again later"
    return f"{name}: the hub cannot be reached ({first_line(error)}), nor is the model in its cache; {_NETWORK}"
