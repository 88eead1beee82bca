"""The feasible nets of a space as a search space of Optuna.

Every suggestion fits the windows, and none comes twice. A sampler sees one number from
0 to 1 for each free axis, in a fixed order: shared numbers first, then cardinality,
depth and width, stage by stage. Each number is a quantile: it picks the axis' value
among those that still lead to a feasible net, in rising order, each with as much of 0
to 1 as the share of the feasible nets behind it. So the budget holds by construction,
independent uniform numbers give uniform nets, and near numbers give near nets, which is
the geometry that TPE, GP and QMC samplers need. The last numbers have the least to
choose from: the budget is nearly spent by then.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import optuna
from optuna.trial import FrozenTrial

from resnext_ablate.architecture.costs import Ints
from resnext_ablate.architecture.feasible import (
    Feasible,
    none_fits,
    settings_with_solutions,
    solve,
)
from resnext_ablate.architecture.halves import Options, Solutions
from resnext_ablate.architecture.names import parse_spec
from resnext_ablate.architecture.space import (
    PerStage,
    Setting,
    Shared,
    Space,
    Window,
    is_by_stage,
    resolved_axes,
    settings_of,
)
from resnext_ablate.architecture.spec import InputError, ResNeXtSpec

_AXIS_NAMES = ("cardinality", "depth", "width")
_NET, _IMAGE_SIZE = "net", "image_size"  # Attributes of a trial.


@dataclass(frozen=True, slots=True)
class _Entries:
    """Choices of some factors in rising order, each with its weight."""

    choices: Ints
    """(n, factors)."""
    columns: tuple[tuple[str, int, Ints], ...]
    """What sorts them: a number's name, the position of its factor among `factors`,
    and the number of each of the factor's choices."""
    places: Ints
    """Where each stood before it was sorted."""
    ends: Ints
    """Weights summed up to each, with a leading 0: (n + 1,)."""

    def pick(self, quantiles: dict[str, float]) -> int:
        """The entry that the quantiles name, one number after the other."""
        low, high = 0, len(self.places)
        for name, position, table in self.columns:
            values = table[self.choices[low:high, position]]
            rises = np.flatnonzero(np.diff(values)) + 1
            if not len(rises):
                continue
            starts = np.concatenate([[low], low + rises, [high]])
            shares = self.ends[starts] - self.ends[low]
            target = min(int(quantiles[name] * float(shares[-1])), int(shares[-1]) - 1)
            chosen = int(np.searchsorted(shares, target, side="right")) - 1
            low, high = int(starts[chosen]), int(starts[chosen + 1])
        assert high == low + 1, "the numbers of a net name it"
        return low


@dataclass(frozen=True, slots=True)
class SearchSpace:
    """The feasible nets, in the order in which quantiles pick them."""

    feasible: Feasible
    coordinates: tuple[str, ...]
    """Names of Optuna's parameters, each a float from 0 to 1."""
    settings: _Entries
    """Combinations of template width, image size and shared numbers."""
    first_halves: dict[int, _Entries]
    """By setting, as they are met: to sort a huge one takes a second."""


def search_space(space: Space, windows: Sequence[Window]) -> SearchSpace:
    """The nets of a space that fit all windows, for samplers.

    Raises:
        InputError: none fits; the message names the nearest nets.
    """
    feasible = solve(space, windows)
    if not feasible.count:
        raise InputError(none_fits(space, windows))
    names = []
    if len(space.template_widths) > 1:
        names.append("template_width")
    if len(space.image_sizes) > 1:
        names.append("image_size")
    axes = resolved_axes(space)
    names += [
        name
        for name, axis in zip(_AXIS_NAMES, axes, strict=True)
        if isinstance(axis, Shared)
    ]
    names += [
        f"{name}_{stage + 1}"
        for stage in range(space.template.num_stages)
        for name, axis in zip(_AXIS_NAMES, axes, strict=True)
        if isinstance(axis, PerStage) and len(axis.values[stage]) > 1
    ]
    return SearchSpace(feasible, tuple(names), _settings(feasible), {})


def suggest(search: SearchSpace, trial: optuna.Trial) -> tuple[ResNeXtSpec, int]:
    """A feasible net that no trial of the study has had, and its image size.

    Where the sampler's numbers name a net that was had before, the next in order that
    was not is taken. The net is kept among the trial's attributes.

    Raises:
        InputError: the study has had every feasible net.
    """
    quantiles = {name: trial.suggest_float(name, 0, 1) for name in search.coordinates}
    had = {
        (one.user_attrs[_NET], one.user_attrs[_IMAGE_SIZE])
        for one in trial.study.get_trials(deepcopy=False)
        if _NET in one.user_attrs
    }
    for spec, image_size in _nets_from(search, quantiles):
        if (spec.name, image_size) not in had:
            attributes = net_attributes(spec.name, image_size=image_size)
            for key, value in attributes.items():
                trial.set_user_attr(key, value)
            return spec, image_size
    raise InputError(
        f"the study has had all {search.feasible.count:,} nets that fit; widen a "
        "window or an axis to search on."
    )


