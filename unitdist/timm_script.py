"""Run one of timm's scripts with unitdist's models registered.

timm's train.py, validate.py and benchmark.py come with its repository, not with its wheel:
python -m unitdist.timm_script train.py --model preact_resnet50_unit --data-dir ...; torchrun takes -m in the same way.
"""

import importlib
import runpy
import sys
from pathlib import Path


def main() -> None:
    """Register the models, then run the script as if it had been started itself, with its folder on the path."""
    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file():
        given = sys.argv[1] if len(sys.argv) > 1 else "nothing"
        print(f"error: the first argument must be one of timm's scripts, got {given}", file=sys.stderr)
        sys.exit(2)
    importlib.import_module("unitdist.timm")
    del sys.argv[0]
    sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
