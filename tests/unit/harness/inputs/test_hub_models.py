"""Models of the hub through the real client: from a stand-in for its servers, from its cache, from a mirror folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from harness.checking.tiny import tiny_inputs
from harness.errors import UserError
from harness.inputs.make_models import make_model
from harness.records.atomic import sha256
from harness.study.jobs import ModelJob
from harness.study.sources import HubModel
from model_hub import COMMIT, Hub, running
from safetensors.torch import load_file

OPEN = "org/open"
PROGRAM = """
import os, sys, time
from pathlib import Path
from huggingface_hub import constants
time.sleep = lambda seconds: None  # between the client's attempts
constants.DOWNLOAD_CHUNK_SIZE = 1024  # of 10 MB otherwise: what is less is not kept when a download breaks off
if sys.argv[1] == "make":
    from harness.inputs.make_models import make_model
    def made(job, folder):
        return make_model(job, folder).model_dump_json()
else:  # without torch, whose import takes longer than all the rest
    import json
    from harness.inputs.hub_models import find_model
    def made(job, folder):
        found = find_model(job.source, folder / "model")
        files = [path.name for path in found.folder.iterdir() if path.is_file()]
        return json.dumps(
            {"came_from": found.came_from, "revision": found.revision, "folder": found.text, "files": files}
        )
from harness.errors import UserError
from harness.study.jobs import ModelJob
for text in sys.argv[2:]:
    if text.startswith("HF_TOKEN="):
        os.environ["HF_TOKEN"] = text.removeprefix("HF_TOKEN=")
        continue
    job = ModelJob.model_validate_json(text)
    try:
        print(made(job, Path("results") / job.name))
    except UserError as error:
        print("\\"" + str(error).replace("\\"", "'") + "\\"")
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tiny_inputs(tmp_path_factory.mktemp("made")).model
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def hub_model(repo: str = OPEN, revision: str = COMMIT) -> ModelJob:
    return ModelJob(label="m", source=HubModel(kind="hub", repo=repo, revision=revision))


def made(folder: Path, *jobs: ModelJob | str, do: Literal["make", "find"] = "find", **environment: str) -> list[Any]:
    """What a process of its own finds, or makes, of each, since the client reads its settings as it is imported.

    The token alone is read at each request: "HF_TOKEN=..." among the jobs sets it for those after it.
    """
    words = [job if isinstance(job, str) else job.model_dump_json() for job in jobs]
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "MIRROR"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, do, *words],
        env=clean | {"HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"} | environment,
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_model_comes_from_the_hub_and_what_is_wrong_is_one_line(tmp_path: Path, files: dict[str, bytes]) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(files["model.safetensors"])
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    old = {name: data for name, data in files.items() if name != "model.safetensors"}
    old |= {"pytorch_model.bin": (folder / "pytorch_model.bin").read_bytes()}
    twice = files | {"pytorch_model.bin": b"not asked for", "consolidated.safetensors": b"nor this", "README.md": b""}
    hub = Hub(
        {OPEN: twice, "org/old": old, "org/gated": files, "org/false": files},
        gated=frozenset({"org/gated"}),
        false_content=frozenset({"org/false"}),
    )
    jobs = [
        hub_model(),
        hub_model("org/old", "main"),
        hub_model("org/absent"),
        hub_model(revision="b" * 40),
        hub_model("org/gated"),
        hub_model("org/false"),
        hub_model("no/such/name"),
    ]
    with running(hub):
        fetched, main, *said, again, token = made(
            tmp_path, *jobs, jobs[5], "HF_TOKEN=hf_none", hub_model("org/gated"), do="make", HF_ENDPOINT=hub.address
        )
    assert (fetched["came_from"], fetched["revision"]) == ("hub", COMMIT)
    assert fetched["folder"] == f"results/{jobs[0].name}/model"
    assert set(fetched["files_sha256"]) == set(files)
    assert (main["revision"], set(main["files_sha256"])) == (COMMIT, set(old))
    other, page = "b" * 40, "https://huggingface.co/org"
    assert said[:3] == [
        f"org/absent at {COMMIT}: not on the hub, or closed to you; correct `repo`, or set HF_TOKEN to a token that "
        "may read it",
        f"{OPEN} at {other}: the repository has no such revision; correct `revision` to a commit of "
        f"{page}/open/commits/main",
        f"org/gated at {COMMIT}: gated by its licence; accept it on {page}/gated with your account, and set HF_TOKEN "
        "to a token of it",
    ]
    assert token == (
        f"org/gated at {COMMIT}: gated by its licence; accept it on {page}/gated with the account of your HF_TOKEN"
    )
    false = f"org/false at {COMMIT}: model.safetensors came with other content than the hub records ("
    assert said[3].startswith(false)
    assert again.startswith(false), "the false file was kept, and taken for the right one"
    assert said[4].startswith(f"no/such/name at {COMMIT}: no name of a repository (")
    assert sorted(path.name for path in (tmp_path / "results").glob("*/manifest.json")) == ["manifest.json"] * 2


