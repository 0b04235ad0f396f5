"""Time whole training steps: python tools/bench_step.py [--batch 64 256] [--modes eager graph] [--json FILE]."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # noqa: E402
from measurement import environment, write_json  # noqa: E402
from step_benchmark import NORMS, Settings, check, run_batch  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> int:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description="Training steps of one net under several norms, synthetic images.")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--model", default="preact_resnet101")
    parser.add_argument("--image-px", type=int, default=224)
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 256] if cuda else [8])
    parser.add_argument("--norms", nargs="+", choices=NORMS, default=["unitization", "batchnorm", "naive"])
    parser.add_argument("--modes", nargs="+", choices=("eager", "compiled", "graph"), default=["eager"])
    parser.add_argument("--dtype", choices=DTYPES, default="bf16" if cuda else "fp32")
    parser.add_argument("--steps", type=int, default=5 if cuda else 1, help="steps per timed round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if "graph" in options.modes and device.type != "cuda":
        parser.error("--modes graph needs CUDA")
    dtype, modes = DTYPES[options.dtype], tuple(options.modes)
    settings = Settings(device, options.model, options.image_px, dtype, modes, options.steps, options.rounds)
    error = check(settings)
    rows = []
    for batch in options.batch:
        rows += run_batch(options.norms, batch, settings)
    seen = {name: str(value) for name, value in settings._asdict().items()}
    write_json(options.json, {"environment": environment(device), "settings": seen, "error": error, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
