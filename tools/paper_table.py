"""Ours beside the paper's, as text. A run that was not made is "not run", never a number."""

from statistics import mean, median
from typing import TYPE_CHECKING, Any

from paper_experiments import Arm, Experiment
from paper_results import Results, finished_runs, unfinished_runs

if TYPE_CHECKING:  # numpy and scipy are loaded for Fig. 2 alone
    from paper_stability import Comparison


def print_table(experiment: Experiment, results: Results) -> None:
    """Print the experiment's table, and where its numbers come from."""
    print(experiment.title)
    if experiment.note:
        print(experiment.note)
    if experiment.kind == "moments":
        rows = _moment_rows(results)
    elif experiment.kind == "distance":
        rows = _distance_rows(experiment, results)
    else:
        rows = _accuracy_rows(experiment, results)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for line in _changes(results):
        print(line)
    if any(results["runs"].values()):
        print(
            f"ours: {results['hardware']}, torch {results['torch']}, commit {results['commit']}, {results['collected']}"
        )
    else:
        print(f"nothing was run; python tools/paper.py run {experiment.name} --data DIR")


def _changes(results: Results) -> list[str]:
    """A line for every arm whose runs were not the experiment's: what was changed, and for which seeds."""
    seeds: dict[tuple[str, str], list[str]] = {}
    for arm, runs in results["runs"].items():
        for seed, run in runs.items():
            if run.get("changed"):
                seeds.setdefault((arm, " ".join(run["changed"])), []).append(seed)
    return [
        f"NOT the experiment: {arm}, seed {', '.join(of)}: run with {changes}" for (arm, changes), of in seeds.items()
    ]


def _accuracy_rows(experiment: Experiment, results: Results) -> list[list[str]]:
    rows = [["arm", "metric", "paper", "ours (median)", "lowest..highest", "runs"]]
    for arm in experiment.arms:
        runs = finished_runs(results, arm.name)
        for i, metric in enumerate(experiment.metrics):
            paper = f"{arm.paper[i]:.2f}" if arm.paper else "-"
            values = [run["metrics"][metric] for run in runs.values() if metric in run["metrics"]]
            ours, spread = (
                (f"{median(values):.2f}", f"{min(values):.2f}..{max(values):.2f}") if values else ("not run", "")
            )
            rows.append([arm.label, metric, paper, ours, spread, _count(experiment, results, arm, len(values))])
    return rows


def _count(experiment: Experiment, results: Results, arm: Arm, finished: int) -> str:
    text = f"{finished} of {experiment.num_seeds}"
    for seed, run in unfinished_runs(results, arm.name).items():
        text += f"; seed {seed} stopped at epoch {run['epochs_done']} of {run['epochs']}"
    return text


def _moment_rows(results: Results) -> list[list[str]]:
    from paper_stability import compare, rate_stretches

    rows = [
        ["epochs", "moment", "median over units of", "BN: median over seeds (range)", "unitization", "p over seeds"]
    ]
    whole = compare(results, 1)
    rows += [_comparison_row(one) for one in whole]
    if whole:
        # What the rate has to do with it: the two moments of the paper's claim, at each rate.
        stretches = rate_stretches(next(iter(finished_runs(results, "bn").values())))
        for first, last in stretches if len(stretches) > 1 else []:
            kept = [
                one
                for one in compare(results, first, last)
                if one.measure == "std" and one.moment in ("skewness", "kurtosis")
            ]
            rows += [_comparison_row(one) for one in kept]
    else:
        rows.append(["", "all", "", "not run", "not run", ""])
    for arm, name in (("bn", "BN"), ("unit", "unitization")):
        runs = results["runs"].get(arm, {})
        made = ", ".join(f"seed {seed}: {run['epochs_done']} of {run['epochs']} epochs" for seed, run in runs.items())
        top1 = [f"{run['metrics']['val_top1']:.2f}" for run in finished_runs(results, arm).values()]
        rows.append(["", f"{name} runs", made or "not run", f"test top-1 {', '.join(top1)}" if top1 else "", "", ""])
    return rows


def _comparison_row(one: "Comparison") -> list[str]:
    from paper_stability import MEASURES, in_words

    p_value = f"{one.p_value:.2g} (smallest possible {one.smallest_p:.2g})"
    return [f"{one.first}-{one.last}", one.moment, MEASURES[one.measure], in_words(one.bn), in_words(one.unit), p_value]


def _distance_rows(experiment: Experiment, results: Results) -> list[list[str]]:
    rows = [["arm", "seed", "epochs", "lr", "EM distance (mean, Alg. 3)", "sliced distance (mean)"]]
    for arm in experiment.arms:
        runs: dict[str, Any] = results["runs"].get(arm.name, {})
        if not runs:
            rows.append([arm.label, "", "", "", "not run", "not run"])
        for seed, run in runs.items():
            series = run["per_epoch"]
            for lr in dict.fromkeys(series["lr"]):
                at = [i for i, value in enumerate(series["lr"]) if value == lr]
                distance = mean(series["analysis/em_distance"][i] for i in at)
                shift = mean(mean(series[key][i] for key in shift_keys(series)) for i in at)
                epochs = f"{at[0] + 1}-{at[-1] + 1}"
                rows.append([arm.label, seed, epochs, f"{lr:g}", f"{distance:.3g}", f"{shift:.3g}"])
    return rows


def shift_keys(series: dict[str, list[Any]]) -> list[str]:
    """The sliced-distance series of the layers whose EM distance was estimated."""
    layers = [key.rpartition("/")[0] for key in series if key.endswith("/em_distance") and key.count("/") == 2]
    return [f"{layer}/shift" for layer in layers if f"{layer}/shift" in series]
