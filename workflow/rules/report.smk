# Tables, figures and one page from the records. Each can be remade separately.
import shutil

FRAMES = [
    "runs",
    "scores",
    "documents",
    "lm_eval",
    "lm_eval_documents",
    "trials",
    "steps",
    "believed",
    "observed",
    "probes",
    "probed",
    "overlaps",
    "overlapping",
]


rule collect:
    input:
        [PATHS.output(TRAIN, run) for run in PLAN.runs],
        [PATHS.score(run, evaluation) for run, evaluation in PLAN.evaluation_of.items()],
        [PATHS.output(SEARCH, search) for search in PLAN.searches],
        [PATHS.output(PROBE, probe) for probe in PLAN.probes],
        [PATHS.output(OVERLAP, overlap) for overlap in PLAN.overlaps],
    output:
        [STUDY / f"{name}.parquet" for name in FRAMES],
    log:
        f"results/logs/collect/{PLAN.study.study}.log",
    resources:
        mem_mb=needs.SMALL.mem_mb,
        runtime=needs.SMALL.minutes,
    params:
        out=STUDY,
    shell:
        "{HARNESS} collect --config {AS_BEGUN:q} --out {params.out} --log {log}"


rule tables:
    input:
        [STUDY / f"{name}.parquet" for name in FRAMES],
        *filter(None, [PLAN.study.published, PLAN.study.claims]),
    output:
        report(directory(STUDY / "tables"), patterns=["{name}.md"], caption="../report/tables.rst", category="Tables"),
    log:
        f"results/logs/tables/{PLAN.study.study}.log",
    resources:
        mem_mb=needs.SMALL.mem_mb,
        runtime=needs.SMALL.minutes,
    params:
        frames=STUDY,
    shell:
        "{HARNESS} tables --config {AS_BEGUN:q} --frames {params.frames} --out {output} --log {log}"


rule figures:
    input:
        [STUDY / f"{name}.parquet" for name in FRAMES],
    output:
        figures=report(
            directory(STUDY / "figures"), patterns=["{name}.svg"], caption="../report/figures.rst", category="Figures"
        ),
        captions=STUDY / "figures.json",
    log:
        f"results/logs/figures/{PLAN.study.study}.log",
    resources:
        mem_mb=needs.SMALL.mem_mb,
        runtime=needs.SMALL.minutes,
    params:
        frames=STUDY,
    shell:
        "{HARNESS} figures --config {AS_BEGUN:q} --frames {params.frames} --out {output.figures} --log {log}"


rule page:
    input:
        [STUDY / f"{name}.parquet" for name in FRAMES],
        # `ancient`: made from the same rows, so redrawing lost figures does not make the page outdated. The figures are
        # represented by their captions file, which remains when the folder of figures is lost.
        ancient(STUDY / "figures.json"),
        ancient(STUDY / "tables"),
    output:
        page=report(STUDY / "report.html", caption="../report/page.rst", category="Page"),
        text=STUDY / "report.txt",
    log:
        f"results/logs/page/{PLAN.study.study}.log",
    resources:
        mem_mb=needs.SMALL.mem_mb,
        runtime=needs.SMALL.minutes,
    params:
        frames=STUDY,
    shell:
        "{HARNESS} page --config {AS_BEGUN:q} --frames {params.frames} --out {output.page} --log {log}"


# One failed job must not take the other runs' tables with it. They go to a folder of their own, since Snakemake must
# not take them for its outputs.
onerror:
    if not told_to_end():
        shell("{PYTHON:q} -m harness partial --config {AS_BEGUN:q}")


onsuccess:
    shutil.rmtree(STUDY / "partial", ignore_errors=True)
