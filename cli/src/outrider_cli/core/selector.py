"""Label selectors as kubectl takes them, as the structure an AgentTask has."""

import re
from typing import Any, Final

_KEY: Final = r"[A-Za-z0-9](?:[-A-Za-z0-9_./]*[A-Za-z0-9])?"
_VALUE: Final = r"(?:[A-Za-z0-9](?:[-A-Za-z0-9_.]*[A-Za-z0-9])?)?"
_EQUAL: Final = re.compile(rf"({_KEY})\s*(==|=|!=)\s*({_VALUE})")
_SET: Final = re.compile(rf"({_KEY})\s+(in|notin)\s*\(([^()]*)\)")
_EXISTS: Final = re.compile(rf"(!?)\s*({_KEY})")
_COMMA_OUTSIDE: Final = re.compile(r",(?![^(]*\))")
_OPERATORS: Final = {"in": "In", "notin": "NotIn", "!=": "NotIn"}


def parse(text: str) -> dict[str, Any]:
    """A LabelSelector from "a=b,c!=d,e in (f,g),h,!i".

    Raises:
        ValueError: A part of it cannot be read, or contradicts another.
    """
    labels: dict[str, str] = {}
    expressions: list[dict[str, Any]] = []
    for part in _COMMA_OUTSIDE.split(text):
        equal, expression = _part(part.strip())
        for key, value in equal.items():
            if labels.setdefault(key, value) != value:
                raise ValueError(f"the label {key} cannot be {labels[key]} and {value} at once")
        expressions += expression
    selector: dict[str, Any] = {}
    if labels:
        selector["matchLabels"] = labels
    if expressions:
        selector["matchExpressions"] = expressions
    return selector


def _part(text: str) -> tuple[dict[str, str], list[dict[str, Any]]]:
    if (found := _EQUAL.fullmatch(text)) is not None:
        key, operator, value = found.groups()
        if operator == "!=":
            return {}, [{"key": key, "operator": "NotIn", "values": [value]}]
        return {key: value}, []
    if (found := _SET.fullmatch(text)) is not None:
        key, operator, listed = found.groups()
        values = [value.strip() for value in listed.split(",")]
        if all(re.fullmatch(_VALUE, value) for value in values):
            return {}, [{"key": key, "operator": _OPERATORS[operator], "values": values}]
    elif (found := _EXISTS.fullmatch(text)) is not None:
        absent, key = found.groups()
        return {}, [{"key": key, "operator": "DoesNotExist" if absent else "Exists"}]
    raise ValueError(
        f"{text!r} is no condition on a label: write key=value, key!=value, "
        "key in (a,b), key notin (a,b), key or !key"
    )
