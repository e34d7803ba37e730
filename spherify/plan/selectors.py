"""Selectors: ``layer1.*``, ``@stem``, ``type:Conv2d``, ``re:.*conv[12]``."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Sequence

from spherify.errors import OptionError
from spherify.graph.roles import ROLES
from spherify.graph.site import Site


def matches(selector: str, site: Site) -> bool:
    """Whether a selector names a site, by any of the site's names.

    Raises:
        OptionError: a regular expression that does not parse.
    """
    if selector.startswith("@"):
        return selector in site.roles
    if selector.startswith("type:"):
        return fnmatch.fnmatchcase(site.type, selector.removeprefix("type:"))
    if selector.startswith("re:"):
        try:
            pattern = re.compile(selector.removeprefix("re:"))
        except re.error as error:
            raise OptionError(f"selector {selector!r} is not a regular expression: {error}.") from None
        return any(pattern.fullmatch(name) for name in site.names)
    return any(fnmatch.fnmatchcase(name, selector) for name in site.names)


def check_selectors(selectors: Iterable[str], sites: Sequence[Site]) -> None:
    """Every selector must name at least one site.

    Raises:
        OptionError: all that name none, each with the nearest that would.
    """
    lost = [selector for selector in selectors if not any(matches(selector, site) for site in sites)]
    if lost:
        raise OptionError(
            "; ".join(f"selector {selector!r} matches no layer{nearest(selector, sites)}" for selector in lost)
        )


def nearest(selector: str, sites: Sequence[Site]) -> str:
    """ "; the nearest is 'x'": something like the selector that matches."""
    names = [name for site in sites for name in site.names]
    if selector.startswith("@"):
        present = sorted({role for site in sites for role in site.roles})
        known = f"; this model has {', '.join(present) or 'no roles'}"
        return known if selector in ROLES else f"{known}, and the roles are {', '.join(ROLES)}"
    if selector.startswith("type:"):
        types = sorted({site.type for site in sites})
        return f"; this model has {', '.join(types)}"
    if inside := [name for name in names if name.startswith(f"{selector}.")]:
        return f"; it holds {len(inside)}, named by '{selector}.*'"
    pattern = selector.removeprefix("re:")
    close = difflib.get_close_matches(pattern, names, n=1, cutoff=0.0)
    return f"; the nearest is '{close[0]}'" if close else ""
