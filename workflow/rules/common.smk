# What several rules ask of the plan. Rules themselves are in the files beside this one.
from functools import cache

from harness.study import needs
from harness.study.paths import resolve
from harness.study.plan import fit_job


def local_files(texts):
    """Files of the user's own; a changed file makes its job run again."""
    return [] if DRY_RUN else [resolve(text) for text in texts]


def inputs_of(training):
    return [
        PLACES.model(training.model.name) / "manifest.json",
        PLACES.rows(training.rows.name) / "manifest.json",
    ]


def search_of(run):
    search = PLAN.runs[run].search_job()
    return [] if search is None else [PLACES.search(search.name) / "search.json"]


def forecast_of(training):
    job = fit_job(training)
    return [] if job is None else [PLACES.forecast(job.name) / "forecast.json"]


def forecast_argument(training):
    return "".join(f" --forecast {path}" for path in forecast_of(training))


# ------------------------------------------------------------ resources: upper bounds, see harness.study.needs


@cache
def model_needs(model):
    return needs.of_model(PLAN.models[model], PLACES)


@cache
def search_needs(search):
    return needs.of_search(PLAN.searches[search], PLACES)


@cache
def run_needs(run):
    return needs.of_training(PLAN.runs[run].training, PLACES)


@cache
def score_needs(run, evaluation):
    return needs.of_evaluation(
        PLAN.evals[evaluation], PLAN.runs[run].training, PLACES, batch_size=RUNTIME.eval_batch_size
    )
