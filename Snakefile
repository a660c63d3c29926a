# One study a run: `snakemake --cores 2 [--config STUDY=config/<study>.yaml GRASS_DATA=<path>]`.
# Snakemake gets the name of the study's file alone: given as `--configfile`, the file could hold Python that Snakemake
# runs before this line is reached (`__use_yte__`). Our own strict loader reads it.
# `snakemake --lint` still asks for environments of rules (versions are pinned in constraints.txt) and for `params` that
# hold PYTHON, CONFIG and RUNTIME: these do not define a run, and a changed param would make Snakemake run it again.
import os
import re
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

from harness.errors import UserError
from harness.progress import STUDY_FILE
from harness.study import curves, progress, workers
from harness.study.cards import card_for, cards
from harness.study.disk import jobs_at_once, too_little
from harness.study.jobs import EVALUATE, FORECAST, MODEL, OVERLAP, PROBE, ROWS, SEARCH, SUITE, TRAIN
from harness.study.paths import Paths
from harness.study.plan import forecast_job, open_study, processes_of, reopen_study
from harness.study.supervision import copy_of, pass_on_sigterm, take_folder, told_to_end

if workflow.overwrite_configfiles:
    raise WorkflowError("--configfile is not taken: give the study's file as --config STUDY=config/<study>.yaml")
given = dict(workflow.config_settings.config)
CONFIG = Path(os.path.relpath(str(given.pop("STUDY", "config/embedded.yaml"))))
for name, value in given.items():
    if re.fullmatch(r"[A-Z][A-Z0-9_]*", name) is None:
        raise WorkflowError(
            f"--config {name}: only STUDY=<file> and path variables such as GRASS_DATA=<path> are taken"
        )
    os.environ[name] = str(value)

PATHS = Paths()
PYTHON = sys.executable
# a job of a cluster reads this file again, in its own process; what follows from the whole study is done once
IN_JOB = not workflow.is_main_process
# Snakemake does not tell a Snakefile whether this is a dry run while it parses the file
DRY_RUN = not IN_JOB and any(re.fullmatch(r"--dry-?run|-[A-Za-z]*n[A-Za-z]*", word) for word in sys.argv[1:])
try:
    CARDS = cards()
    curves.wanted()  # not by every run, in turn
    if IN_JOB:
        PLAN = reopen_study(CONFIG)
        AS_BEGUN = CONFIG
        # a shell in between would end at a SIGTERM, and the cluster would then kill what has yet to save
        shell.prefix("exec ")
    else:
        PLAN = open_study(CONFIG, PATHS, dry_run=DRY_RUN)
        COPY = copy_of(CONFIG, Path(".snakemake").absolute())
        # what jobs and the report are given: an edited config does not change a study under way
        AS_BEGUN = Path(os.path.relpath(COPY.path))
        workflow.config_settings.config_args = [
            f"{name}={value}" for name, value in {**given, "STUDY": COPY.path}.items()
        ]
except UserError as error:
    raise WorkflowError(str(error)) from None
RUNTIME = PLAN.study.runtime
STUDY = PATHS.study(PLAN.study.study)
# of jobs that may run in a warm worker; on a cluster each is a process of its own, which the scheduler knows
LOCAL = not IN_JOB and workflow.resource_settings.nodes is None
HARNESS = workers.command(warm=LOCAL)
if not IN_JOB:
    os.environ[STUDY_FILE] = str(CONFIG)


def disk_is_too_small(files=None):
    """One line with the numbers, or None; `files` are those that will be made, None means all that are missing."""
    settings = workflow.resource_settings
    jobs = jobs_at_once(PLAN, cores=settings.cores, nodes=settings.nodes)
    return too_little(PLAN, PATHS, jobs=jobs, files=files)


if DRY_RUN and disk_is_too_small():
    print(f"this would be refused: {disk_is_too_small()}", file=sys.stderr)


# not in a dry run, and not in a job of a cluster
onstart:
    if taken := take_folder(Path(".snakemake")):
        sys.exit(taken)
    pass_on_sigterm()
    COPY.write()
    # jobs inherit it, for their progress lines
    os.environ |= progress.begin(PLAN, PATHS, Path(".snakemake") / "study.work")
    jobs = list(workflow.dag.needrun_jobs())
    if line := disk_is_too_small({Path(file) for job in jobs for file in job.output}):
        sys.exit(line)
    if LOCAL:
        os.environ |= workers.start(PLAN, {job.rule.name for job in jobs}, Path(".snakemake") / "workers")


# on a cluster these stay where Snakemake runs: a compute node may have no network to fetch from, and what is made of all
# records at the end takes less time than another wait in the queue
localrules:
    prefetch_model,
    prefetch_rows,
    prefetch_suite,
    overlap,
    collect,
    tables,
    figures,
    page,


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
