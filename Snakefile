# One study a run: `snakemake --cores 2 [--configfile config/<study>.yaml] [--config GRASS_DATA=<path>]`.
# The study's own strict loader reads the file; Snakemake's merged `config` is used for nothing but path variables.
import os
import re
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

from harness.config import ConfigError
from harness.places import Places
from harness.plan import open_study


def one_study():
    given = list(workflow.overwrite_configfiles)
    if len(given) > 1:
        raise WorkflowError("give one --configfile: a study is one file, nothing is merged into it")
    return Path(os.path.relpath(given[0])) if given else Path("config/embedded.yaml")


for name, value in workflow.config_settings.config.items():
    if re.fullmatch(r"[A-Z][A-Z0-9_]*", name) is None:
        raise WorkflowError(f"--config {name}: only path variables such as GRASS_DATA=<path> are taken")
    os.environ[name] = str(value)

CONFIG = one_study()
PLACES = Places()
PYTHON = sys.executable
try:
    PLAN = open_study(CONFIG, PLACES)
except ConfigError as error:
    raise WorkflowError(str(error)) from None
RUNTIME = PLAN.study.runtime
STUDY = PLACES.study(PLAN.study.study)
os.environ["GRASS_STUDY"] = str(CONFIG)


include: "workflow/rules/inputs.smk"
include: "workflow/rules/runs.smk"
include: "workflow/rules/report.smk"


rule all:
    default_target: True
    input:
        STUDY / "report.html",
