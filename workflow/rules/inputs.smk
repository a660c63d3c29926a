# What runs are fed with: models, training rows, test suites.


def local_files(texts):
    """Files of the user's own; a changed file makes its job run again."""
    from harness.study.paths import resolve

    return [] if DRY_RUN else [resolve(text) for text in texts]


rule pretrain:
    output:
        "results/inputs/models/{model}/manifest.json",
    wildcard_constraints:
        model="|".join(map(re.escape, PLAN.pretrained)) or "none",
    priority: 30
    threads: 1
    params:
        spec="results/inputs/models/{model}/spec.json",
    shell:
        "{PYTHON} -m harness pretrain --spec {params.spec} --threads {RUNTIME.threads}"


rule prefetch_model:
    output:
        "results/inputs/models/{model}/manifest.json",
    wildcard_constraints:
        model="|".join(re.escape(name) for name in PLAN.models if name not in PLAN.pretrained) or "none",
    priority: 30
    params:
        spec="results/inputs/models/{model}/spec.json",
    shell:
        "{PYTHON} -m harness prefetch model --spec {params.spec}"


rule prefetch_rows:
    input:
        lambda wildcards: local_files(getattr(PLAN.rows[wildcards.rows].source, "paths", ())),
    output:
        "results/inputs/rows/{rows}/manifest.json",
    priority: 20
    params:
        spec="results/inputs/rows/{rows}/spec.json",
    shell:
        "{PYTHON} -m harness prefetch rows --spec {params.spec}"


rule prefetch_suite:
    input:
        lambda wildcards: local_files(filter(None, [getattr(PLAN.suites[wildcards.suite].source, "path", None)])),
    output:
        "results/inputs/suites/{suite}/manifest.json",
    priority: 20
    params:
        spec="results/inputs/suites/{suite}/spec.json",
    shell:
        "{PYTHON} -m harness prefetch suite --spec {params.spec}"
