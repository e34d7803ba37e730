"""``spherify list``: the names one may use."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from spherify.errors import OptionError


def list_names(
    what: Annotated[str, typer.Argument(help="models, operators, heads, roles, data.")] = "operators",
    pattern: Annotated[str, typer.Argument(help="A glob on the names.")] = "*",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """List models, operators, heads, roles or data."""
    from fnmatch import fnmatchcase

    found = {
        name: text for name, text in catalogue(what, pattern).items() if what == "models" or fnmatchcase(name, pattern)
    }
    if not found:
        raise OptionError(f"no name among the {what} matches {pattern!r}.")
    if as_json:
        print(json.dumps(found, indent=1))
        return
    width = max(map(len, found))
    for name, text in found.items():
        print(f"{name:{width}}  {text}".rstrip())


def catalogue(what: str, pattern: str) -> dict[str, str]:
    """Names and a line about each."""
    if what == "models":
        from spherify.models.resolve import list_models
        from spherify.models.zoo import zoo, zoo_versions

        unknown = f"not in the sweep of {zoo_versions()}"
        return {name: str(zoo().get(name, unknown)) for name in list_models(pattern)}
    if what == "operators":
        from spherify.functional.responses import RESPONSES

        return {name: entry.summary for name, entry in RESPONSES.items() if not entry.is_hidden}
    if what == "heads":
        from spherify.plan.options import HEADS

        return dict(HEADS)
    if what == "roles":
        from spherify.graph.roles import ROLES

        return {name: (role.__doc__ or "").strip().splitlines()[0] for name, role in ROLES.items()}
    if what == "data":
        from spherify.data.sources import KINDS, NAMED

        return {**{name: entry.summary for name, entry in NAMED.items()}, **KINDS}
    raise OptionError(f"there is no list of {what!r}; choose one of: models, operators, heads, roles, data.")
