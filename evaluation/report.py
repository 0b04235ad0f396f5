"""report.json, the console table, and per-image scores.

report.json, schema "unitdist-evaluation-1" (docs/evaluation.md lists every key): the same bytes for any number of ranks, so
neither times nor host names are in it; those are in timing.json. Accuracies are in percent, as in the training's metrics.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.image_list import ImageList
from evaluation.scores import Calibration, accuracy_summary, calibration, confusion_matrix, softmax
from evaluation.views import TABLE_3_SCALES_PX, Pass
from unitdist.errors import ConfigError
from unitdist.wording import counted

SCHEMA = "unitdist-evaluation-1"

PAPER_TABLE_3 = {
    ("crops", "batchnorm"): (78.12, 93.45),
    ("crops", "unitization"): (78.33, 93.22),
    ("fully_convolutional", "batchnorm"): (76.47, 93.02),
    ("fully_convolutional", "unitization"): (77.84, 93.33),
}
"""(protocol, norm) -> top-1 and top-5 of ResNet-101 on ImageNet, in percent."""


@dataclass(frozen=True, kw_only=True)
class ProtocolResult:
    """One protocol, on the M images that could be decoded.

    `probabilities_mk`: averaged over all views. `image_ids_m`: their places in the list. `confusion_kk`: row = true class.
    `summary`: the protocol's entry in report.json.
    """

    name: str
    image_ids_m: np.ndarray
    labels_m: np.ndarray
    probabilities_mk: np.ndarray
    confusion_kk: np.ndarray
    calibration: Calibration
    class_names: tuple[str, ...]
    summary: dict[str, Any]


def summarize_protocol(
    name: str,
    passes: Sequence[Pass],
    scores: dict[str, np.ndarray],
    images: ImageList,
    broken: dict[int, str],
    average: str,
    paper: tuple[float, float] | None = None,
) -> ProtocolResult:
    """Average the passes of a protocol, every view with the same weight, and count.

    `scores`: pass name -> float32 (N, K), probabilities or logits as `average` says.
    """
    ids_m = np.array([image_id for image_id in range(len(images)) if image_id not in broken], dtype=np.int64)
    labels_m = images.labels_n[ids_m]
    views = sum(plan.views for plan in passes)
    total_mk = sum(plan.views * scores[plan.name][ids_m].astype(np.float64) for plan in passes)
    probabilities_mk = np.asarray(total_mk) / views
    if average == "logits":
        probabilities_mk = softmax(probabilities_mk)
    predictions_m = probabilities_mk.argmax(axis=1)
    num_classes = probabilities_mk.shape[1]
    class_names = _class_names(images.class_to_idx, num_classes)
    confusion_kk = confusion_matrix(predictions_m, labels_m, num_classes)
    calibrated = calibration(probabilities_mk, labels_m)
    per_scale = [
        {"scale_px": plan.scale_px, "views": plan.views, **accuracy_summary(scores[plan.name][ids_m], labels_m)}
        for plan in passes
    ]
    summary = {
        **accuracy_summary(probabilities_mk, labels_m),
        "views": views,
        "average": average,
        "mirrored": any(plan.mirrored for plan in passes),
        "calibration_error": calibrated.error,
        "scales": per_scale,
        "paper": None if paper is None else {"top1": paper[0], "top5": paper[1]},
        "per_class": [
            {"class": class_names[label], "count": int(row.sum()), "top1_correct": int(row[label])}
            for label, row in enumerate(confusion_kk)
        ],
    }
    return ProtocolResult(
        name=name,
        image_ids_m=ids_m,
        labels_m=labels_m,
        probabilities_mk=probabilities_mk,
        confusion_kk=confusion_kk,
        calibration=calibrated,
        class_names=class_names,
        summary=summary,
    )


def paper_row(protocol: str, model_name: str, norm: str, num_classes: int, passes: Sequence[Pass]) -> tuple[float, float] | None:
    """Table 3's (top-1, top-5) where network, classes and scales are the paper's, else None."""
    is_papers = model_name == "preact_resnet101" and num_classes == 1000
    same_scales = tuple(plan.scale_px for plan in passes) == TABLE_3_SCALES_PX
    return PAPER_TABLE_3.get((protocol, norm)) if is_papers and same_scales else None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Atomically. Raises ConfigError when the folder cannot be written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ConfigError(f"--output: cannot write {path}: {error.strerror or error}") from None


def save_scores(path: Path, result: ProtocolResult, images: ImageList) -> None:
    """npz: probabilities (M, K) float32, labels (M,), names (M,), classes (K,), for ensembling."""
    np.savez(
        path,
        probabilities=result.probabilities_mk.astype(np.float32),
        labels=result.labels_m,
        names=np.array([images.names[image_id] for image_id in result.image_ids_m.tolist()]),
        classes=np.array(result.class_names),
    )


def console_table(results: Sequence[ProtocolResult], model_name: str, norm: str) -> str:
    """The table for people: per protocol its scales, all of them together, and the paper's row where it has one."""
    lines = []
    for result in results:
        summary = result.summary
        mirrors = "with mirrors" if summary["mirrored"] else "no mirrors"
        lines.append(
            f"{result.name}: {model_name}, {norm}; {counted(summary['count'], 'image')}, "
            f"{counted(summary['views'], 'view')} each ({mirrors}), {summary['average']} averaged"
        )
        lines.append(f"  {'scale':>8} {'views':>6}  {'top-1 %':>8}  {'95 % interval':>15}  {'top-5 %':>8}  {'95 % interval':>15}")
        scales = summary["scales"]
        lines += [_row(str(scale["scale_px"]), scale) for scale in scales] if len(scales) > 1 else []
        lines.append(_row("all" if len(scales) > 1 else str(scales[0]["scale_px"]), summary))
        if summary["paper"] is not None:
            paper = summary["paper"]
            lines.append(f"  {'Table 3':>8} {'':>6}  {paper['top1']:8.2f}  {'':>15}  {paper['top5']:8.2f}")
        lines.append(f"  calibration error (ECE, 15 bins): {summary['calibration_error']:.4f}")
        lines.append("")
    return "\n".join(lines).rstrip()


def _row(name: str, summary: dict[str, Any]) -> str:
    cells = []
    for key in ("top1", "top5"):
        low, high = summary[f"{key}_interval"]
        cells.append(f"{summary[key]:8.2f}  {f'{low:.2f} to {high:.2f}':>15}")
    return f"  {name:>8} {summary['views']:>6}  {'  '.join(cells)}"


def _class_names(class_to_idx: dict[str, int], num_classes: int) -> tuple[str, ...]:
    names = {label: name for name, label in class_to_idx.items()}
    return tuple(names.get(label, str(label)) for label in range(num_classes))
