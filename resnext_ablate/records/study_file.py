"""The text of a study file as values: a profile laid over it, overrides over both.

A profile is a table `[profiles.NAME]` of the study's own shape, such as the same
question at another budget. What it names replaces what the file says, lists as a whole;
the study is then called `<name>-<profile>`, and has a results folder of its own.
"""

from __future__ import annotations

import copy
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resnext_ablate.architecture.spec import InputError
from resnext_ablate.records import complaints


@dataclass(frozen=True)
class StudyValues:
    """What a study file says once profile and overrides are laid over it."""

    values: dict[str, Any]
    """Without profiles."""
    profiles: Mapping[str, Mapping[str, Any]]
    """Every profile of the file, as it stands there."""
    profile: str | None
    """The one laid over."""
    overridden: tuple[str, ...]
    path: Path
    lines: Mapping[str, int]

    def place_of(self, key: str) -> str:
        """Where the value of a key comes from, such as "study.toml:12"."""
        for given in self.overridden:
            if covers(given, key):
                return f"override {given}"
        if self.profile is not None:
            own = dict(flat(self.profiles[self.profile]))
            if any(covers(key, one) or covers(one, key) for one in own):
                return self.place_in(self.profile, key)
        return f"{self.path}:{self._line(key)}"

    def place_in(self, profile: str, key: str) -> str:
        """Where a profile has a key."""
        line = self._line(f"profiles.{profile}.{key}")
        return f"{self.path}:{line}: profile {profile}"

    def _line(self, key: str) -> int:
        while key and key not in self.lines:
            key = key.rpartition(".")[0]
        return self.lines.get(key, 1)


def read(path: Path, *, profile: str | None, overrides: Sequence[str]) -> StudyValues:
    """Reads a study file.

    Args:
        path: the TOML file.
        profile: name of the profile laid over it; None: none.
        overrides: `key=value` texts, laid over both.

    Raises:
        InputError: the file cannot be read or is not TOML, there is no such profile,
            or an override is no key with a value.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise InputError(f"study file {path}: cannot be read: {reason}.") from None
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"study file {path}: not valid TOML: {error}.") from None
    lines = dict(complaints.key_lines(text))
    profiles = _profiles(values.pop("profiles", {}), path=path, lines=lines)
    if profile is not None:
        _lay_over(values, _chosen(profiles, profile, path=path))
        if "name" in values:
            values["name"] = f"{values['name']}-{profile}"
    overridden = dict(map(_parse_override, overrides))
    for key, value in overridden.items():
        _set(values, key, value)
    return StudyValues(values, profiles, profile, tuple(overridden), path, lines)


def _profiles(
    given: Any, *, path: Path, lines: Mapping[str, int]
) -> Mapping[str, Mapping[str, Any]]:
    tables = given.values() if isinstance(given, dict) else [None]
    if not all(isinstance(table, dict) for table in tables):
        raise InputError(
            f"{path}:{lines.get('profiles', 1)}: profiles: must be tables, as in "
            "[profiles.laptop.train]."
        )
    for name, profile in given.items():
        for key in ("name", "profiles"):
            if key in profile:
                line = lines.get(f"profiles.{name}.{key}", 1)
                raise InputError(
                    f"{path}:{line}: profile {name}: must not have {key}: the study "
                    "is called after both file and profile."
                )
    return dict(given)


def _chosen(
    profiles: Mapping[str, Mapping[str, Any]], profile: str, *, path: Path
) -> Mapping[str, Any]:
    if profile in profiles:
        return profiles[profile]
    if not profiles:
        raise InputError(f"--profile: {path} has no profiles, so none {profile!r}.")
    hint = complaints.did_you_mean(profile, profiles)
    raise InputError(
        f"--profile: {path} has no profile {profile!r}{hint}; it has "
        f"{', '.join(profiles)}."
    )


def _lay_over(values: dict[str, Any], upper: Mapping[str, Any]) -> None:
    for key, value in upper.items():
        below = values.get(key)
        if isinstance(value, dict) and isinstance(below, dict):
            _lay_over(below, value)
        else:
            values[key] = copy.deepcopy(value)


def with_profiles(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON schema of a study with that of its profiles, which require nothing."""
    parts = schema["$defs"]
    profile = {key: schema[key] for key in ("properties", "additionalProperties")}
    profile["properties"] = {
        key: value for key, value in profile["properties"].items() if key != "name"
    }
    profile["type"] = "object"
    partial = {f"Partial{name}": _optional(part) for name, part in parts.items()}
    profiles = {
        "type": "object",
        "description": "Values laid over the study's by --profile NAME.",
        "additionalProperties": _optional(profile),
    }
    return {
        **schema,
        "$defs": {**parts, **partial},
        "properties": {**schema["properties"], "profiles": profiles},
    }


def _optional(part: Any) -> Any:
    """A schema of which nothing is required, parts of parts included."""
    if isinstance(part, dict):
        return {
            key: f"#/$defs/Partial{value.removeprefix('#/$defs/')}"
            if key == "$ref"
            else _optional(value)
            for key, value in part.items()
            if key not in ("required", "default")
        }
    return [_optional(one) for one in part] if isinstance(part, list) else part


def covers(prefix: str, key: str) -> bool:
    """Whether a key is another one or lies below it."""
    return key == prefix or key.startswith(f"{prefix}.")


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys with their values."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _parse_override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", key):
        raise InputError(f"override {text!r}: write key=value, as in train.epochs=2.")
    try:
        parsed = tomllib.loads(f"value = {value}")
    except tomllib.TOMLDecodeError:
        return key, value.strip()
    return key, parsed["value"] if set(parsed) == {"value"} else value.strip()


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *tables, last = key.split(".")
    for table in tables:
        values = values.setdefault(table, {})
        if not isinstance(values, dict):
            raise InputError(f"override {key}: {table} is a value, not a table.")
    values[last] = value
