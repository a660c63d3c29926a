# Helpers that several rules use to query the plan. The rules themselves are in the files beside this one.
from functools import cache

from harness.study import contents, needs


def inputs_of(job):
    """Files that a training or a probe reads."""
    return [
        PATHS.output(MODEL, job.model.name),
        PATHS.output(ROWS, job.rows.name),
    ]


def overlap_inputs(overlap):
    job = PLAN.overlaps[overlap]
    return [PATHS.output(ROWS, job.rows.name), *(PATHS.output(SUITE, suite.name) for suite in job.suites)]


def search_of(run):
    search = PLAN.runs[run].search_job()
    return [] if search is None else [PATHS.output(SEARCH, search.name)]


def forecast_of(training):
    job = forecast_job(training)
    return [] if job is None else [PATHS.output(FORECAST, job.name)]


def forecast_argument(training):
    return "".join(f" --forecast {path}" for path in forecast_of(training))


# ------------------------------------------------------------ resources: upper bounds, see harness.study.needs


@cache
def model_needs(model):
    return needs.of_model(PLAN.models[model], PATHS)


@cache
def probe_needs(probe):
    return needs.of_probe(PLAN.probes[probe], PATHS)


@cache
def search_needs(search):
    return needs.of_search(PLAN.searches[search], PATHS)


@cache
def run_processes(run):
    return processes_of(PLAN.study, PLAN.runs[run].training)


@cache
def run_needs(run):
    return needs.of_training(PLAN.runs[run].training, PATHS, processes=run_processes(run))


@cache
def score_needs(run, evaluation):
    return needs.of_evaluation(
        PLAN.evals[evaluation], PLAN.runs[run].training, PATHS, batch_size=RUNTIME.eval_batch_size
    )


def card_of(training):
    """For a cluster's scheduler, which asks when the forecast is there."""
    job = forecast_job(training)
    return None if job is None else card_for(PATHS.output(FORECAST, job.name), CARDS)


# ------------------------------------------------------------ groups of short jobs, on a cluster only: see profiles/slurm


def group_of_score(wildcards):
    """Of runs that are trained already: a group starts when all its inputs are there, and one failed training would
    keep the scores of others. A long one is a job of its own: a group asks for the time of all its members."""
    if score_needs(wildcards.run, wildcards.evaluation).minutes > needs.SHORT_MINUTES:
        return None
    return "scores" if was_trained(wildcards.run) else None


@cache
def was_trained(run):
    """When first asked: Snakemake asks again while it works, and cannot bear that a group changes."""
    return PATHS.output(TRAIN, run).is_file()
