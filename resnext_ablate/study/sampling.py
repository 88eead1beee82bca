"""Optuna's side of a search: a trial for each net, in a study beside that of the runs.

A sampler is made anew for each net from the study file and what the storage holds, so
that a search that was cut off goes on as if it had not been. What it draws at random
depends on the seed and on the net's place in the search, and on nothing else.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import optuna
from optuna.distributions import FloatDistribution
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from resnext_ablate.architecture.spec import ResNeXtSpec
from resnext_ablate.records.importance import Importance
from resnext_ablate.records.records import NetRecord, Trial
from resnext_ablate.records.search_config import SearchConfig
from resnext_ablate.study.search import (
    SearchSpace,
    has_net,
    net_attributes,
    net_of,
    suggest,
)

Stopped = Literal["pruned", "failed"]

MIN_NETS_OF_IMPORTANCE = 8
"""Fewer nets than this say nothing of what matters."""
_FANOVA_SEED = 0

# Attributes of a trial: its net's place in the search; the step where it was stopped.
_NUMBER, _STOPPED_AT = "search_number", "stopped_at_step"


@dataclass(frozen=True)
class Asked:
    """A net that is to be tried."""

    number: int
    spec: ResNeXtSpec
    params: dict[str, float]


def open_nets(
    runs: optuna.Study, *, name: str, config: SearchConfig, num_rungs: int
) -> optuna.Study:
    """The study of a search's nets, in the storage of the study of its runs."""
    directions = [StudyDirection.MINIMIZE] * (2 if config.also_minimize else 1)
    return optuna.create_study(
        storage=runs._storage,
        study_name=f"{name} (nets)",
        directions=directions,
        sampler=optuna.samplers.RandomSampler(seed=config.sampler_seed),
        pruner=_pruner(config, num_rungs=num_rungs),
        load_if_exists=True,
    )


def ask(
    nets: optuna.Study, *, config: SearchConfig, space: SearchSpace, number: int
) -> Asked:
    """The next net; one that was asked for and never written down comes again.

    Raises:
        InputError: every feasible net was had.
    """
    for one in nets.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if one.user_attrs.get(_NUMBER) == number:
            return Asked(number, net_of(one)[0], one.params)
    nets.sampler = make_sampler(config, number=number)
    trial = nets.ask()
    # First of all, so that the net's own mark makes the trial whole.
    trial.set_user_attr(_NUMBER, number)
    spec, _ = suggest(space, trial)
    return Asked(number, spec, trial.params)


def make_sampler(config: SearchConfig, *, number: int) -> BaseSampler:
    """The sampler for one place in the search."""
    draws = np.random.SeedSequence((config.sampler_seed, number))
    seed = int(draws.generate_state(1)[0])
    if config.sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if config.sampler == "nsga2":
        assert config.population_size is not None
        return optuna.samplers.NSGAIISampler(
            population_size=config.population_size, seed=seed
        )
    if config.sampler == "gp":
        assert config.startup_trials is not None
        return optuna.samplers.GPSampler(
            n_startup_trials=config.startup_trials, seed=seed
        )
    if config.sampler == "qmc":
        with _experimental_is_fine():
            return optuna.samplers.QMCSampler(
                seed=config.sampler_seed,  # One sequence for the whole search.
                scramble=True,
                independent_sampler=optuna.samplers.RandomSampler(seed=seed),
                warn_independent_sampling=False,
            )
    assert config.startup_trials is not None
    assert config.multivariate is not None and config.constant_liar is not None
    return optuna.samplers.TPESampler(
        n_startup_trials=config.startup_trials,
        multivariate=config.multivariate,
        constant_liar=config.constant_liar,
        seed=seed,
    )


def step_of(config: SearchConfig, *, place: int) -> int:
    """The step by which Optuna knows a rung, or a seed, counted from 0.

    Successive halving has its rungs at the powers of its factor.
    """
    return place if config.reduction_factor is None else config.reduction_factor**place