def test_a_connection_that_breaks_in_mid_file_is_taken_up_where_it_broke(
    tmp_path: Path, files: dict[str, bytes]
) -> None:
    half = len(files["model.safetensors"]) // 2
    with running(Hub({OPEN: files}, cut_after=half)) as hub:
        (record,) = made(tmp_path, hub_model(), HF_ENDPOINT=hub.address)
    whole, rest = hub.ranges
    assert whole == ""
    assert half - 1024 <= int(rest.removeprefix("bytes=").removesuffix("-")) <= half
    assert (tmp_path / record["folder"] / "model.safetensors").read_bytes() == files["model.safetensors"]


def test_a_hub_that_is_gone_in_mid_file_costs_that_file_alone(tmp_path: Path, files: dict[str, bytes]) -> None:
    with running(Hub({OPEN: files}, cut_after=1024, gone_then=True)) as hub:
        (said,) = made(tmp_path, hub_model(), HF_ENDPOINT=hub.address)
    assert said.startswith(f"{OPEN} at {COMMIT}: the download broke off (")
    assert said.endswith("run again, what is whole is not fetched anew")
    assert not (tmp_path / "results" / hub_model().name / "model" / "model.safetensors").exists()
    with running(Hub({OPEN: files})) as hub:
        (record,) = made(tmp_path, hub_model(), HF_ENDPOINT=hub.address)
    assert hub.ranges == [""]
    assert set(record["files"]) == set(files)


def test_without_a_network_the_cache_of_the_hub_is_taken(tmp_path: Path, files: dict[str, bytes]) -> None:
    program = f"from huggingface_hub import snapshot_download; snapshot_download({OPEN!r}, revision={COMMIT!r})"
    with running(Hub({OPEN: files})) as hub:
        environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.address}
        subprocess.run([sys.executable, "-c", program], env=environment, check=True, capture_output=True)
    cached, said = made(tmp_path, hub_model(), hub_model("org/other"), HF_HUB_OFFLINE="1")
    assert (cached["came_from"], cached["revision"], set(cached["files"])) == ("hub cache", COMMIT, set(files))
    assert said.startswith(f"org/other at {COMMIT}: the hub cannot be reached (")
    assert said.endswith(
        "nor is the model in its cache; fetch it where there is a network, give --config MIRROR=<folder with "
        "<org>/<name>/ in it>, or use kind: local"
    )
    (unreached,) = made(tmp_path, hub_model("org/other"), HF_ENDPOINT=hub.address)
    assert unreached.startswith(f"org/other at {COMMIT}: the hub cannot be reached (")


def in_mirror(mirror: Path, files: dict[str, bytes]) -> Path:
    folder = mirror / OPEN
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def test_a_mirror_folder_is_taken_before_the_network(
    tmp_path: Path, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = in_mirror(tmp_path / "mirror", files)
    monkeypatch.setenv("MIRROR", str(tmp_path / "mirror"))
    record = make_model(hub_model(), tmp_path / "m")
    assert (record.folder, record.came_from, record.revision) == (f"${{MIRROR}}/{OPEN}", "mirror", None)
    assert str(tmp_path) not in (tmp_path / "m" / "manifest.json").read_text(encoding="utf-8")
    assert record.files_sha256["model.safetensors"] == sha256(folder / "model.safetensors")
    shutil.rmtree(folder)
    with pytest.raises(UserError, match=rf"^MIRROR={tmp_path}/mirror has no folder {OPEN}; put the model there \(hf"):
        make_model(hub_model(), tmp_path / "m")


def test_a_mirror_of_another_revision_is_refused(
    tmp_path: Path, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = in_mirror(tmp_path, files)
    note = folder / ".cache" / "huggingface" / "download" / "config.json.metadata"
    note.parent.mkdir(parents=True)
    note.write_text(f"{'c' * 40}\netag\n0\n", encoding="utf-8")
    monkeypatch.setenv("MIRROR", str(tmp_path))
    with pytest.raises(UserError, match=f"was fetched at revision {'c' * 40}, and the study pins {COMMIT}; "):
        make_model(hub_model(), tmp_path / "m")
    assert make_model(hub_model(revision="main"), tmp_path / "m").revision == "c" * 40
