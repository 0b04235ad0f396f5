"""A checkpoint as a folder for hubs: model.safetensors, config.json, model card; and model.onnx if asked for.

python tools/export.py --checkpoint runs/demo/best.pt --output exported/demo --onnx
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from unitdist.export import export_onnx  # noqa: E402
from unitdist.hub import export_checkpoint, load_pretrained, read_report  # noqa: E402
from unitdist.train.agreement import reporting_errors  # noqa: E402
from unitdist.train.checkpoint import read_checkpoint  # noqa: E402
from unitdist.world import World  # noqa: E402


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="checkpoint of a run: last.pt or best.pt")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; made if it is not there")
    parser.add_argument(
        "--weights", choices=("auto", "model", "model_ema"), default="auto", help="auto: averaged if kept"
    )
    parser.add_argument("--evaluation", type=Path, help="report.json of evaluation/multi_scale.py, for the model card")
    parser.add_argument("--license", default="apache-2.0", help="of the weights, for the model card")
    parser.add_argument("--onnx", action="store_true", help="write model.onnx too, for any batch and image size")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    with reporting_errors(World.single(), debug=arguments.debug):
        export(arguments)


def export(arguments: argparse.Namespace) -> None:
    description = export_checkpoint(
        read_checkpoint(arguments.checkpoint),
        arguments.output,
        weights=arguments.weights,
        evaluation=None if arguments.evaluation is None else read_report(arguments.evaluation),
        license=arguments.license,
    )
    model = load_pretrained(arguments.output)
    if arguments.onnx:
        given = description["preprocessing"]
        onnx_file = arguments.output / "model.onnx"
        export_onnx(model, onnx_file, image_size_px=given["image_size_px"], channels=given["channels"])
    print(f"wrote {', '.join(sorted(file.name for file in arguments.output.iterdir()))} to {arguments.output}")


if __name__ == "__main__":
    main()
