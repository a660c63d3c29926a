"""A made-up study with realistic rows: 2 tasks, 3 suites, base and 5 methods, 3 seeds, some bad outcomes."""

from __future__ import annotations

from typing import Any

import numpy as np
from harness.records.columns import FRAMES
from harness.reporting.frames import Frames, rows_to_frame
from harness.study.spec import Study

from baselines.method import Recipe

LAYERS = 8
STEPS = 200
SEEDS = (0, 1, 2)
PERIOD = 10
DOCUMENTS = 120
MODEL = "tiny"
SUITES = {"arithmetic": ("two-step", "three-step"), "choice": ("held-out",)}
SKILL = {"base": 0.03, "full": 0.62, "lora": 0.44, "lisa": 0.58, "grass-static": 0.57, "grass": 0.66}
BAD = {
    ("arithmetic", "lisa", 2): (
        "disengaged",
        "active set never rotated",
        "rotation: promised every 10 steps, saw none",
    ),
    ("choice", "lora", 0): ("skipped", "needs peft", None),
    ("choice", "lora", 1): ("skipped", "needs peft", None),
    ("choice", "lora", 2): ("skipped", "needs peft", None),
    ("choice", "full", 1): ("oom", "host memory: 2.1 GiB wanted", None),
}


def study() -> Study:
    suite = {"kind": "generated", "seed": 5, "rows": DOCUMENTS, "max_new_tokens": 32}
    rows = {"kind": "generated", "seed": 1, "train_rows": 1000, "validation_rows": 100}
    methods: dict[str, dict[str, Any]] = {
        "base": {"module": "base", "lr": 1.0},
        "full": {"module": "full"},
        "lora": {
            "module": "lora",
            "recipe": {"weight_decay": 0.01},
            "note": "r = 128; its rank is the paper's, alpha is ours.",
        },
        "lisa": {"module": "lisa"},
        "grass-static": {"module": "grass", "options": {"refresh": False}},
        "grass": {"module": "grass", "note": "Temperature and refresh period are ours."},
    }
    body = {
        "study": "synthetic",
        "title": "Synthetic <study> & check",
        "notes": ["Made-up numbers: shows the layout & nothing else.", "Every knob the paper leaves open is ours."],
        "seeds": SEEDS,
        "published": "config/published/grass.yaml",
        "models": {MODEL: {"kind": "local", "path": "nowhere"}},
        "tasks": {
            "arithmetic": {
                "train": rows | {"family": "arithmetic"},
                "suites": {
                    "two-step": suite | {"variant": "two-step", "scoring": "number"},
                    "three-step": suite | {"variant": "three-step", "scoring": "number"},
                },
            },
            "choice": {
                "train": rows | {"family": "choice"},
                "suites": {"held-out": suite | {"variant": "choice", "scoring": "letter"}},
                "recipe": {"max_length": 96},
            },
        },
        "methods": methods,
        "recipe": Recipe(
            steps=STEPS, batch_size=16, micro_batch_size=16, max_length=128, loss_on="answer", warmup_steps=10,
            max_grad_norm=1.0,
        ).model_dump(),
        "search": {"grid": (1e-4, 3e-4, 1e-3), "seeds": (100, 101), "max_extensions": 2},
        "observation": {"every_steps": 20, "rows": 32},
    }  # fmt: skip
    return Study.model_validate(body, strict=False)


def frames(seed: int = 0) -> Frames:
    rng = np.random.default_rng(seed)
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in FRAMES}
    for task in SUITES:
        for m, method in enumerate(SKILL):
            if method != "base":
                rows["trials"] += _trials(task, method, m)
            for k in SEEDS:
                if method == "base" and k > 0:
                    continue
                run = f"{MODEL}--{task}--{method}--seed{k}--{m}{k}abcdef"
                rows["runs"].append(_run(rng, run, task, method, k))
                bad = BAD.get((task, method, k))
                if bad is None or bad[0] == "disengaged":
                    _scores(rng, rows, run, task, method, disengaged=bad is not None)
                    if method != "base":
                        _course(rng, rows, run, method, m)
    for task, suites in SUITES.items():
        for suite in suites:
            shared = [0, 1, 2, 3] if suite == "two-step" else []
            counted = {"exact": len(shared), "masked": len(shared), "ngram": 0}
            rows["overlaps"].append({"task": task, "suite": suite, "items": DOCUMENTS, "train_rows": 1000} | counted)
            rows["overlapping"] += [
                {"task": task, "suite": suite, "document": n, "exact": True, "masked": True, "ngram": False}
                for n in shared
            ]
    return Frames(**{name: rows_to_frame(name, rows[name]) for name in FRAMES})


def _run(rng: np.random.Generator, run: str, task: str, method: str, seed: int) -> dict[str, Any]:
    status, reason, failed = BAD.get((task, method, seed), ("ok", None, None))
    trained = method != "base" and status in ("ok", "disengaged")
    whole, share = 3_407_872, {"lora": 0.05, "lisa": 0.4, "grass-static": 0.4, "grass": 0.4}.get(method, 1.0)
    row: dict[str, Any] = dict.fromkeys(FRAMES["runs"])
    row |= {
        "run": run, "model": MODEL, "task": task, "method": method, "module": method.split("-")[0], "seed": seed,
        "status": status, "status_why": reason, "failed_checks": failed,
        "notes": "collapsed: 2.10 layers effective" if method == "grass" else "", "lr": 3e-4 if trained else None,
        "lr_searched": True, "recipe_changes": "weight_decay" if method == "lora" else "",
        "steps": STEPS if trained else 0,
        "parameters": whole, "stale": method == "full" and seed == 0, "git_commit": "0123456789abcdef0123",
        "platform": "Linux x86_64, Example CPU", "device": "cpu", "device_why": "the run was on the CPU",
        "nvml_why": "no NVIDIA driver", "train_rows": 1000, "truncated_rows": 2, "dropped_rows": 0,
    }  # fmt: skip
    if trained:
        speed = {"full": 5200.0, "lora": 5900.0}.get(method, 6400.0) * (1 + 0.02 * rng.standard_normal())
        row |= {
            "trainable_parameters": int(whole * share), "train_loss": 0.4, "validation_loss": 0.45 + 0.01 * seed,
            "clipped_share": 0.12, "train_s": 120.5, "prepare_s": 3.0, "step_median_s": 0.5, "step_p95_s": 0.6,
            "throughput_tokens_per_s": speed, "throughput_total_tokens_per_s": 1.1 * speed,
            "host_peak_bytes": 900_000_000 + seed, "state_peak_bytes": int(whole * share * 8) + seed,
        }  # fmt: skip
    else:
        row["throughput_why"] = "nothing was trained"
    return row


