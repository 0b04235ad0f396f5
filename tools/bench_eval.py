"""Time of both protocols against their bare forward passes and against the obvious loop.

python tools/bench_eval.py --data DIR [--model preact_resnet18] [--images 16] [--device cuda] [--json FILE]
"""

import argparse
import json
import sys
from pathlib import Path

# Run as a script, Python puts this folder first; the packages lie one above.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eval_timing import measure, table  # noqa: E402

from unitdist.errors import UnitdistError  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Seconds of the 42 crops and of fully-convolutional testing, by parts."
    )
    parser.add_argument("--data", type=Path, required=True, help="ImageFolder to take the images from")
    parser.add_argument("--model", default="preact_resnet18", help="untrained network to time [preact_resnet18]")
    parser.add_argument("--images", type=int, default=16, help="images, spread over the folder [16]")
    parser.add_argument("--repeats", type=int, default=3, help="interleaved repetitions; medians are shown [3]")
    parser.add_argument("--device", default="cpu", help="cpu or cuda [cpu]")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="autocast type [fp32]")
    parser.add_argument("--loader", choices=["dali", "torchvision"], default="dali", help="decoder [dali]")
    parser.add_argument("--decode-device", choices=["cpu", "gpu"], default="cpu", help="where DALI decodes [cpu]")
    parser.add_argument("--threads", type=int, help="threads of decoder and CPU network (default: all cores)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    try:
        figures = measure(
            arguments.data,
            model_name=arguments.model,
            num_images=arguments.images,
            repeats=arguments.repeats,
            device=arguments.device,
            precision=arguments.precision,
            loader=arguments.loader,
            decode_device=arguments.decode_device,
            threads=arguments.threads,
        )
    except UnitdistError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(table(figures))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0 if figures["correct"] else 1


if __name__ == "__main__":
    sys.exit(main())
