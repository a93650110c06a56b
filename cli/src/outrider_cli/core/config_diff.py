"""Unified diffs of what is asked for, as YAML."""

import difflib
import json
from collections.abc import Mapping
from typing import Any

from outrider_cli.core.render import structured


def unified(before: Mapping[str, Any], after: Mapping[str, Any], old: str, new: str) -> str:
    """A unified diff of two values as YAML."""
    lines = difflib.unified_diff(
        _yaml(before).splitlines(), _yaml(after).splitlines(), old, new, lineterm=""
    )
    return "".join(line + "\n" for line in lines)


def _yaml(value: Mapping[str, Any]) -> str:
    # Sorted: who wrote the fields in another order changed nothing.
    return structured(json.loads(json.dumps(value, sort_keys=True)), "yaml") if value else ""
