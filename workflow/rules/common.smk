# Helpers that several rules use to query the plan. The rules themselves are in the files beside this one.
from functools import cache

from harness.study import needs
from harness.study.paths import resolve


def local_files(texts):
    """Input files supplied by the user; a changed file makes its job run again."""
    return [] if DRY_RUN else [resolve(text) for text in texts]


def rows_files(source):
    return local_files([*(path for path, _ in getattr(source, "files", ())), *getattr(source, "without", ())])


def inputs_of(job):
    """Files that a training or a probe reads."""
    return [
        PATHS.output(MODEL, job.model.name),
        PATHS.output(ROWS, job.rows.name),
    ]


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
