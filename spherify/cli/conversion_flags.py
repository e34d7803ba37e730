"""The options of a conversion, for the commands that convert on their way: those of ``spherify MODEL`` itself."""

from __future__ import annotations

import inspect
from typing import Any, get_type_hints

from spherify.cli.convert import convert

OWN = (  # of that command alone
    *("model", "output", "dry_run", "as_json", "seed", "debug", "pretrained", "checkpoint"),
    *("calibrate", "calibration", "calibration_images", "output_solves"),
)


def conversion_flags() -> dict[str, inspect.Parameter]:
    """Every option that ``spherify.Options`` has a field for, as a parameter with its help and default."""
    hints = get_type_hints(convert, include_extras=True)
    return {
        name: parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in inspect.signature(convert).parameters.items()
        if name not in OWN
    }


def with_parameters(command: Any, *added: dict[str, inspect.Parameter]) -> Any:
    """The command with more options, which reach it as ``**values``; typer reads them from the signature."""
    hints = get_type_hints(command, include_extras=True)
    own = [
        parameter.replace(annotation=hints[parameter.name])
        for parameter in inspect.signature(command).parameters.values()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    more = [parameter for parameters in added for parameter in parameters.values()]
    ordered = sorted([*own, *more], key=lambda parameter: parameter.kind)
    command.__signature__ = inspect.Signature(ordered)
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in ordered}
    return command
