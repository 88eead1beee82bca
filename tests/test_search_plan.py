"""The plan of a search as it grows, with made-up runs and kills at every point."""

from __future__ import annotations

import contextlib
import functools
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import optuna
import pytest
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState
from search_parts import curve, open_runs

from resnext_ablate.architecture.complexity import complexity
from resnext_ablate.architecture.names import parse_spec
from resnext_ablate.architecture.spec import InputError, spec_from_dict
from resnext_ablate.compute import model
from resnext_ablate.compute.data import DataInfo
from resnext_ablate.records import records
from resnext_ablate.records.config import StudyConfig
from resnext_ablate.records.importance import read_importance
from resnext_ablate.records.outcomes import trial_outcomes
from resnext_ablate.records.records import Cell, Plan, RunRecord
from resnext_ablate.study import sampling, storage
from resnext_ablate.study.search import has_net
from resnext_ablate.study.search_plan import SearchPlan, space_of
from resnext_ablate.study.variants import plan_nets

INFO = DataInfo(
    name="digits",
    checksum="",
    image_size=16,
    in_channels=1,
    num_classes=10,
    class_names=tuple("0123456789"),
    num_train=100,
    num_val=10,
    num_test=10,
    corrupt_files=(),
)
EPOCHS = 9


class Killed(Exception):
    """Stands for the end of the scheduler's process."""


