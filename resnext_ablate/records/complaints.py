"""What is wrong with a study file, in words: where, which rule, the nearest key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeGuard, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails


def describe(error: ValidationError, *, model: type[BaseModel]) -> dict[str, str]:
    """One message for each key at fault.

    Args:
        error: what pydantic found.
        model: the study file's; tells which keys are known.
    """
    unknown: dict[str, str] = {}
    rules: dict[str, list[str]] = {}
    given: dict[str, str] = {}
    for problem in error.errors():
        location = _key_of(problem["loc"], model)
        key = ".".join(location)
        if problem["type"] == "extra_forbidden":
            unknown[key] = _unknown_key(location, model)
        else:
            rules.setdefault(key, []).append(_rule(problem))
            given[key] = _given(problem)
    # A union reports one broken rule for each of its branches.
    return unknown | {
        key: f"{key or 'the study file'}: {' or '.join(broken)}{given[key]}."
        for key, broken in rules.items()
    }


def unknown_keys(
    values: Mapping[str, Any], *, model: type[BaseModel], at: tuple[str, ...] = ()
) -> dict[str, str]:
    """One message for each key that a part of a study file cannot have.

    Args:
        values: such as a profile's.
        model: the study file's.
        at: where in the model the values stand.
    """
    found: dict[str, str] = {}
    known = _fields_at(at, model)
    for key, value in values.items() if known else ():
        location = (*at, key)
        if key not in known:
            found[".".join(location)] = _unknown_key(location, model)
        elif isinstance(value, Mapping):
            found |= unknown_keys(value, model=model, at=location)
    return found


def _key_of(location: Sequence[str | int], model: type[BaseModel]) -> tuple[str, ...]:
    # Behind a field pydantic adds branches of unions and positions in lists.
    key: tuple[str, ...] = ()
    for part in location:
        if not _fields_at(key, model):
            break
        key += (str(part),)
    return key


def _unknown_key(location: Sequence[str], model: type[BaseModel]) -> str:
    known = _fields_at(location[:-1], model)
    near = did_you_mean(location[-1], known)
    table = f"[{'.'.join(location[:-1])}]" if location[1:] else "the study file"
    return f"unknown key {location[-1]!r} in {table}{near}; known: {', '.join(known)}."


def _rule(problem: ErrorDetails) -> str:
    if problem["type"] == "missing":
        return "required, but missing"
    rule = problem["msg"].removeprefix("Value error, ").rstrip(".")
    return rule.removeprefix("Input ").removeprefix("String ").replace("should", "must")


def _given(problem: ErrorDetails) -> str:
    """What stood there, where the rule does not tell already."""
    if problem["type"] in ("missing", "value_error"):
        return ""
    given = problem["input"]
    near = ""
    if problem["type"] == "literal_error" and isinstance(given, str):
        near = did_you_mean(given, re.findall(r"'([^']*)'", problem["msg"]))
    return f", got {given!r}{near}"


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """The known word nearest to one that is not known; empty where none is near."""
    near = difflib.get_close_matches(given, list(known), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _fields_at(location: Sequence[str], model: type[BaseModel]) -> tuple[str, ...]:
    at = model
    for part in location:
        known = at.model_fields.get(part)
        # An optional part is a union of the part and None.
        kinds = (known.annotation, *get_args(known.annotation)) if known else ()
        part_model = next((kind for kind in kinds if _is_part(kind)), None)
        if part_model is None:
            return ()
        at = part_model
    return tuple(at.model_fields)


def _is_part(kind: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def key_lines(text: str) -> Iterator[tuple[str, int]]:
    """Dotted key and line number of each table header and key of a study file."""
    table = ""
    for number, line in enumerate(text.splitlines(), start=1):
        if header := re.match(r"\s*\[\s*([\w.\- ]+?)\s*\]", line):
            table = header[1].replace(" ", "")
            yield table, number
        elif assignment := re.match(r"\s*([\w.\-]+)\s*=", line):
            yield f"{table}.{assignment[1]}" if table else assignment[1], number
