"""The model card (README.md) of an exported network, written from its config.json alone."""

from collections.abc import Iterable
from typing import Any

from unitdist.wording import counted


def model_card(description: dict[str, Any], license: str) -> str:
    """Markdown with the front matter that model hubs read. `description`: config.json, see `unitdist.hub`."""
    model, recipe = description["model"], description["recipe"]
    front = [
        "---",
        f"license: {license}",
        "library_name: unitdist",
        "pipeline_tag: image-classification",
        "tags:",
        "- image-classification",
        f"- {model['norm']}",
        "---",
    ]
    title = f"# {model['name']}, {model['norm']}, {len(description['classes']) or model['num_classes']} classes"
    parts = [
        "\n".join(front),
        title,
        f"{description['weights']['num_parameters']:,} parameters, trained with unitdist {description['unitdist_version']} "
        f"on {recipe['data']['dataset']} at {recipe['data']['image_size_px']} px, {_source(description)}.",
        _use(description),
        "## Results\n\n" + _results(description),
        "## Input\n\n" + _input(description["preprocessing"]),
        "## Norm divisors\n\n" + _norm_divisors(description["norm_divisors"]),
        "## Recipe\n\n" + _recipe(recipe),
        "## Environment\n\n" + _table(("what", "version"), description["versions"].items()),
    ]
    return "\n\n".join(parts) + "\n"


def _source(description: dict[str, Any]) -> str:
    averaged = (
        "the averaged weights (EMA)" if description["weights"]["source"] == "model_ema" else "the trained weights"
    )
    return f"{averaged} after epoch {description['results']['epoch']} (step {description['results']['step']})"


def _use(description: dict[str, Any]) -> str:
    lines = ["import unitdist", "", 'model = unitdist.load_pretrained("FOLDER")  # or "hf:OWNER/NAME"']
    if "architecture" in description:
        lines += ["", "# or with timm:", "import timm", "import unitdist.timm", ""]
        lines += ['model = timm.create_model("local-dir:FOLDER", pretrained=True)']
    return "```python\n" + "\n".join(lines) + "\n```"


def _results(description: dict[str, Any]) -> str:
    results = description["results"]
    rows = []
    if "validation_percent" in results:
        last = results["validation_percent"]
        protocol = f"single crop, validation in the loop, epoch {last['epoch']}"
        rows.append((protocol, f"{last['top1']:.2f}", f"{last['top5']:.2f}", str(last.get("count", ""))))
    for name, summary in results.get("protocols", {}).items():
        views = f"{name}, {counted(summary['views'], 'view')}, {summary['average']} averaged"
        rows.append((views, f"{summary['top1']:.2f}", f"{summary['top5']:.2f}", str(summary["count"])))
    if not rows:
        return "This run was not validated before the checkpoint was written."
    return _table(("protocol", "top-1 (%)", "top-5 (%)", "images"), rows)


def _input(preprocessing: dict[str, Any]) -> str:
    size, resize = preprocessing["image_size_px"], preprocessing["resize_px"]
    resized = f"shorter side to {resize} px ({preprocessing['interpolation']}, antialiased), centre crop of {size}"
    shape = resized if resize != size else f"{size} x {size} px"
    return (
        f"{shape}; values in [0, 1] minus mean {preprocessing['mean']}, divided by std {preprocessing['std']}. "
        "Other sizes go in too."
    )


def _norm_divisors(divisors: dict[str, int]) -> str:
    if not divisors:
        return "None: this network has no Unitization layer."
    counts: dict[int, int] = {}
    for divisor in divisors.values():
        counts[divisor] = counts.get(divisor, 0) + 1
    listed = ", ".join(
        f"{divisor} ({counted(count, 'layer')})" for divisor, count in sorted(counts.items(), reverse=True)
    )
    return f"n is fixed by the training and is part of the weights; it does not follow the image size. {listed}."


def _recipe(recipe: dict[str, Any]) -> str:
    rows = [
        (f"{section}.{key}", f"`{value}`")
        for section in ("model", "data", "optim", "schedule", "train", "run")
        for key, value in recipe[section].items()
        if value is not None and (section, key) not in (("run", "folder"), ("data", "path"))
    ]
    return _table(("key", "value"), rows)


def _table(head: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])
