"""Run one of timm's scripts with unitdist's models registered, or with timm's own models converted.

timm's train.py, validate.py and benchmark.py come with its repository, not with its wheel:
python -m unitdist.timm_script train.py --model preact_resnet50_unit --data-dir ...; torchrun takes -m in the same way.
With --convert before the script every model that the script creates is converted: --model resnet50.
"""

import argparse
import functools
import importlib
import inspect
import runpy
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from unitdist.errors import ConfigError
from unitdist.world import World


def main() -> None:
    """Register the models, then run the script as if it had been started itself, with its folder on the path."""
    try:
        given = _parse()
        if not given.script.is_file():
            raise ConfigError(
                f"there is no file {given.script}: the first argument is one of timm's scripts, "
                "train.py or validate.py for example, which come with timm's repository"
            )
        importlib.import_module("unitdist.timm")
        if given.convert:
            _convert_what_timm_creates()
        sys.argv = [str(given.script), *given.arguments]
        sys.path.insert(0, str(given.script.resolve().parent))
        runpy.run_path(str(given.script), run_name="__main__")
    except ConfigError as error:  # the same on every rank
        if World.unread().local_rank == 0:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m unitdist.timm_script", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--convert", action="store_true", help="convert every model that the script creates to Unitization"
    )
    parser.add_argument("script", type=Path, help="train.py, validate.py, ... of timm's repository")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="what the script takes; try: SCRIPT --help")
    return parser.parse_args()


def _convert_what_timm_creates() -> None:
    """timm.create_model returns converted models from now on; a teacher for distillation stays as timm made it.

    n is left to the checkpoint or the first training batch. A checkpoint with batch normalization loads too.
    """
    import timm.models

    from unitdist.layers.convert import convert_unitization
    from unitdist.timm import refuse_torchscript

    with suppress(ImportError):  # there is none in older versions
        importlib.import_module("timm.task")  # holds the function as it is now
    create = timm.models.create_model

    @functools.wraps(create)
    def create_converted(*positional: Any, **named: Any) -> Any:
        given = inspect.signature(create).bind(*positional, **named)
        checkpoint_path = given.arguments.pop("checkpoint_path", None)
        refuse_torchscript(bool(given.arguments.get("scriptable")))
        model = convert_unitization(create(*given.args, **given.kwargs))
        if checkpoint_path:
            timm.models.load_checkpoint(model, checkpoint_path)
        return model

    timm.create_model = timm.models.create_model = create_converted


if __name__ == "__main__":
    main()
