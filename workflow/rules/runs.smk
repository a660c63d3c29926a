# Probes of untrained models, searches, training runs and their scores. A job declares one output; this file names all
# other files of the job.


rule probe:
    input:
        lambda wildcards: inputs_of(PLAN.probes[wildcards.probe]),
    output:
        PATHS.output(PROBE, "{probe}"),
    log:
        "results/logs/probe/{probe}.log",
    priority: 12
    threads: RUNTIME.threads
    resources:
        mem_mb=lambda wildcards: probe_needs(wildcards.probe).mem_mb,
        runtime=lambda wildcards: probe_needs(wildcards.probe).minutes,
        gpu=lambda wildcards: probe_needs(wildcards.probe).gpus,
    params:
        spec=str(PATHS.spec(PROBE, "{probe}")),
    shell:
        "{HARNESS} probe --spec {params.spec} --threads {threads} --log {log}"


rule forecast:
    input:
        lambda wildcards: inputs_of(PLAN.forecasts[wildcards.forecast].training),
    output:
        PATHS.output(FORECAST, "{forecast}"),
    log:
        "results/logs/forecast/{forecast}.log",
    priority: 15
    group:
        "forecasts"
    resources:
        mem_mb=needs.SMALL.mem_mb,
        runtime=needs.SMALL.minutes,
        in_turn=1,
    params:
        spec=str(PATHS.spec(FORECAST, "{forecast}")),
    shell:
        "{HARNESS} forecast --spec {params.spec} --log {log}"


rule search:
    input:
        lambda wildcards: inputs_of(PLAN.searches[wildcards.search].training),
        lambda wildcards: forecast_of(PLAN.searches[wildcards.search].training),
    output:
        PATHS.output(SEARCH, "{search}"),
    log:
        "results/logs/search/{search}.log",
    priority: 10
    threads: RUNTIME.threads
    resources:
        mem_mb=lambda wildcards: search_needs(wildcards.search).mem_mb,
        runtime=lambda wildcards: search_needs(wildcards.search).minutes,
        gpu=lambda wildcards: search_needs(wildcards.search).gpus,
        constraint=lambda wildcards: card_of(PLAN.searches[wildcards.search].training),
    params:
        spec=str(PATHS.spec(SEARCH, "{search}")),
        forecast=lambda wildcards: forecast_argument(PLAN.searches[wildcards.search].training),
    shell:
        "{HARNESS} search --spec {params.spec} --threads {threads}"
        " --checkpoint-every {RUNTIME.checkpoint_every_steps}{params.forecast} --log {log}"


rule train:
    input:
        lambda wildcards: inputs_of(PLAN.runs[wildcards.run].training),
        lambda wildcards: search_of(wildcards.run),
        lambda wildcards: forecast_of(PLAN.runs[wildcards.run].training),
    output:
        PATHS.output(TRAIN, "{run}"),
    log:
        "results/logs/train/{run}.log",
    # before further searches: a study that is stopped early has whole runs to show
    priority: 11
    threads: lambda wildcards: max(RUNTIME.threads, run_processes(wildcards.run))
    resources:
        mem_mb=lambda wildcards: run_needs(wildcards.run).mem_mb,
        runtime=lambda wildcards: run_needs(wildcards.run).minutes,
        gpu=lambda wildcards: run_needs(wildcards.run).gpus,
        constraint=lambda wildcards: card_of(PLAN.runs[wildcards.run].training),
        # not a param: a finished run stays as it is where their number changes
        processes=lambda wildcards: run_processes(wildcards.run),
    params:
        spec=str(PATHS.spec(TRAIN, "{run}")),
        forecast=lambda wildcards: forecast_argument(PLAN.runs[wildcards.run].training),
    shell:
        "{HARNESS} train --spec {params.spec} --threads {threads} --gpus {resources.processes}"
        " --checkpoint-every {RUNTIME.checkpoint_every_steps}{params.forecast} --log {log}"


rule evaluate:
    input:
        PATHS.output(TRAIN, "{run}"),
        lambda wildcards: [PATHS.output(SUITE, suite.name) for suite in PLAN.evals[wildcards.evaluation].all_suites],
    output:
        PATHS.score("{run}", "{evaluation}"),
    log:
        "results/logs/evaluate/{run}--{evaluation}.log",
    # before further runs: a model may be removed once it is scored (runtime.keep)
    priority: 14
    group:
        group_of_score
    threads: RUNTIME.threads
    resources:
        mem_mb=lambda wildcards: score_needs(wildcards.run, wildcards.evaluation).mem_mb,
        runtime=lambda wildcards: score_needs(wildcards.run, wildcards.evaluation).minutes,
        gpu=lambda wildcards: score_needs(wildcards.run, wildcards.evaluation).gpus,
        in_turn=1,
    params:
        spec=str(PATHS.spec(EVALUATE, "{evaluation}")),
        run=str(PATHS.run("{run}")),
    shell:
        "{HARNESS} evaluate --spec {params.spec} --run {params.run} --out {output}"
        " --threads {threads} --batch-size {RUNTIME.eval_batch_size} --log {log}"