@pytest.fixture(scope="module", autouse=True)
def measure_once() -> Iterator[None]:
    """Each net is measured by fvcore once, however many searches find it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "measure_fvcore", functools.cache(model.measure_fvcore))
        yield


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(optuna.logging.INFO)


def study(**search: Any) -> StudyConfig:
    values: dict[str, Any] = {
        "axes": ["stage-cardinality=1..4*2", "stage-width=2..16/2"],
        "num_trials": 7,
        "sampler": "tpe",
        "confirm_top": 2,
        "confirm_seeds": 2,
        **search,
    }
    if values["sampler"] == "tpe":
        values.setdefault("startup_trials", 3)
    seeds = values.pop("seeds", 1)
    return StudyConfig.model_validate(
        {
            "name": "hunt",
            "kind": "search",
            "net": {
                "template": "resnext1.2.1-2x8d-t8",
                "tolerance_pct": values.pop("tolerance_pct", 15.0),
                "hold": values.pop("hold", "macs"),
                "variants": ["1x8d"],
            },
            "search": values,
            "data": {"name": "digits"},
            "train": {"epochs": EPOCHS},
            "run": {"seeds": seeds, "executors": 1, "device": "cpu"},
        }
    )


def resolved(config: StudyConfig) -> StudyConfig:
    assert config.search is not None
    part = config.search.resolved(epochs=config.train.epochs)
    return config.model_copy(update={"search": part})


def error_of(variant: str, seed: int) -> float:
    """A made-up last error; the same net and seed always have the same."""
    return 5 + zlib.crc32(f"{variant} {seed}".encode()) % 4000 / 100


class Simulation:
    """A scheduler with one executor that trains nothing, and dies when told to."""

    def __init__(self, folder: Path, config: StudyConfig) -> None:
        self.folder = folder
        self.config = resolved(config)
        self.events = 0
        self.die_at: int | None = None
        self.trained: list[tuple[str, int, int]] = []
        (folder / "runs").mkdir(parents=True)
        nets = plan_nets(self.config, data=INFO, device="cpu").nets
        self.named = [net.variant for net in nets]
        first = Plan(nets=nets, cells=(), provenance={"data_checksum": ""})
        records.write_plan(first, folder)

    def tick(self) -> None:
        """A point at which the process may end."""
        self.events += 1
        if self.events == self.die_at:
            raise Killed

    def run(self) -> Plan:
        """Goes on until nothing is left to do."""
        plan = records.read_plan(self.folder)
        runs = open_runs(self.folder, name="hunt")
        grower = SearchPlan(
            plan,
            named=self.named,
            config=self.config,
            folder=self.folder,
            runs=runs,
        )
        done = {run.cell for run in records.read_runs(self.folder, plan)}
        todo = [cell for cell in grower.plan.cells if cell.id not in done]
        while todo or (todo := list(grower.next_cells())):
            self.tick()
            cell = todo.pop(0)
            planned = records.read_plan(self.folder)
            assert cell in planned.cells, "a cell is written down before it runs"
            run = self.train(cell, grower)
            self.tick()
            records.write_run(run, self.folder)
            self.tick()
            grower.settle(run)
        plan = records.read_plan(self.folder)
        assert plan.cells == grower.plan.cells, "the file has the whole plan"
        return plan

    def train(self, cell: Cell, grower: SearchPlan) -> RunRecord:
        waits = grower.wait_after(cell)
        last = error_of(cell.variant, cell.seed)
        epochs = curve(*(last + 40 * 0.6**epoch for epoch in range(EPOCHS - 1)), last)
        reason = ""
        for epoch in range(1, EPOCHS + 1):
            if epoch in waits:
                self.tick()
                reason = grower.stop_reason(cell, epochs[:epoch])
            if reason:
                epochs = epochs[:epoch]
                break
        self.trained.append((cell.variant, cell.seed, len(epochs)))
        return RunRecord(
            cell=cell.id,
            variant=cell.variant,
            seed=cell.seed,
            state="pruned" if reason else "complete",
            reason=reason,
            device="cpu",
            precision="fp32",
            data_checksum="",
            started_at="",
            environment={},
            epochs=tuple(epochs),
            images_per_s=None if reason else 1000 + last,
        )


def unbroken(folder: Path, config: StudyConfig) -> tuple[Plan, Simulation]:
    simulation = Simulation(folder, config)
    return simulation.run(), simulation


CONFIGS: dict[str, StudyConfig] = {
    "asha": study(pruner="asha", audit_fraction=0.3),
    "hyperband": study(pruner="hyperband"),
    "median": study(pruner="median", prune_after_trials=2, sampler="random"),
    "seconds": study(rung_unit="seconds", rungs=[1.5, 4.0], sampler="qmc"),
    "wilcoxon": study(pruner="wilcoxon", seeds=5, num_trials=6),
    "nsga2": study(
        pruner="none", sampler="nsga2", population_size=4, also_minimize="step_time"
    ),
    "params": study(hold="params", tolerance_pct=30.0, sampler="gp"),
    "seeds": study(seeds=2, num_trials=5),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_search_ends_with_its_best_nets_confirmed(
    name: str, tmp_path: Path
) -> None:
    """Whatever is sampled and pruned, all trials end and fresh seeds run for the best.

    Nets are all different and within the budget, and each cell is trained once.
    """
    config = CONFIGS[name]
    plan, simulation = unbroken(tmp_path / "a", config)
    assert config.search is not None
    assert len(plan.trials) == config.search.num_trials
    assert len({trial.variant for trial in plan.trials}) == len(plan.trials)
    cells = [(variant, seed) for variant, seed, _ in simulation.trained]
    assert len(set(cells)) == len(cells) == len(plan.cells)
    space = space_of(simulation.config, reference=plan.nets[0])
    for trial in plan.trials:
        net = plan.net(trial.variant)
        cost = complexity(spec_from_dict(net.spec), net.image_size)
        for window in space.feasible.windows:
            assert window.low <= getattr(cost, window.currency) <= window.high
    runs = records.read_runs(tmp_path / "a", plan)
    outcomes = trial_outcomes(plan, runs, seeds=config.run.seed_list())
    assert all(one.is_ended for one in outcomes)
    fresh = config.confirm_seeds()
    confirmed = {cell.variant for cell in plan.cells if cell.seed in fresh}
    complete = [one for one in outcomes if one.val_error_pct is not None]
    best = min(complete, key=lambda one: one.val_error_pct or 0)
    assert {*simulation.named, best.net.variant} <= confirmed
    assert len(confirmed) <= len(simulation.named) + 2


def test_pruned_nets_have_spent_equal_compute(tmp_path: Path) -> None:
    """Nets of very different macs are stopped after the same multiply-adds."""
    config = study(hold="params", tolerance_pct=40.0, num_trials=30, rungs=[2.0])
    plan, simulation = unbroken(tmp_path / "a", config)
    macs = {net.variant: net.macs / plan.nets[0].macs for net in plan.nets}
    pruned = {trial.variant for trial in plan.trials if trial.pruned_at}
    epochs = {
        variant: count
        for variant, _, count in simulation.trained
        if variant in pruned and count < EPOCHS
    }
    assert len(set(epochs.values())) > 1, "the nets must differ in cost"
    for variant, count in epochs.items():
        # At the rung with the epoch in which it was passed, not with the one before.
        assert (count - 1) * macs[variant] < 2 <= count * macs[variant]


def test_a_share_of_the_pruned_is_trained_to_the_end(tmp_path: Path) -> None:
    """Audited nets run all their epochs and stay pruned for the sampler."""
    config = study(num_trials=25, audit_fraction=0.3, sampler="random")
    plan, simulation = unbroken(tmp_path / "a", config)
    epochs = {(variant, seed): count for variant, seed, count in simulation.trained}
    pruned = [trial for trial in plan.trials if trial.pruned_at]
    audited = [trial for trial in pruned if trial.is_audited]
    assert 0 < len(audited) < len(pruned)
    for trial in pruned:
        assert (epochs[trial.variant, 0] == EPOCHS) == trial.is_audited
    runs = open_runs(tmp_path / "a", name="hunt")
    nets = optuna.load_study(study_name="hunt (nets)", storage=runs._storage)
    states = [trial.state for trial in nets.get_trials()]
    assert states.count(TrialState.PRUNED) == len(pruned)


@pytest.mark.parametrize("name", ["asha", "seconds", "wilcoxon", "nsga2", "seeds"])
def test_kills_at_any_moment_change_nothing(name: str, tmp_path: Path) -> None:
    """A search killed again and again ends with the plan of an unbroken one.

    Nothing that has a run file is trained again, and no trial is left RUNNING.
    """
    config = CONFIGS[name]
    expected, _ = unbroken(tmp_path / "a", config)
    simulation = Simulation(tmp_path / "b", config)
    deaths = 0
    for step in range(1, 400):
        simulation.die_at = simulation.events + 1 + step % 13
        try:
            plan = simulation.run()
            break
        except Killed:
            deaths += 1
    assert deaths > 4
    assert plan == expected
    runs = open_runs(tmp_path / "b", name="hunt")
    nets = optuna.load_study(study_name="hunt (nets)", storage=runs._storage)
    assert all(trial.state.is_finished() for trial in nets.get_trials())
    assert len(nets.get_trials()) == len(plan.trials)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["asha", "wilcoxon", "nsga2"])
def test_kills_around_each_writing_of_the_plan_change_nothing(
    name: str, when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between Optuna's storage and the plan's file there is no gap to fall into."""
    config = CONFIGS[name]
    expected, _ = unbroken(tmp_path / "a", config)
    simulation = Simulation(tmp_path / "b", config)
    write: Callable[..., None] = records.write_plan
    calls = 0

    def dying_write(plan: Plan, folder: Path) -> None:
        nonlocal calls
        calls += 1
        if calls % 2 and when == "before":
            raise Killed
        write(plan, folder)
        if calls % 2 and when == "after":
            raise Killed

    monkeypatch.setattr(records, "write_plan", dying_write)
    for _ in range(200):
        try:
            plan = simulation.run()
            break
        except Killed:
            pass
    assert plan == expected
    cells = [(variant, seed) for variant, seed, _ in simulation.trained]
    assert len(set(cells)) == len(plan.cells)