def _scores(
    rng: np.random.Generator,
    rows: dict[str, list[dict[str, Any]]],
    run: str,
    task: str,
    method: str,
    *,
    disengaged: bool,
) -> None:
    for suite in SUITES[task]:
        skill = 0.05 if disengaged else SKILL[method] - 0.2 * (suite == "three-step")
        shared = np.random.default_rng(len(suite)).random(DOCUMENTS)  # the same documents are hard for every run
        correct = 0.7 * shared + 0.3 * rng.random(DOCUMENTS) < max(skill, 0.02)
        parsed = correct | (rng.random(DOCUMENTS) < 0.97)
        loss = 1.6 - skill + 0.3 * shared + 0.02 * rng.standard_normal(DOCUMENTS)
        tokens = 5 + np.arange(DOCUMENTS) % 4
        for d in range(DOCUMENTS):
            rows["documents"].append(
                {"run": run, "suite": suite, "document": d, "correct": bool(correct[d]), "correct_normalised": None,
                 "parsed": bool(parsed[d]),
                 "prediction": "7", "gold": "7", "loss": float(loss[d]), "tokens": int(tokens[d])}
            )  # fmt: skip
        rows["scores"].append(
            {"run": run, "suite": suite, "scoring": "number", "protocol": "llm-adapters", "rows": DOCUMENTS,
             "limited": suite == "held-out", "correct": int(correct.sum()), "accuracy": float(correct.mean()),
             "accuracy_normalised": None,
             "unparsed_share": float(1 - parsed.mean()), "chance": 0.25 if task == "choice" else None,
             "heldout_loss": float((loss * tokens).sum() / tokens.sum()), "heldout_tokens": int(tokens.sum()),
             "truncated_rows": 0, "leaked_rows": 4 if suite == "two-step" else 0}
        )  # fmt: skip


def _trials(task: str, method: str, m: int) -> list[dict[str, Any]]:
    grid = [1e-4, 3e-4, 1e-3] + ([3e-3, 1e-2] if method == "lora" else [])
    best = 1e-2 if method == "lora" else 3e-4
    return [
        {"search": f"{task}-{method}", "model": MODEL, "task": task, "method": method, "lr": lr, "seed": seed,
         "status": "diverged" if (method, lr, seed) == ("full", 1e-3, 101) else "ok",
         "validation_loss": None if (method, lr, seed) == ("full", 1e-3, 101)
         else 0.4 + 0.02 * m + 0.1 * abs(np.log10(lr / best)) + 0.004 * (seed - 100),
         "extension": lr > 1e-3, "selected": lr == best, "at_edge": method == "lora"}
        for lr in grid for seed in (100, 101)
    ]  # fmt: skip


def _course(rng: np.random.Generator, rows: dict[str, list[dict[str, Any]]], run: str, method: str, m: int) -> None:
    losses = 0.4 + 0.02 * m + 1.5 * np.exp(-np.arange(STEPS) / 40) + 0.05 * rng.standard_normal(STEPS)
    rows["steps"] += [
        {"run": run, "step": t, "loss": float(losses[t]), "lr_factor": 1 - t / STEPS, "grad_norm": 1.1,
         "clipped": False, "tokens": 900, "total_tokens": 1000, "step_s": 0.5}
        for t in range(STEPS)
    ]  # fmt: skip
    truth = np.exp(0.5 * np.sin(np.arange(LAYERS)) + 0.1 * rng.standard_normal(LAYERS)) * 1e-4
    for t in range(0, STEPS + 1, 20):
        seen = truth * np.exp(0.1 * rng.standard_normal(LAYERS)) * (1 - 0.3 * t / STEPS)
        rows["observed"] += [
            {"run": run, "step": t, "layer": layer, "gradient_rms": float(seen[layer]),
             "validation_loss": 0.5 + 0.02 * m + float(np.exp(-t / 40))}
            for layer in range(LAYERS)
        ]  # fmt: skip
    if method in ("full", "lora"):
        return
    belief = truth / truth.mean()
    for t in range(0, STEPS, PERIOD):
        if method == "grass" and t:
            belief = 0.5 * belief + 0.5 * belief * np.exp(0.2 * rng.standard_normal(LAYERS))
        p = np.full(LAYERS, 1 / LAYERS) if method == "lisa" else np.exp(belief) / np.exp(belief).sum()
        active = set(rng.choice(LAYERS, 2, replace=False, p=p).tolist())
        rows["believed"] += [
            {"run": run, "step": t, "layer": layer, "active": layer in active,
             "importance": None if method == "lisa" else float(belief[layer]), "probability": float(p[layer]),
             "age_steps": None, "temperature": None if method == "lisa" else 1.0}
            for layer in range(LAYERS)
        ]  # fmt: skip
