# Searches, training runs and their scores. One job leaves one declared output: what lies beside it is named in it.


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


rule forecast:
    input:
        lambda wildcards: inputs_of(PLAN.forecasts[wildcards.forecast].training),
    output:
        "results/forecasts/{forecast}/forecast.json",
    priority: 15
    params:
        spec="results/forecasts/{forecast}/spec.json",
    shell:
        "{PYTHON} -m harness fit --spec {params.spec}"


rule search:
    input:
        lambda wildcards: inputs_of(PLAN.searches[wildcards.search].training),
        lambda wildcards: forecast_of(PLAN.searches[wildcards.search].training),
    output:
        "results/searches/{search}/search.json",
    priority: 10
    threads: RUNTIME.threads
    params:
        spec="results/searches/{search}/spec.json",
        forecast=lambda wildcards: forecast_argument(PLAN.searches[wildcards.search].training),
    shell:
        "{PYTHON} -m harness search --spec {params.spec} --threads {threads}{params.forecast}"


rule train:
    input:
        lambda wildcards: inputs_of(PLAN.runs[wildcards.run].training),
        lambda wildcards: search_of(wildcards.run),
        lambda wildcards: forecast_of(PLAN.runs[wildcards.run].training),
    output:
        "results/runs/{run}/train.json",
    threads: RUNTIME.threads
    params:
        spec="results/runs/{run}/spec.json",
        forecast=lambda wildcards: forecast_argument(PLAN.runs[wildcards.run].training),
    shell:
        "{PYTHON} -m harness train --spec {params.spec} --threads {threads}"
        " --checkpoint-every {RUNTIME.checkpoint_every_steps}{params.forecast}"


rule evaluate:
    input:
        "results/runs/{run}/train.json",
        lambda wildcards: [
            PLACES.suite(suite.name) / "manifest.json" for suite in PLAN.evals[wildcards.evaluation].suites
        ],
    output:
        "results/runs/{run}/eval/{evaluation}.json",
    threads: RUNTIME.threads
    params:
        spec="results/evals/{evaluation}.json",
        run="results/runs/{run}",
    shell:
        "{PYTHON} -m harness evaluate --spec {params.spec} --run {params.run} --out {output}"
        " --threads {threads} --batch-size {RUNTIME.eval_batch_size}"