def net_attributes(name: str, *, image_size: int) -> dict[str, str | int]:
    """The attributes by which a trial has a net; it has it with the last of them."""
    return {_IMAGE_SIZE: image_size, _NET: name}


def has_net(trial: FrozenTrial) -> bool:
    """Whether a trial was given a net."""
    return _NET in trial.user_attrs


def net_of(trial: FrozenTrial) -> tuple[ResNeXtSpec, int]:
    """The net that a trial was given, and its image size."""
    return parse_spec(trial.user_attrs[_NET]), int(trial.user_attrs[_IMAGE_SIZE])


def _nets_from(
    search: SearchSpace, quantiles: dict[str, float]
) -> Iterator[tuple[ResNeXtSpec, int]]:
    """The net that quantiles name, then all others, those near in the order first."""
    for at in _outwards(search.settings.pick(quantiles), len(search.settings.places)):
        number = int(search.settings.places[at])
        found = settings_with_solutions(search.feasible, {number})
        ((_, (setting, solutions)),) = found
        first = search.first_halves.get(number)
        if first is None:
            weights = solutions.partners.counts
            everyone = np.flatnonzero(weights)
            first = _entries(search, setting, solutions.first, everyone, weights)
            search.first_halves[number] = first
        for entry in _outwards(first.pick(quantiles), len(first.places)):
            second = _partners(search, setting, solutions, int(first.places[entry]))
            for partner in _outwards(second.pick(quantiles), len(second.places)):
                one = (solutions.first.factors, first.choices[entry])
                other = (solutions.second.factors, second.choices[partner])
                yield _net(setting, (one, other)), setting.image_size


def _partners(
    search: SearchSpace, setting: Setting, solutions: Solutions, entry: int
) -> _Entries:
    ordinals = np.arange(solutions.partners.counts[entry])
    places = solutions.partners.select(np.full_like(ordinals, entry), ordinals)
    return _entries(search, setting, solutions.second, places, None)


def _entries(
    search: SearchSpace,
    setting: Setting,
    options: Options,
    places: Ints,
    weights: Ints | None,
) -> _Entries:
    """Some of a half's combinations in rising order of their numbers."""
    choices = options.choices(places)
    factors = sorted(range(len(options.factors)), key=lambda at: options.factors[at])
    if factors:
        order = np.lexsort([choices[:, at] for at in reversed(factors)])
        choices, places = choices[order], places[order]
    weight = np.ones_like(places) if weights is None else weights[places]
    by_stage = is_by_stage(resolved_axes(search.feasible.space))
    columns = tuple(
        (
            f"{name}_{setting.factors[options.factors[at]].stages[0] + 1}"
            if by_stage
            else name,
            at,
            setting.factors[options.factors[at]].numbers[:, 0, column],
        )
        for at in factors
        for column, name in enumerate(_AXIS_NAMES)
    )
    ends = np.concatenate([[0], np.cumsum(weight)])
    return _Entries(choices, columns, places, ends)


def _settings(feasible: Feasible) -> _Entries:
    """The settings that have nets, in the rising order in which they come."""
    space = feasible.space
    axes = resolved_axes(space)
    shared = [at for at, axis in enumerate(axes) if isinstance(axis, Shared)]
    rows = []
    for setting in settings_of(space, currencies=()):
        row = [setting.template.template_width, setting.image_size]
        if is_by_stage(axes):  # Then each setting has one value of a shared number.
            numbers = setting.factors[0].numbers
            row += [int(numbers[0, 0, at]) if len(numbers) else 0 for at in shared]
        rows.append(row)
    counts = np.diff(np.array([0, *feasible.ends]))
    places = np.flatnonzero(counts)
    names = ["template_width", "image_size", *(_AXIS_NAMES[at] for at in shared)]
    table = np.array(rows)
    columns = tuple(
        (names[column], 0, table[:, column]) for column in range(table.shape[1])
    )
    ends = np.concatenate([[0], np.cumsum(counts[places])])
    return _Entries(places[:, None], columns, places, ends)


def _net(
    setting: Setting, halves: tuple[tuple[tuple[int, ...], Ints], ...]
) -> ResNeXtSpec:
    template = setting.template
    numbers = np.empty((template.num_stages, 3), np.int64)
    for factors, choices in halves:
        for number, choice in zip(factors, choices, strict=True):
            factor = setting.factors[number]
            numbers[list(factor.stages)] = factor.numbers[choice]
    cardinalities, depths, widths = map(tuple, numbers.T.tolist())
    return replace(
        template,
        cardinality=cardinalities,
        stage_depths=depths,
        bottleneck_widths=widths,
    )


def _outwards(start: int, size: int) -> Iterator[int]:
    """All places, the nearest to a start first."""
    yield start
    for distance in range(1, max(start, size - 1 - start) + 1):
        yield from (at for at in (start + distance, start - distance) if 0 <= at < size)