def test_lost_storage_is_rebuilt_from_the_plan(tmp_path: Path) -> None:
    """Without its storage a finished search runs nothing again; a new one is made."""
    config = CONFIGS["asha"]
    plan, simulation = unbroken(tmp_path / "a", config)
    (tmp_path / "a" / storage.STORAGE_FILE).unlink()
    simulation.trained.clear()
    assert simulation.run() == plan
    assert simulation.trained == []
    runs = open_runs(tmp_path / "a", name="hunt")
    nets = optuna.load_study(study_name="hunt (nets)", storage=runs._storage)
    states = {trial.user_attrs["net"]: trial.state for trial in nets.get_trials()}
    for trial in plan.trials:
        pruned = trial.pruned_at is not None
        expected = TrialState.PRUNED if pruned else TrialState.COMPLETE
        assert states[plan.net(trial.variant).name] == expected


def test_a_search_goes_on_with_more_trials(tmp_path: Path) -> None:
    """More trials are added to a finished search; the first ones stay as they were."""
    simulation = Simulation(tmp_path / "a", study(num_trials=4))
    first = simulation.run()
    simulation.config = resolved(study(num_trials=9))
    more = simulation.run()
    assert more.trials[:4] == first.trials
    assert len(more.trials) == 9
    assert set(first.cells) <= set(more.cells)


