"""A page of the most confident errors, with thumbnails in it: one HTML file that opens anywhere, offline."""

import base64
import html
import io
from pathlib import Path

import numpy as np
from PIL import Image

from evaluation.image_list import ImageList
from evaluation.report import ProtocolResult
from unitdist.wording import counted

THUMBNAIL_PX = 220

STYLE = """
:root { color-scheme: light dark; --line: #8884; --faint: #777; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 1200px; padding: 1rem; }
h1 { font-size: 1.25rem; margin: 0 0 .25rem; }
p { margin: 0 0 1rem; color: var(--faint); }
ul { display: grid; grid-template-columns: repeat(auto-fill, minmax(165px, 1fr)); gap: .75rem; list-style: none; margin: 0; padding: 0; }
li { border: 1px solid var(--line); border-radius: 6px; overflow: hidden; }
img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; background: #8882; }
div { padding: .4rem .55rem .55rem; overflow-wrap: anywhere; }
b { font-weight: 600; }
small { display: block; color: var(--faint); font-size: .75rem; }
"""


def most_confident_errors(result: ProtocolResult, limit: int) -> list[int]:
    """Places in the result's tables of the wrong predictions with the highest probability, most confident first."""
    predictions_m = result.probabilities_mk.argmax(axis=1)
    wrong = np.flatnonzero(predictions_m != result.labels_m)
    confidence = result.probabilities_mk[wrong, predictions_m[wrong]]
    return [int(place) for place in wrong[np.argsort(-confidence, kind="stable")][:limit]]


def save_gallery(path: Path, result: ProtocolResult, images: ImageList, limit: int) -> None:
    """Write the page; images are read once more, for their thumbnails."""
    places = most_confident_errors(result, limit)
    count, errors = result.summary["count"], result.summary["count"] - result.summary["top1_correct"]
    title = f"Most confident errors: {result.name}"
    note = (
        f"{len(places)} of {errors} errors on {counted(count, 'image')}; top-1 {result.summary['top1']:.2f} %. Percentages are the "
        "probabilities that the network gives to the predicted and to the true class."
    )
    cards = "\n".join(_card(place, result, images) for place in places) or "<li><div>No errors.</div></li>"
    page = (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="viewport" content="width=device-width">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{html.escape(title)}</h1>\n"
        f"<p>{html.escape(note)}</p>\n<ul>\n{cards}\n</ul>\n</body>\n</html>\n"
    )
    path.write_text(page, encoding="utf-8")


def _card(place: int, result: ProtocolResult, images: ImageList) -> str:
    probabilities_k = result.probabilities_mk[place]
    predicted, true = int(probabilities_k.argmax()), int(result.labels_m[place])
    name = images.names[int(result.image_ids_m[place])]
    content = images.read(int(result.image_ids_m[place])).content
    return (
        f'<li><img loading="lazy" alt="{html.escape(name)}" src="{_thumbnail(content)}">'
        f"<div><b>{html.escape(result.class_names[predicted])}</b> {100 * probabilities_k[predicted]:.1f} %<br>"
        f"is {html.escape(result.class_names[true])} {100 * probabilities_k[true]:.1f} %<small>{html.escape(name)}</small></div></li>"
    )


def _thumbnail(encoded: bytes) -> str:
    with Image.open(io.BytesIO(encoded)) as file:
        image = file.convert("RGB")
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    small = io.BytesIO()
    image.save(small, format="JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(small.getvalue()).decode("ascii")
