# Inputs of runs: models, training rows, test suites.


rule pretrain:
    output:
        PATHS.output(MODEL, "{model}"),
    log:
        "results/logs/pretrain/{model}.log",
    wildcard_constraints:
        model="|".join(map(re.escape, PLAN.pretrained)) or "none",
    priority: 30
    threads: 1
    resources:
        mem_mb=lambda wildcards: model_needs(wildcards.model).mem_mb,
        runtime=lambda wildcards: model_needs(wildcards.model).minutes,
    params:
        spec=str(PATHS.spec(MODEL, "{model}")),
    shell:
        "{HARNESS} pretrain --spec {params.spec} --threads {RUNTIME.threads} --log {log}"


rule prefetch_model:
    output:
        PATHS.output(MODEL, "{model}"),
    log:
        "results/logs/prefetch_model/{model}.log",
    wildcard_constraints:
        model="|".join(re.escape(name) for name in PLAN.models if name not in PLAN.pretrained) or "none",
    priority: 30
    resources:
        mem_mb=lambda wildcards: model_needs(wildcards.model).mem_mb,
        runtime=lambda wildcards: model_needs(wildcards.model).minutes,
    params:
        spec=str(PATHS.spec(MODEL, "{model}")),
    shell:
        "{PYTHON:q} -m harness prefetch model --spec {params.spec} --log {log}"


rule prefetch_rows:
    output:
        PATHS.output(ROWS, "{rows}"),
    log:
        "results/logs/prefetch_rows/{rows}.log",
    priority: 20
    resources:
        mem_mb=needs.SMALL.mem_mb,
        runtime=needs.SMALL.minutes,
    params:
        spec=str(PATHS.spec(ROWS, "{rows}")),
        content=lambda wildcards: contents.of_rows(PLAN.rows[wildcards.rows].source),
    shell:
        "{PYTHON:q} -m harness prefetch rows --spec {params.spec} --log {log}"


rule prefetch_suite:
    output:
        PATHS.output(SUITE, "{suite}"),
    log:
        "results/logs/prefetch_suite/{suite}.log",
    priority: 20
    resources:
        mem_mb=needs.SMALL.mem_mb,
        runtime=needs.SMALL.minutes,
    params:
        spec=str(PATHS.spec(SUITE, "{suite}")),
        content=lambda wildcards: contents.of_suite(PLAN.suites[wildcards.suite].source),
    shell:
        "{PYTHON:q} -m harness prefetch suite --spec {params.spec} --log {log}"


rule overlap:
    input:
        lambda wildcards: overlap_inputs(wildcards.overlap),
    output:
        PATHS.output(OVERLAP, "{overlap}"),
    log:
        "results/logs/overlap/{overlap}.log",
    priority: 20
    resources:
        mem_mb=needs.SMALL.mem_mb,
        runtime=needs.SMALL.minutes,
    params:
        spec=str(PATHS.spec(OVERLAP, "{overlap}")),
    shell:
        "{PYTHON:q} -m harness prefetch overlap --spec {params.spec} --log {log}"
