"""Optuna's samplers and pruners as a search uses them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial
from search_parts import net, open_runs

from resnext_ablate.architecture.complexity import complexity
from resnext_ablate.architecture.names import parse_spec
from resnext_ablate.architecture.space import PerStage, Space, Window, around
from resnext_ablate.records.records import Trial
from resnext_ablate.records.search_config import SearchConfig
from resnext_ablate.study import sampling
from resnext_ablate.study.search import SearchSpace, search_space

TEMPLATE = parse_spec("resnext1.2.1-2x8d-t8")
WINDOW = around(TEMPLATE, currency="macs", tolerance_pct=15, image_size=16)


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    return search_space(
        Space(
            template=TEMPLATE,
            image_sizes=(16,),
            cardinality=PerStage(((1, 2, 4),)),
            width=PerStage((tuple(range(2, 17, 2)),)),
        ),
        [WINDOW],
    )


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(optuna.logging.INFO)


def config(sampler: str, **values: Any) -> SearchConfig:
    if sampler == "nsga2":
        values |= {"also_minimize": "params", "population_size": 4}
    if sampler in ("tpe", "gp"):
        values.setdefault("startup_trials", 3)
    values.setdefault("pruner", "none")
    return SearchConfig(axes=("width=1..9",), num_trials=9, sampler=sampler, **values)


def nets_of(folder: Path, search: SearchConfig) -> optuna.Study:
    folder.mkdir(exist_ok=True)
    runs = open_runs(folder, name="s")
    return sampling.open_nets(runs, name="s", config=search, num_rungs=2)


def search(
    folder: Path, one: SearchConfig, space: SearchSpace, numbers: range
) -> list[str]:
    """Asks for nets and tells an error that depends on the net alone."""
    nets = nets_of(folder, one)
    found = []
    for number in numbers:
        asked = sampling.ask(nets, config=one, space=space, number=number)
        found.append(asked.spec.name)
        trial = sampling.trials_by_number(nets)[number]
        values = [float(sum(asked.spec.inner_channels))]
        if one.also_minimize:
            values.append(float(complexity(asked.spec, 16).params))
        sampling.tell(nets, trial=trial, values=values)
    return found


SAMPLERS = ("tpe", "gp", "qmc", "random", "nsga2")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_same_seed_same_nets_also_when_cut_off(
    sampler: str, space: SearchSpace, tmp_path: Path
) -> None:
    """A search that is opened anew in the middle goes on as the unbroken one did."""
    one = config(sampler)
    unbroken = search(tmp_path / "a", one, space, range(9))
    first = search(tmp_path / "b", one, space, range(5))
    rest = search(tmp_path / "b", one, space, range(5, 9))
    assert first + rest == unbroken
    assert len(set(unbroken)) == 9
    for name in unbroken:
        assert WINDOW.low <= complexity(parse_spec(name), 16).macs <= WINDOW.high


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_another_seed_gives_other_nets(
    sampler: str, space: SearchSpace, tmp_path: Path
) -> None:
    """The seed bites."""
    nets = [
        search(
            tmp_path / str(seed), config(sampler, sampler_seed=seed), space, range(4)
        )
        for seed in range(2)
    ]
    assert nets[0] != nets[1]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_nets_asked_for_at_once_all_differ(
    sampler: str, space: SearchSpace, tmp_path: Path
) -> None:
    """Before any result is in, several executors get a net each."""
    one = config(sampler)
    nets = nets_of(tmp_path, one)
    asked = [
        sampling.ask(nets, config=one, space=space, number=number).spec.name
        for number in range(12)
    ]
    assert len(set(asked)) == 12


def test_a_net_that_was_asked_for_and_not_written_down_comes_again(
    space: SearchSpace, tmp_path: Path
) -> None:
    """A kill between storage and plan loses no suggestion and leaves no zombie."""
    one = config("tpe")
    nets = nets_of(tmp_path, one)
    asked = sampling.ask(nets, config=one, space=space, number=0)
    again = sampling.ask(nets_of(tmp_path, one), config=one, space=space, number=0)
    assert again == asked
    assert len(nets.get_trials()) == 1


def test_half_asked_trials_do_not_stay_running(
    space: SearchSpace, tmp_path: Path
) -> None:
    """A trial without a net, left by a kill in mid-ask, is ended."""
    one = config("tpe")
    nets = nets_of(tmp_path, one)
    nets.ask()
    sampling.drop_half_asked(nets)
    assert [trial.state for trial in nets.get_trials()] == [TrialState.FAIL]
    asked = sampling.ask(nets, config=one, space=space, number=0)
    assert asked.number == 0


def ask_and_report(
    nets: optuna.Study, one: SearchConfig, space: SearchSpace, errors: list[list[float]]
) -> list[int]:
    """Reports the errors of each net in turn; at how many places each one stopped."""
    stopped = []
    for number, curve in enumerate(errors):
        sampling.ask(nets, config=one, space=space, number=number)
        trial = sampling.trials_by_number(nets)[number]
        at = 0
        for place, error in enumerate(curve):
            step = sampling.step_of(one, place=place)
            if sampling.report(nets, trial=trial, step=step, value=error):
                at = place + 1
                break
        if at:
            sampling.tell_stopped(nets, trial=trial, state="pruned", reason="p")
        else:
            sampling.tell(nets, trial=trial, values=[sum(curve) / len(curve)])
        stopped.append(at)
    return stopped


def test_asha_keeps_the_best_of_each_rung(space: SearchSpace, tmp_path: Path) -> None:
    """With a factor of 2 a rung is passed by the better half so far, at every rung."""
    one = config("random", pruner="asha", reduction_factor=2)
    errors = [[50, 40], [60, 30], [40, 35], [45, 50], [41, 20], [39, 36]]
    stopped = ask_and_report(nets_of(tmp_path, one), one, space, errors)
    # 60 is worse than 50; 40 leads; 45 ties for the second of four; 41 is second of
    # five, of which two pass; 39 leads. At rung two: 40, 35 leads, 50 and 36 trail.
    assert stopped[:3] == [0, 1, 0]
    assert stopped[5] == 2


def test_median_stops_what_is_worse_than_half(
    space: SearchSpace, tmp_path: Path
) -> None:
    """After the first nets have ended, worse than their median at a rung is stopped."""
    one = config("random", pruner="median", prune_after_trials=3)
    errors = [[50, 40], [60, 30], [40, 35], [55, 10], [45, 36]]
    stopped = ask_and_report(nets_of(tmp_path, one), one, space, errors)
    assert stopped == [0, 0, 0, 1, 2]


def test_wilcoxon_stops_seeds_that_lose_to_the_best(
    space: SearchSpace, tmp_path: Path
) -> None:
    """Worse than the best net with each seed: stopped once p is below the threshold."""
    one = config("random", pruner="wilcoxon", p_threshold=0.1)
    best = [10.0, 11.0, 12.0, 13.0, 14.0]
    worse = [error + 1 + place / 10 for place, error in enumerate(best)]
    mixed = [error + (-1) ** place for place, error in enumerate(best)]
    stopped = ask_and_report(nets_of(tmp_path, one), one, space, [best, worse, mixed])
    assert stopped == [0, 4, 0]  # 1 / 2^4 is the first p below 0.1.


def test_hyperband_stops_some_and_not_all(space: SearchSpace, tmp_path: Path) -> None:
    """Its brackets differ in where they begin to stop nets."""
    one = config("random", pruner="hyperband", reduction_factor=2)
    errors = [[50.0 + number, 40.0 + number] for number in range(12)]
    stopped = ask_and_report(nets_of(tmp_path, one), one, space, errors)
    assert set(stopped) == {0, 1, 2}


def test_a_lost_trial_is_put_back_as_it_was(space: SearchSpace, tmp_path: Path) -> None:
    """From the plan alone a trial has its parameters and its net again."""
    one = config("random")
    nets = nets_of(tmp_path / "a", one)
    asked = sampling.ask(nets, config=one, space=space, number=0)
    before = sampling.trials_by_number(nets)[0]
    other = nets_of(tmp_path / "b", one)
    trial = Trial(number=0, variant=asked.spec.name, params=asked.params)
    sampling.add_again(other, trial=trial, net=net(asked.spec.name))
    after = sampling.trials_by_number(other)[0]
    assert after.params == before.params
    assert after.distributions == before.distributions
    assert after.user_attrs["net"] == before.user_attrs["net"]
    taken = sampling.ask(other, config=one, space=space, number=1)
    assert taken.spec.name != asked.spec.name


def test_window_is_not_vacuous(space: SearchSpace) -> None:
    """The budget leaves out nets of the space, so that holding it says something."""
    everything = Window("macs", 0, 10**12)
    assert space.feasible.count > 20
    assert (
        space.feasible.count
        < search_space(space.feasible.space, [everything]).feasible.count
    )


def told(*errors: tuple[float, float]) -> optuna.Study:
    """A finished search whose error is a function of its axes."""
    rng = np.random.default_rng(0)
    nets = optuna.create_study()
    weight_of = {"cardinality_1": 0, "width_1": 1}
    for weights in errors:
        params = {name: float(rng.random()) for name in weight_of}
        value = sum(weights[at] * params[name] for name, at in weight_of.items())
        one = create_trial(
            state=TrialState.COMPLETE,
            params=params,
            distributions={name: FloatDistribution(0, 1) for name in params},
            value=value,
        )
        nets.add_trial(one)
    return nets


def test_importance_names_the_axis_that_matters() -> None:
    """An error that follows one axis is explained by it, by every call alike."""
    nets = told(*[(1.0, 10.0)] * 30)
    found = sampling.importance(nets)
    assert found is not None
    assert (found.evaluator, found.seed, found.num_nets) == ("fANOVA", 0, 30)
    assert list(found.shares) == ["width_1", "cardinality_1"]
    assert found.shares["width_1"] > 0.9
    assert sum(found.shares.values()) == pytest.approx(1)
    assert sampling.importance(nets) == found


def test_importance_is_silent_where_nothing_is_known() -> None:
    """Seven nets are too few, and equal errors have nothing to explain."""
    assert sampling.importance(told(*[(1.0, 10.0)] * 7)) is None
    assert sampling.importance(told(*[(0.0, 0.0)] * 9)) is None