def trials_by_number(nets: optuna.Study) -> dict[int, FrozenTrial]:
    """The trials that have a net, by their places in the search."""
    return {
        trial.user_attrs[_NUMBER]: trial
        for trial in nets.get_trials(deepcopy=False)
        if has_net(trial) and _NUMBER in trial.user_attrs
    }


def add_again(nets: optuna.Study, *, trial: Trial, net: NetRecord) -> None:
    """Puts back a net that the plan has and the storage has lost."""
    attributes = net_attributes(net.name, image_size=net.image_size)
    distributions = {name: FloatDistribution(0, 1) for name in trial.params}
    nets.add_trial(
        create_trial(
            state=TrialState.RUNNING,
            params=dict(trial.params),
            distributions=dict(distributions),
            user_attrs={_NUMBER: trial.number, **attributes},
        )
    )


def drop_half_asked(nets: optuna.Study) -> None:
    """Ends trials whose scheduler was killed before they had a net.

    As RUNNING ones they would stand in a sampler's way for ever.
    """
    for trial in nets.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if not has_net(trial):
            nets.tell(trial.number, state=TrialState.FAIL)


def report(nets: optuna.Study, *, trial: FrozenTrial, step: int, value: float) -> bool:
    """Notes an error at a rung or seed; True where the pruner would stop there.

    The pruner answers once for each step, and what it said of a step stays.
    """
    if step in trial.intermediate_values:
        return bool(trial.user_attrs.get(_STOPPED_AT) == step)
    live = optuna.Trial(nets, trial._trial_id)
    live.report(value, step)
    stops = live.should_prune()
    if stops:
        live.set_user_attr(_STOPPED_AT, step)
    return stops


def tell(nets: optuna.Study, *, trial: FrozenTrial, values: Sequence[float]) -> None:
    """Ends a net's trial with what its runs came to."""
    nets.tell(trial.number, list(values))


def tell_stopped(
    nets: optuna.Study,
    *,
    trial: FrozenTrial,
    state: Stopped,
    reason: str,
) -> None:
    """Ends a net's trial that came to nothing."""
    optuna.Trial(nets, trial._trial_id).set_user_attr("reason", reason)
    states = {"pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
    nets.tell(trial.number, state=states[state])


def importance(nets: optuna.Study) -> Importance | None:
    """What each axis explains of the validation errors of the nets trained to the end.

    Returns:
        None where there are too few nets, or all are alike.
    """
    complete = nets.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(complete) < MIN_NETS_OF_IMPORTANCE:
        return None
    try:
        shares = optuna.importance.get_param_importances(
            nets,
            evaluator=optuna.importance.FanovaImportanceEvaluator(seed=_FANOVA_SEED),
            target=lambda trial: trial.values[0],
        )
    except (RuntimeError, ValueError):  # The errors do not vary.
        return None
    return Importance(
        evaluator="fANOVA",
        seed=_FANOVA_SEED,
        num_nets=len(complete),
        shares={name: float(share) for name, share in shares.items()},
    )


def _pruner(config: SearchConfig, *, num_rungs: int) -> BasePruner:
    if config.pruner in ("asha", "hyperband"):
        factor = config.reduction_factor
        assert factor is not None
        if config.pruner == "asha":
            return optuna.pruners.SuccessiveHalvingPruner(
                min_resource=1, reduction_factor=factor
            )
        return optuna.pruners.HyperbandPruner(
            min_resource=1,
            max_resource=step_of(config, place=num_rungs - 1),
            reduction_factor=factor,
        )
    if config.pruner == "median":
        assert config.prune_after_trials is not None
        return optuna.pruners.MedianPruner(n_startup_trials=config.prune_after_trials)
    if config.pruner == "wilcoxon":
        assert config.p_threshold is not None
        with _experimental_is_fine():
            return optuna.pruners.WilcoxonPruner(p_threshold=config.p_threshold)
    return optuna.pruners.NopPruner()


@contextlib.contextmanager
def _experimental_is_fine() -> Iterator[None]:
    """Optuna calls some of what it has experimental; its version is recorded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield
