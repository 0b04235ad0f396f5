"""Command line of evaluation/multi_scale.py: one flag per field of `EvaluationOptions`, with its docstring as help."""

import argparse
import dataclasses
import types
import typing
from typing import Any

from evaluation.options import PROTOCOLS, EvaluationOptions
from unitdist.config_file import field_meanings

RENAMED = {"views_per_scale": "crops-per-scale"}


def parser() -> argparse.ArgumentParser:
    """The parser; lists are given with commas, switches as --mirror and --no-mirror."""
    parser = argparse.ArgumentParser(
        prog="evaluation/multi_scale.py", description="Multi-scale and fully-convolutional evaluation of any checkpoint."
    )
    parser.add_argument("--checkpoint", required=True, help="checkpoint, state dict or safetensors file")
    parser.add_argument("--data", required=True, help="folder with one folder of images per class, or with val/ in it")
    parser.add_argument(
        "--protocol", action="append", choices=[*PROTOCOLS, "all"], help="may be given several times (default: Table 3's two)"
    )
    parser.add_argument("--output", help="folder for the report, pictures, gallery and finished work (default: none is written)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: this rank's GPU if there is one)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    meanings = field_meanings(EvaluationOptions)
    hints = typing.get_type_hints(EvaluationOptions)
    for field in dataclasses.fields(EvaluationOptions):
        flag = "--" + RENAMED.get(field.name, field.name.replace("_", "-"))
        help_text = meanings[field.name].replace("%", "%%") + ("" if field.default is None else f" [{_shown(field.default)}]")
        kind = _kind(hints[field.name])
        if kind is bool:
            parser.add_argument(flag, dest=field.name, action=argparse.BooleanOptionalAction, default=field.default, help=help_text)
        elif typing.get_origin(kind) is typing.Literal:
            parser.add_argument(flag, dest=field.name, choices=typing.get_args(kind), default=field.default, help=help_text)
        elif typing.get_origin(kind) is tuple:
            item = typing.get_args(kind)[0]
            parser.add_argument(flag, dest=field.name, type=_list_of(item), default=field.default, metavar="A,B,...", help=help_text)
        else:
            parser.add_argument(flag, dest=field.name, type=kind, default=field.default, help=help_text)
    return parser


def options_from_arguments(arguments: argparse.Namespace) -> EvaluationOptions:
    """The options that were given. Raises ConfigError for values that do not fit together."""
    return EvaluationOptions(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(EvaluationOptions)})


def _kind(hint: Any) -> Any:
    """The type of an option; of `T | None`, T."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return next(part for part in typing.get_args(hint) if part is not type(None))
    return hint


def _list_of(item: type) -> Any:
    def convert(text: str) -> tuple[Any, ...]:
        try:
            return tuple(item(part) for part in text.split(","))
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {item.__name__}s with commas between them, got {text!r}") from None

    return convert


def _shown(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


