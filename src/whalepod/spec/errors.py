"""The one exception that a user's mistake raises, and the help it gives."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input: one clear line saying what was wrong and what is allowed.

    The command line prints it on stderr and exits 2; nothing else is caught there.
    """


def nearest(name: object, choices: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the closest of `choices`, else the list of them all.

    They may be a stranger's: only those that fit into a line are named.
    """
    options = sorted(o for o in choices if o.isprintable() and len(o) <= 80)[:100]
    close = difflib.get_close_matches(str(name).lower(), [o.lower() for o in options], n=1, cutoff=0.5)
    if close:
        match = next(o for o in options if o.lower() == close[0])
        return f" (did you mean {match!r}?)"
    return f" (allowed: {', '.join(options)})" if options else ""
