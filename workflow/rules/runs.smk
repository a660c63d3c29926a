# Searches, training runs and their scores. One job leaves one declared output: what lies beside it is named in it.


def inputs_of(training):
    return [
        PLACES.model(training.model.name) / "manifest.json",
        PLACES.rows(training.rows.name) / "manifest.json",
    ]


def search_of(run):
    search = PLAN.runs[run].search_job()
    return [] if search is None else [PLACES.search(search.name) / "search.json"]


rule search:
    input:
        lambda wildcards: inputs_of(PLAN.searches[wildcards.search].training),
    output:
        "results/searches/{search}/search.json",
    priority: 10
    threads: RUNTIME.threads
    params:
        spec="results/searches/{search}/spec.json",
    shell:
        "{PYTHON} -m harness search --spec {params.spec} --threads {threads}"


rule train:
    input:
        lambda wildcards: inputs_of(PLAN.runs[wildcards.run].training),
        lambda wildcards: search_of(wildcards.run),
    output:
        "results/runs/{run}/train.json",
    threads: RUNTIME.threads
    params:
        spec="results/runs/{run}/spec.json",
    shell:
        "{PYTHON} -m harness train --spec {params.spec} --threads {threads}"
        " --checkpoint-every {RUNTIME.checkpoint_every_steps}"


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