def test_failed_nets_end_their_trials_and_are_not_chosen(tmp_path: Path) -> None:
    """A diverged run fails its net's trial; the search goes on."""
    simulation = Simulation(tmp_path / "a", study(pruner="none", num_trials=4))
    train = simulation.train
    failing: list[str] = []

    def diverging(cell: Cell, grower: SearchPlan) -> RunRecord:
        run = train(cell, grower)
        if cell.seed == 0 and len(failing) < 2:
            failing.append(cell.variant)
            return replace(run, state="diverged", reason="loss is nan")
        return run

    simulation.train = diverging  # type: ignore[method-assign]
    plan = simulation.run()
    fresh = simulation.config.confirm_seeds()
    confirmed = {cell.variant for cell in plan.cells if cell.seed in fresh}
    assert not confirmed & set(failing)
    assert len(plan.trials) == 4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"axes": ["image-size=8..16"]}, "image-size cannot vary"),
        ({"axes": ["widht=1..4"]}, "an axis is NAME=VALUES"),
        ({"num_trials": 10**6}, r"search.num_trials must be at most [\d,]+, as many"),
        ({"hold": "block_params"}, "counted within macs, params, activations"),
        ({"tolerance_pct": 1e-9, "axes": ["width=16"]}, "no net fits"),
    ],
)
def test_impossible_searches_are_refused(values: dict[str, Any], message: str) -> None:
    """What cannot be searched is one message, before anything runs."""
    config = resolved(study(**values))
    nets = plan_nets(study(), data=INFO, device="cpu").nets
    with pytest.raises(InputError, match=message):
        space_of(config, reference=nets[0])


def test_reference_itself_may_be_found(tmp_path: Path) -> None:
    """A net that the study file names has one record, whoever finds it."""
    config = study(
        axes=["cardinality=2", "stage-width=8..32*2"],
        num_trials=1,
        tolerance_pct=0.001,
        pruner="none",
    )
    plan, _ = unbroken(tmp_path / "a", config)
    names = [net.name for net in plan.nets]
    assert parse_spec(names[0]).setting == "2x8d"
    assert plan.trials[0].variant == plan.nets[0].variant
    assert len(set(names)) == len(names)


def test_a_finished_search_keeps_what_its_axes_explain(tmp_path: Path) -> None:
    """Once every net has ended, and not before, the importance is in a file."""
    config = study(pruner="none", num_trials=9)
    plan, simulation = unbroken(tmp_path, config)

    def grower(config: StudyConfig) -> SearchPlan:
        return SearchPlan(
            plan,
            named=simulation.named,
            config=resolved(config),
            folder=tmp_path,
            runs=open_runs(tmp_path, name="hunt"),
        )

    grower(study(pruner="none", num_trials=10)).write_importance()
    assert read_importance(tmp_path) is None
    grower(config).write_importance()
    found = read_importance(tmp_path)
    assert found is not None and found.num_nets == 9
    assert sum(found.shares.values()) == pytest.approx(1)
    (tmp_path / "importance.json").write_text("{}")
    with pytest.raises(InputError, match=r"importance\.json: damaged"):
        read_importance(tmp_path)


@pytest.mark.parametrize("name", ["asha", "seeds", "nsga2"])
def test_a_silent_storage_is_caught_up_with(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls fail before or after they were carried out: asked again, all comes right.

    Every trial ends, and no cell is planned twice.
    """
    draw = Random(0)
    num_silent = 0

    def unreliable(act: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **named: Any) -> Any:
            nonlocal num_silent
            chance = draw.random()
            if chance < 0.3:
                num_silent += 1
                raise StorageInternalError("no answer")
            answer = act(*arguments, **named)
            if chance < 0.6:
                num_silent += 1
                raise StorageInternalError("the answer was lost")
            return answer

        return called

    for act in ("ask", "report", "tell", "tell_stopped"):
        monkeypatch.setattr(sampling, act, unreliable(getattr(sampling, act)))

    class Patient(SearchPlan):
        """Calls as the scheduler does where its storage does not answer."""

        def next_cells(self) -> tuple[Cell, ...]:
            while True:
                with contextlib.suppress(StorageInternalError):
                    return super().next_cells()

        def stop_reason(self, cell: Cell, epochs: Any) -> str:
            with contextlib.suppress(StorageInternalError):
                return super().stop_reason(cell, epochs)
            return ""

        def settle(self, run: RunRecord) -> None:
            with contextlib.suppress(StorageInternalError):
                super().settle(run)

    monkeypatch.setitem(globals(), "SearchPlan", Patient)
    config = CONFIGS[name]
    plan, simulation = unbroken(tmp_path / "a", config)
    assert config.search is not None
    assert num_silent >= 5
    assert len(plan.trials) == config.search.num_trials
    cells = [(variant, seed) for variant, seed, _ in simulation.trained]
    assert len(set(cells)) == len(cells) == len(plan.cells)
    nets = open_runs(tmp_path / "a", name="hunt (nets)").get_trials(deepcopy=False)
    ended = [one.state for one in nets if has_net(one)]
    assert len(ended) == config.search.num_trials
    assert TrialState.RUNNING not in ended
