"""Time norm + ReLU forms over ResNet-101's shapes: python tools/bench_norm.py [--device cuda] [--json FILE]."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # noqa: E402
from measurement import environment, write_json  # noqa: E402
from norm_benchmark import Settings, run_benchmark  # noqa: E402
from norm_candidates import CANDIDATES, RESNET101_SHAPES  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


def main() -> int:
    parser = argparse.ArgumentParser(description="Norm + ReLU against batch normalization + ReLU, in one run.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--samples", type=int, default=8, help="images per batch")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds, medians are reported")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--memory-format", choices=FORMATS, default="channels_last")
    parser.add_argument("--candidates", nargs="+", choices=CANDIDATES, default=["composite", "literal"])
    parser.add_argument("--parts", nargs="+", choices=("forward", "backward", "both"), default=["both"])
    parser.add_argument("--graph", action="store_true", help="CUDA: replay CUDA graphs, without launch overhead")
    parser.add_argument("--shapes", type=int, default=len(RESNET101_SHAPES), help="only the first so many shapes")
    parser.add_argument("--count-passes", action="store_true", help="count passes, time nothing")
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args()
    if options.count_passes:
        counter = [sys.executable, str(Path(__file__).with_name("count_passes.py"))]
        passes = json.loads(subprocess.run(counter, capture_output=True, text=True, check=True).stdout)
        for name, seen in passes.items():
            print(f"{name:>36}: forward {seen['forward']:g} + backward {seen['backward']:g} = {sum(seen.values()):g}")
        write_json(options.json, {"passes": passes})
        return 0
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    names = list(dict.fromkeys(["unitization", "batchnorm", *options.candidates]))
    settings = Settings(
        device, DTYPES[options.dtype], options.samples, options.rounds, names, FORMATS[options.memory_format],
        options.parts, options.graph, RESNET101_SHAPES[: options.shapes],
    )  # fmt: skip
    result = run_benchmark(settings)
    write_json(options.json, {"environment": environment(device), **result})
    return 0


if __name__ == "__main__":
    sys.exit(main())
