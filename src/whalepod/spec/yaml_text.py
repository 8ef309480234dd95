"""YAML from files of strangers: plain data of a sane depth, or one line that says why not."""

from __future__ import annotations

from typing import Any

import yaml

from whalepod.spec.errors import UserError

_MAX_DEPTH = 8


def parse_yaml(text: str, where: str) -> Any:
    """What `text` holds. Raises UserError that begins with `where`, for references and odd tags too."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    depth = 0
    try:
        for event in yaml.parse(text, loader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            # Nothing here needs either, and both can be made to take memory without end.
            if depth > _MAX_DEPTH or isinstance(event, yaml.AliasEvent):
                raise yaml.YAMLError("references and deep nesting are not allowed")
        return yaml.load(text, loader)
    # What is not a YAMLError comes of tags on values that they do not fit.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise UserError(f"{where} is not valid YAML: {' '.join(str(error).split())[:200]}") from None
