"""Optuna samples feasible nets only, and none twice."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.samplers import (
    BaseSampler,
    GPSampler,
    QMCSampler,
    RandomSampler,
    TPESampler,
)
from scipy import stats

from resnext_ablate.architecture.complexity import complexity
from resnext_ablate.architecture.feasible import enumerate_nets
from resnext_ablate.architecture.names import parse_spec
from resnext_ablate.architecture.space import (
    PerStage,
    Shared,
    Space,
    Window,
    around,
    multiples,
    powers_of_two,
)
from resnext_ablate.architecture.spec import InputError, ResNeXtSpec
from resnext_ablate.study.search import net_of, search_space, suggest

TEMPLATE = parse_spec("resnext1.2.1-2x8d-t8")
ALL = Window("macs", 0, 10**12)

SPACES = {
    "by stage": Space(
        template=TEMPLATE,
        image_sizes=(16,),
        cardinality=PerStage(((1, 2),)),
        width=PerStage(((2, 3), (4, 6), (8,))),
    ),
    "shared": Space(
        template=TEMPLATE,
        image_sizes=(16, 20),
        cardinality=Shared((1, 2, 4)),
        width=Shared((1, 2, 5)),
        stage_depth=Shared((1, 2)),
    ),
    "both": Space(
        template=TEMPLATE,
        image_sizes=(16,),
        template_widths=(4, 8),
        cardinality=Shared((1, 2, 4)),
        width=PerStage(((2, 3, 4), (4, 6), (8,))),
        stage_depth=PerStage(((1, 2), (1,), (1, 3))),
        inner_multiple=2,
    ),
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Optuna's own notices and its warnings of experimental samplers stay away."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield
    optuna.logging.set_verbosity(optuna.logging.INFO)


def _study(sampler: BaseSampler) -> optuna.Study:
    return optuna.create_study(sampler=sampler)


def _half(space: Space) -> Window:
    """A window in the currency of macs that about half of the nets fit."""
    nets = enumerate_nets(space, [ALL])
    costs = sorted(
        complexity(nets.spec(row), int(nets.image_sizes[row])).macs
        for row in range(len(nets))
    )
    return Window("macs", costs[len(costs) // 4], costs[3 * len(costs) // 4])


def _fits(spec: ResNeXtSpec, size: int, window: Window) -> bool:
    return window.low <= complexity(spec, size).macs <= window.high


@pytest.mark.parametrize("name", SPACES)
def test_every_net_comes_once_and_then_it_says_so(name: str) -> None:
    """A random sampler goes through exactly the feasible nets, then is told to stop."""
    space = SPACES[name]
    window = _half(space)
    nets = enumerate_nets(space, [window])
    expected = set(zip(nets.specs(), nets.image_sizes.tolist(), strict=True))
    study = _study(RandomSampler(seed=1))
    search = search_space(space, [window])
    found = [suggest(search, study.ask()) for _ in range(len(expected))]
    assert len(set(found)) == len(found)
    assert set(found) == expected
    with pytest.raises(InputError, match=f"all {len(expected)} nets that fit"):
        suggest(search, study.ask())


@pytest.mark.parametrize("name", SPACES)
def test_uniform_numbers_give_uniform_nets(name: str) -> None:
    """In studies of their own, first suggestions are uniform over the feasible nets."""
    space = SPACES[name]
    search = search_space(space, [_half(space)])
    rng = np.random.default_rng(3)
    counts = Counter()
    for _ in range(30 * search.feasible.count):
        study = _study(RandomSampler())
        numbers = {name: rng.random() for name in search.coordinates}
        study.enqueue_trial(numbers)
        counts[suggest(search, study.ask())] += 1
        if sum(counts.values()) == 1500:
            break
    assert len(counts) == search.feasible.count
    assert stats.chisquare(list(counts.values())).pvalue > 1e-4


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (RandomSampler, {}),
        (TPESampler, {"n_startup_trials": 5, "multivariate": True}),
        (QMCSampler, {}),
        (GPSampler, {"n_startup_trials": 5}),
    ],
)
def test_samplers_stay_within_the_budget(
    kind: type[BaseSampler], options: dict[str, Any]
) -> None:
    """Each kind of sampler suggests feasible nets, all different, none pruned."""
    sampler = kind(seed=0, **options)
    template = parse_spec("resnet50")
    space = Space(
        template=template,
        image_sizes=(224,),
        cardinality=PerStage((powers_of_two(1, 32),)),
        width=PerStage((multiples(8, low=8, high=128),)),
        stage_depth=PerStage((tuple(range(2, 7)),)),
    )
    window = around(template, currency="macs", tolerance_pct=1, image_size=224)
    search = search_space(space, [window])
    assert len(search.coordinates) == 12
    study = _study(sampler)

    def objective(trial: optuna.Trial) -> float:
        spec, image_size = suggest(search, trial)
        assert image_size == 224
        assert _fits(spec, 224, window)
        return float(sum(spec.stage_depths))

    study.optimize(objective, n_trials=12)
    assert all(one.state.name == "COMPLETE" for one in study.trials)
    assert len({net_of(one) for one in study.trials}) == 12


def test_a_sampler_learns_the_geometry() -> None:
    """TPE finds deeper last stages than chance does: near numbers give near nets."""
    template = parse_spec("resnext29-8x16d-t16")
    space = Space(
        template=template,
        image_sizes=(32,),
        cardinality=Shared((1, 2, 4, 8)),
        width=PerStage((multiples(4, low=4, high=64),)),
        stage_depth=PerStage((tuple(range(1, 9)),)),
    )
    window = around(template, currency="macs", tolerance_pct=2, image_size=32)
    search = search_space(space, [window])

    def best(sampler: BaseSampler) -> float:
        study = _study(sampler)
        study.optimize(
            lambda trial: (
                -float(
                    sum(
                        suggest(search, trial)[0].inner_channels[stage]
                        for stage in (1, 2)
                    )
                )
            ),
            n_trials=60,
        )
        return float(np.mean(sorted(one.value for one in study.trials)[:10]))

    chance = np.mean([best(RandomSampler(seed=seed)) for seed in range(3)])
    learnt = np.mean([best(TPESampler(seed=seed)) for seed in range(3)])
    assert learnt < chance - 20


def test_resumed_study_repeats_nothing() -> None:
    """A search space made anew knows what the study's earlier trials had."""
    space = SPACES["by stage"]
    study = _study(RandomSampler(seed=0))
    first = [suggest(search_space(space, [ALL]), study.ask()) for _ in range(16)]
    again = [suggest(search_space(space, [ALL]), study.ask()) for _ in range(16)]
    assert len({*first, *again}) == 32


def test_nets_are_read_back_from_trials() -> None:
    """A trial's attributes name its net and image size."""
    study = _study(RandomSampler(seed=0))
    trial = study.ask()
    suggested = suggest(search_space(SPACES["shared"], [ALL]), trial)
    study.tell(trial, 1.0)
    assert net_of(study.best_trial) == suggested


def test_nothing_to_search() -> None:
    """A space without a feasible net names the nearest before any trial."""
    with pytest.raises(InputError, match="no net fits macs 1 to 2; nearest: resnext"):
        search_space(SPACES["shared"], [Window("macs", 1, 2)])
