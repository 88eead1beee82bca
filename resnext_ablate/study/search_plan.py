"""The plan of a search, which grows: a net at a time, then the best ones once more.

What is decided, be it a net, a stop or a choice, is in the plan's file before anything
is done about it. So a search that was killed decides nothing twice, and what Optuna
holds can be brought in line with plan and run files at any time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import optuna
from optuna.trial import FrozenTrial, TrialState

from resnext_ablate.architecture.axes import space_around, windows_around
from resnext_ablate.architecture.spec import InputError, spec_from_dict
from resnext_ablate.records import records
from resnext_ablate.records.config import StudyConfig
from resnext_ablate.records.importance import write_importance
from resnext_ablate.records.outcomes import TrialOutcome, chosen, trial_outcomes
from resnext_ablate.records.records import (
    Cell,
    EpochRecord,
    NetRecord,
    Plan,
    RunRecord,
    Trial,
)
from resnext_ablate.records.rungs import Rungs, epochs_to_wait, errors_at
from resnext_ablate.records.search_config import SearchConfig
from resnext_ablate.study import sampling, variants
from resnext_ablate.study.search import SearchSpace, search_space

_LARGEST_TOLERANCE = 0.05
"""Share of a rung's compute that may be missing where a study's tolerance is wide."""


def space_of(config: StudyConfig, *, reference: NetRecord) -> SearchSpace:
    """The nets that a search may try.

    Args:
        config: a study with a `[search]` part.
        reference: the net whose cost they share, as made for the study's images.

    Raises:
        InputError: an axis or a currency is none, no net fits, or too few do.
    """
    search = _search_part(config)
    budget = spec_from_dict(reference.spec)
    template = replace(
        config.net.template_spec(),
        in_channels=budget.in_channels,
        num_classes=budget.num_classes,
    )
    if any(axis.startswith("image-size") for axis in search.axes):
        raise InputError(
            "search.axes: image-size cannot vary; a study's images have one size "
            "(data.image_size)."
        )
    held: dict[str, float] = {config.net.hold: config.net.tolerance_pct}
    held |= {str(currency): share for currency, share in search.also_pct.items()}
    space = search_space(
        space_around(
            template,
            image_size=reference.image_size,
            cardinalities=(),
            axes=search.axes,
            inner_multiple=search.inner_multiple,
        ),
        windows_around(
            budget,
            image_size=reference.image_size,
            within_pct=held,
        ),
    )
    if search.num_trials > space.feasible.count:
        raise InputError(
            f"search.num_trials must be at most {space.feasible.count:,}, as many nets "
            f"as fit; got {search.num_trials:,}."
        )
    return space


class SearchPlan:
    """Grows a search's plan and keeps its file and Optuna's trials up to date."""

    def __init__(
        self,
        plan: Plan,
        *,
        named: Sequence[str],
        config: StudyConfig,
        folder: Path,
        runs: optuna.Study,
    ) -> None:
        """Goes on with a plan.

        Args:
            plan: as far as it has grown; the reference stands first among its nets.
            named: variants that the study file names, to compare the best nets with.
            config: resolved; has a `[search]` part.
            folder: of the study.
            runs: Optuna's study of the runs.
        """
        self._plan = plan
        self._named = tuple(named)
        self._config = config
        self._search = _search_part(config)
        self._folder = folder
        self._seeds = config.run.seed_list()
        self._runs = {run.cell: run for run in records.read_runs(folder, plan)}
        self._reference = plan.nets[0]
        self._space = space_of(config, reference=self._reference)
        self._rungs = _rungs(config, reference=self._reference)
        self._new_cells: list[Cell] = []
        self._behind: list[int] = []  # trials with runs that are to be followed
        self._is_half_asked = False
        self._nets = sampling.open_nets(
            runs,
            name=config.name,
            config=self._search,
            num_rungs=len(self._rungs.compute),
        )
        sampling.drop_half_asked(self._nets)
        known = sampling.trials_by_number(self._nets)
        for trial in plan.trials:
            if trial.number not in known:
                net = plan.net(trial.variant)
                sampling.add_again(self._nets, trial=trial, net=net)
            self._follow(trial.number)

    @property
    def plan(self) -> Plan:
        return self._plan

    @property
    def num_to_come(self) -> int:
        """About how many runs are not in the plan yet: no net counts as stopped."""
        to_ask = max(0, self._search.num_trials - len(self._plan.trials))
        to_confirm = len(self._named) + self._search.confirm_top
        cells = self._plan.cells
        confirming = sum(cell.seed not in self._seeds for cell in cells)
        return to_ask * len(self._seeds) + max(
            0, to_confirm * self._search.confirm_seeds - confirming
        )

    def next_cells(self) -> tuple[Cell, ...]:
        """Adds to the plan what can start now; nothing where runs must end first."""
        self._catch_up()
        if self._new_cells:
            cells, self._new_cells = tuple(self._new_cells), []
            return cells
        if len(self._plan.trials) < self._search.num_trials:
            return (self._ask(),)
        outcomes = self._outcomes()
        if not all(one.is_ended for one in outcomes):
            return ()
        return self._confirm(outcomes)

    def wait_after(self, cell: Cell) -> tuple[int, ...]:
        """Epochs after which a run waits for word; the first seed's alone does."""
        trial = self._trial_of(cell.variant, cell.seed)
        if trial is None or cell.seed != self._seeds[0]:
            return ()
        return epochs_to_wait(
            self._rungs,
            relative_macs=self._relative_macs(trial),
            num_epochs=self._config.train.epochs,
        )

    def stop_reason(self, cell: Cell, epochs: Sequence[EpochRecord]) -> str:
        """Why a waiting run is to stop; empty where it goes on."""
        trial = self._trial_of(cell.variant, cell.seed)
        assert trial is not None
        trial = self._judge(trial, epochs)
        # A stop that was decided before the run was cut off comes where it came.
        place = len(self._errors_at_rungs(trial, epochs))
        if trial.pruned_at is None or trial.is_audited or place < trial.pruned_at:
            return ""
        return self._reason(trial)

    def settle(self, run: RunRecord) -> None:
        """Takes note of a finished run."""
        self._runs[run.cell] = run
        trial = self._trial_of(run.variant, run.seed)
        if trial is not None:
            self._behind.append(trial.number)
        self._catch_up()

    def _catch_up(self) -> None:
        while self._behind:
            self._follow(self._behind[0])
            del self._behind[0]

    def write_importance(self) -> None:
        """Keeps what each axis explains, once every net has ended."""
        whole = len(self._plan.trials) == self._search.num_trials
        if whole and all(one.is_ended for one in self._outcomes()):
            found = sampling.importance(self._nets)
            if found is not None:
                write_importance(found, self._folder)

    def _ask(self) -> Cell:
        number = len(self._plan.trials)
        if self._is_half_asked:
            sampling.drop_half_asked(self._nets)
        self._is_half_asked = True
        asked = sampling.ask(
            self._nets, config=self._search, space=self._space, number=number
        )
        name = asked.spec.name
        net = next((net for net in self._plan.nets if net.name == name), None)
        nets = self._plan.nets
        if net is None:
            net = variants.found_net(asked.spec, reference=self._reference)
            nets = (*nets, net)
        trial = Trial(number=number, variant=net.variant, params=asked.params)
        cell = _cell(net, self._seeds[0])
        self._write(
            nets=nets,
            trials=(*self._plan.trials, trial),
            cells=(*self._plan.cells, cell),
        )
        self._is_half_asked = False
        return cell

    def _confirm(self, outcomes: Sequence[TrialOutcome]) -> tuple[Cell, ...]:
        """The cells of the best nets and those beside them, with fresh seeds."""
        best = chosen(
            outcomes,
            count=self._search.confirm_top,
            also_minimize=self._search.also_minimize,
        )
        if not best:
            return ()
        nets = dict.fromkeys((*self._named, *(one.net.variant for one in best)))
        planned = {cell.id for cell in self._plan.cells}
        cells = tuple(
            cell
            for seed in self._config.confirm_seeds()
            for variant in nets
            if (cell := _cell(self._plan.net(variant), seed)).id not in planned
        )
        if cells:
            self._write(cells=(*self._plan.cells, *cells))
        return cells

    def _follow(self, number: int) -> None:
        """Brings a trial in line with its run files, and opens its next seed's cell."""
        trial = self._plan.trials[number]
        net = self._plan.net(trial.variant)
        errors = []
        for place, seed in enumerate(self._seeds):
            cell = _cell(net, seed)
            run = self._runs.get(cell.id)
            if run is None:
                if all(known.id != cell.id for known in self._plan.cells):
                    self._write(cells=(*self._plan.cells, cell))
                    self._new_cells.append(cell)
                return
            if run.state in records.FAILURES:
                self._stop(trial, state="failed", reason=run.reason)
                return
            if place == 0:
                trial = self._judge(trial, run.epochs, is_over=True)
            if run.state == "complete":
                errors.append(run.epochs[-1].val_error_pct)
                trial = self._compare_seeds(trial, errors)
            if trial.pruned_at is not None:
                self._stop(trial, state="pruned", reason=self._reason(trial))
                if not trial.is_audited:
                    return
        self._complete(trial)

    def _judge(
        self, trial: Trial, epochs: Sequence[EpochRecord], *, is_over: bool = False
    ) -> Trial:
        """Tells the pruner of rungs that a first seed's run has newly passed.

        A run that is over is not stopped any more; others are still held against it.
        """
        for place, error in enumerate(self._errors_at_rungs(trial, epochs)):
            wants_stop = self._report(trial, place=place, error=error)
            if wants_stop and not is_over:
                trial = self._prune(trial, at=place + 1)
        return trial

    def _compare_seeds(self, trial: Trial, errors: Sequence[float]) -> Trial:
        """Lets the Wilcoxon pruner compare a net with the best one seed by seed."""
        if self._search.pruner != "wilcoxon":
            return trial
        place = len(errors) - 1
        wants_stop = self._report(trial, place=place, error=errors[-1])
        if wants_stop and len(errors) < len(self._seeds):
            return self._prune(trial, at=len(errors))
        return trial

    def _report(self, trial: Trial, *, place: int, error: float) -> bool:
        """Whether the pruner would stop a net here; no more where it has ended."""
        own = self._live(trial)
        if own is None:
            return False
        step = sampling.step_of(self._search, place=place)
        return sampling.report(self._nets, trial=own, step=step, value=error)

    def _prune(self, trial: Trial, *, at: int) -> Trial:
        draw = Random(f"{self._search.sampler_seed} {trial.number}").random()
        is_audited = draw < self._search.audit_fraction
        pruned = replace(trial, pruned_at=at, is_audited=is_audited)
        trials = list(self._plan.trials)
        trials[trial.number] = pruned
        self._write(trials=tuple(trials))
        self._stop(pruned, state="pruned", reason=self._reason(pruned))
        return pruned

    def _reason(self, trial: Trial) -> str:
        place = trial.pruned_at
        assert place is not None
        if self._search.pruner == "wilcoxon":
            return f"pruned by wilcoxon after {place} of {len(self._seeds)} seeds"
        unit = "reference epochs" if self._rungs.unit == "macs" else "s of training"
        return (
            f"pruned by {self._search.pruner} at rung {place} of "
            f"{len(self._rungs.compute)}: {self._rungs.compute[place - 1]:g} {unit}"
        )

    def _stop(self, trial: Trial, *, state: sampling.Stopped, reason: str) -> None:
        own = self._live(trial)
        if own is not None:
            sampling.tell_stopped(self._nets, trial=own, state=state, reason=reason)

    def _complete(self, trial: Trial) -> None:
        own = self._live(trial)
        if own is None:
            return
        outcome = self._outcomes()[trial.number]
        assert outcome.val_error_pct is not None
        values = [outcome.val_error_pct]
        if self._search.also_minimize:
            values.append(outcome.second(self._search.also_minimize))
        sampling.tell(self._nets, trial=own, values=values)

    def _live(self, trial: Trial) -> FrozenTrial | None:
        """Optuna's trial of a net as long as nothing has ended it."""
        own = sampling.trials_by_number(self._nets)[trial.number]
        return own if own.state == TrialState.RUNNING else None

    def _outcomes(self) -> tuple[TrialOutcome, ...]:
        return trial_outcomes(self._plan, tuple(self._runs.values()), seeds=self._seeds)

    def _trial_of(self, variant: str, seed: int) -> Trial | None:
        """The trial that a run belongs to; None for one that confirms."""
        if seed not in self._seeds:
            return None
        return next(one for one in self._plan.trials if one.variant == variant)

    def _errors_at_rungs(
        self, trial: Trial, epochs: Sequence[EpochRecord]
    ) -> tuple[float, ...]:
        return errors_at(self._rungs, epochs, relative_macs=self._relative_macs(trial))

    def _relative_macs(self, trial: Trial) -> float:
        return self._plan.net(trial.variant).macs / self._reference.macs

    def _write(
        self,
        *,
        nets: tuple[NetRecord, ...] | None = None,
        trials: tuple[Trial, ...] | None = None,
        cells: tuple[Cell, ...] | None = None,
    ) -> None:
        """Puts what has grown into the plan's file."""
        plan = self._plan
        self._plan = replace(
            plan,
            nets=plan.nets if nets is None else nets,
            trials=plan.trials if trials is None else trials,
            cells=plan.cells if cells is None else cells,
        )
        records.write_plan(self._plan, self._folder)


def _search_part(config: StudyConfig) -> SearchConfig:
    assert config.search is not None, "the study is a search"
    return config.search


def _cell(net: NetRecord, seed: int) -> Cell:
    spec = spec_from_dict(net.spec)
    return Cell(records.cell_id(spec, seed), net.variant, seed)


def _rungs(config: StudyConfig, *, reference: NetRecord) -> Rungs:
    search = _search_part(config)
    held = {config.net.hold, *search.also_pct}
    share = config.net.tolerance_pct / 100 if "macs" in held else 0.0
    num_classes = spec_from_dict(reference.spec).num_classes
    return Rungs(
        compute=search.rungs,
        unit=search.rung_unit,
        tolerance=min(share, _LARGEST_TOLERANCE) if search.rung_unit == "macs" else 0.0,
        guess_error_pct=100 * (1 - 1 / num_classes),
    )
