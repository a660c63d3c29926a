# One study a run: `snakemake --cores 2 [--configfile config/<study>.yaml] [--config GRASS_DATA=<path>]`.
# The study's own strict loader reads the file; Snakemake's merged `config` is used only for path variables.
# `snakemake --lint` still asks for environments of rules (versions are pinned in constraints.txt) and for `params` that
# hold PYTHON, CONFIG and RUNTIME: these do not define a run, and a changed param would make Snakemake run it again.
import os
import re
import sys
import time
from pathlib import Path

from snakemake.exceptions import WorkflowError

from harness.errors import UserError
from harness.progress import STUDY_FILE
from harness.study import progress
from harness.study.disk import jobs_at_once, too_little
from harness.study.jobs import EVALUATE, FORECAST, MODEL, PROBE, ROWS, SEARCH, SUITE, TRAIN
from harness.study.paths import Paths
from harness.study.plan import forecast_job, open_study, processes_of
from harness.study.supervision import pass_on_sigterm, take_folder

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
# Snakemake does not tell a Snakefile whether this is a dry run while it parses the file
DRY_RUN = any(re.fullmatch(r"--dry-?run|-[A-Za-z]*n[A-Za-z]*", word) for word in sys.argv[1:])
try:
    PLAN = open_study(CONFIG, PATHS, dry_run=DRY_RUN)
except UserError as error:
    raise WorkflowError(str(error)) from None
RUNTIME = PLAN.study.runtime
STUDY = PATHS.study(PLAN.study.study)
# used by the progress lines of the jobs
os.environ[STUDY_FILE] = str(CONFIG)
os.environ[progress.STUDY_STARTED] = str(time.time())
os.environ[progress.STUDY_DONE] = str(progress.study_work(CONFIG)[0])


def disk_is_too_small(files=None):
    """One line with the numbers, or None; `files` are those that will be made, None means all that are missing."""
    settings = workflow.resource_settings
    jobs = jobs_at_once(PLAN, cores=settings.cores, nodes=settings.nodes)
    return too_little(PLAN, PATHS, jobs=jobs, files=files)


if DRY_RUN and disk_is_too_small():
    print(f"this would be refused: {disk_is_too_small()}", file=sys.stderr)


# not in a dry run; a job of a cluster reads this file again, and is not asked
onstart:
    if workflow.is_main_process:
        if taken := take_folder(Path(".snakemake")):
            sys.exit(taken)
        pass_on_sigterm()
    files = {Path(file) for job in workflow.dag.needrun_jobs() for file in job.output}
    line = disk_is_too_small(files) if workflow.is_main_process else None
    if line:
        sys.exit(line)


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
        # listed again: Snakemake does not notice a lost record while the files made from it exist
        rules.collect.input,
