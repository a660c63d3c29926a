# Searches, training runs and their scores. One job leaves one declared output: what lies beside it is named in it.


rule forecast:
    input:
        lambda wildcards: inputs_of(PLAN.forecasts[wildcards.forecast].training),
    output:
        "results/forecasts/{forecast}/forecast.json",
    log:
        "results/logs/forecast/{forecast}.log",
    priority: 15
    resources:
        mem_mb=needs.SMALL.mem_mb,
        runtime=needs.SMALL.minutes,
    params:
        spec="results/forecasts/{forecast}/spec.json",
    shell:
        "{PYTHON} -m harness fit --spec {params.spec} --log {log}"


rule search:
    input:
        lambda wildcards: inputs_of(PLAN.searches[wildcards.search].training),
        lambda wildcards: forecast_of(PLAN.searches[wildcards.search].training),
    output:
        "results/searches/{search}/search.json",
    log:
        "results/logs/search/{search}.log",
    priority: 10
    threads: RUNTIME.threads
    resources:
        mem_mb=lambda wildcards: search_needs(wildcards.search).mem_mb,
        runtime=lambda wildcards: search_needs(wildcards.search).minutes,
        gpu=lambda wildcards: search_needs(wildcards.search).gpus,
    params:
        spec="results/searches/{search}/spec.json",
        forecast=lambda wildcards: forecast_argument(PLAN.searches[wildcards.search].training),
    shell:
        "{PYTHON} -m harness search --spec {params.spec} --threads {threads}{params.forecast} --log {log}"


rule train:
    input:
        lambda wildcards: inputs_of(PLAN.runs[wildcards.run].training),
        lambda wildcards: search_of(wildcards.run),
        lambda wildcards: forecast_of(PLAN.runs[wildcards.run].training),
    output:
        "results/runs/{run}/train.json",
    log:
        "results/logs/train/{run}.log",
    threads: RUNTIME.threads
    resources:
        mem_mb=lambda wildcards: run_needs(wildcards.run).mem_mb,
        runtime=lambda wildcards: run_needs(wildcards.run).minutes,
        gpu=lambda wildcards: run_needs(wildcards.run).gpus,
    params:
        spec="results/runs/{run}/spec.json",
        forecast=lambda wildcards: forecast_argument(PLAN.runs[wildcards.run].training),
    shell:
        "{PYTHON} -m harness train --spec {params.spec} --threads {threads}"
        " --checkpoint-every {RUNTIME.checkpoint_every_steps}{params.forecast} --log {log}"


rule evaluate:
    input:
        "results/runs/{run}/train.json",
        lambda wildcards: [
            PLACES.suite(suite.name) / "manifest.json" for suite in PLAN.evals[wildcards.evaluation].suites
        ],
    output:
        "results/runs/{run}/eval/{evaluation}.json",
    log:
        "results/logs/evaluate/{run}--{evaluation}.log",
    threads: RUNTIME.threads
    resources:
        mem_mb=lambda wildcards: score_needs(wildcards.run, wildcards.evaluation).mem_mb,
        runtime=lambda wildcards: score_needs(wildcards.run, wildcards.evaluation).minutes,
        gpu=lambda wildcards: score_needs(wildcards.run, wildcards.evaluation).gpus,
    params:
        spec="results/evals/{evaluation}.json",
        run="results/runs/{run}",
    shell:
        "{PYTHON} -m harness evaluate --spec {params.spec} --run {params.run} --out {output}"
        " --threads {threads} --batch-size {RUNTIME.eval_batch_size} --log {log}"
