# One study a run: `snakemake --cores 2 [--configfile config/<study>.yaml] [--config GRASS_DATA=<path>]`.
# The study's own strict loader reads the file; Snakemake's merged `config` is used for nothing but path variables.
# `snakemake --lint` still asks for environments of rules (versions are pinned in constraints.txt) and for `params` that
# hold PYTHON, CONFIG and RUNTIME: they are no part of what a run is, and another value of a param would run it again.
import os
import re
import sys
import time
from pathlib import Path

from snakemake.exceptions import WorkflowError

from harness.errors import UserError
from harness.progress import STUDY_FILE
from harness.study import progress
from harness.study.jobs import EVALUATE, FORECAST, MODEL, ROWS, SEARCH, SUITE, TRAIN
from harness.study.paths import Paths
from harness.study.plan import forecast_job, open_study

for name, value in workflow.config_settings.config.items():
    if re.fullmatch(r"[A-Z][A-Z0-9_]*", name) is None:
        raise WorkflowError(f"--config {name}: only path variables such as GRASS_DATA=<path> are taken")
    os.environ[name] = str(value)

given = list(workflow.overwrite_configfiles)
if len(given) > 1:
    raise WorkflowError("give one --configfile: a study is one file, nothing is merged into it")
CONFIG = Path(os.path.relpath(given[0])) if given else Path("config/embedded.yaml")
PATHS = Paths()
PYTHON = sys.executable
# Snakemake tells a Snakefile nothing of this while it is parsed
DRY_RUN = any(re.fullmatch(r"--dry-?run|-[A-Za-z]*n[A-Za-z]*", word) for word in sys.argv[1:])
try:
    PLAN = open_study(CONFIG, PATHS, dry_run=DRY_RUN)
except UserError as error:
    raise WorkflowError(str(error)) from None
RUNTIME = PLAN.study.runtime
STUDY = PATHS.study(PLAN.study.study)
# for the progress lines of the jobs
os.environ[STUDY_FILE] = str(CONFIG)
os.environ[progress.STUDY_STARTED] = str(time.time())
os.environ[progress.STUDY_DONE] = str(progress.study_work(CONFIG)[0])


include: "workflow/rules/common.smk"
include: "workflow/rules/inputs.smk"
include: "workflow/rules/runs.smk"
include: "workflow/rules/report.smk"


rule all:
    default_target: True
    input:
        STUDY / "report.html",
        STUDY / "tables",
        STUDY / "figures",
        # named again: Snakemake does not miss a lost record while what was made of it is there
        rules.collect.input,
