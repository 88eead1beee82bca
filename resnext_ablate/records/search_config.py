"""The `[search]` part of a study file: what is sampled, pruned and confirmed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from resnext_ablate.architecture.costs import Currency

Sampler = Literal["tpe", "gp", "qmc", "random", "nsga2"]
Pruner = Literal["asha", "hyperband", "median", "wilcoxon", "none"]
SecondAim = Literal["step_time", "activations", "params"]

RUNG_PRUNERS: tuple[Pruner, ...] = ("asha", "hyperband", "median")

# Options of each sampler and pruner with the values they get where none is given, so
# that the resolved study file pins them all.
_SAMPLER_OPTIONS: dict[str, dict[str, Any]] = {
    "tpe": {"startup_trials": 10, "multivariate": True, "constant_liar": True},
    "gp": {"startup_trials": 10},
    "qmc": {},
    "random": {},
    "nsga2": {"population_size": 16},
}
_PRUNER_OPTIONS: dict[str, dict[str, Any]] = {
    "asha": {"reduction_factor": 3},
    "hyperband": {"reduction_factor": 3},
    "median": {"prune_after_trials": 5},
    "wilcoxon": {"p_threshold": 0.1},
    "none": {},
}

_List = Field(strict=False)  # TOML has arrays, the config has tuples.


class SearchConfig(BaseModel):
    """Which nets are tried, which are stopped early, and how the best are confirmed.

    Every net tried costs what `net.reference` costs, within `net.tolerance_pct` of
    `net.hold`. A trial is one net, run with each of `run.seeds` in turn.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    axes: Annotated[tuple[str, ...], _List, Field(min_length=1)]
    """What varies, such as "stage-width=4..64/4" or "cardinality=1..32*2"."""
    num_trials: int = Field(ge=1)
    """Nets that are tried."""
    also_pct: dict[Currency, Annotated[float, Field(gt=0, le=100)]] = {}
    """Further currencies that are held, each with its tolerance in percent."""
    inner_multiple: int = Field(default=1, ge=1)
    """C d of every stage is a multiple of it; 8 suits tensor cores."""

    sampler: Sampler = "tpe"
    sampler_seed: int = Field(default=0, ge=0, lt=2**31)
    startup_trials: int | None = Field(default=None, ge=1)
    """tpe, gp: nets drawn at random before the sampler learns (10)."""
    multivariate: bool | None = None
    """tpe: models the axes together (true)."""
    constant_liar: bool | None = None
    """tpe: runs under way count as bad, so that executors spread out (true)."""
    population_size: int | None = Field(default=None, ge=2)
    """nsga2: nets of a generation (16)."""
    also_minimize: SecondAim | None = None
    """A second aim beside the error; step_time is measured, in ms per image."""

    pruner: Pruner = "asha"
    rungs: Annotated[tuple[float, ...], _List] = ()
    """Compute at which nets are compared and the worse ones stopped. (): by thirds
    from the end, as far as one epoch."""
    rung_unit: Literal["macs", "seconds"] = "macs"
    """macs: rungs count epochs of the reference, in its multiply-adds; a net of half
    the macs gets there in twice the epochs. seconds: of training, as measured."""
    reduction_factor: int | None = Field(default=None, ge=2, le=16)
    """asha, hyperband: the best one in so many passes a rung (3)."""
    prune_after_trials: int | None = Field(default=None, ge=1)
    """median: nets that end before any is stopped (5)."""
    p_threshold: float | None = Field(default=None, gt=0, lt=1)
    """wilcoxon: seeds stop where the best net is better by this p (0.1)."""
    audit_fraction: float = Field(default=0.05, ge=0, le=1)
    """Share of the pruned nets that is trained to the end all the same, drawn at
    random, to tell how often pruning stopped a good one."""

    confirm_top: int = Field(default=3, ge=1)
    """How many of the best nets run again with fresh seeds."""
    confirm_seeds: int = Field(default=5, ge=2, le=1000)
    """Fresh seeds of each, and of the nets they are compared with."""

    @model_validator(mode="before")
    @classmethod
    def _options_have_values(cls, values: object) -> object:
        if not isinstance(values, Mapping):
            return values
        sampler = _SAMPLER_OPTIONS.get(str(values.get("sampler", "tpe")), {})
        pruner = _PRUNER_OPTIONS.get(str(values.get("pruner", "asha")), {})
        return {**sampler, **pruner, **values}

    @model_validator(mode="after")
    def _options_are_used(self) -> Self:
        for kind, chosen, options in (
            ("sampler", self.sampler, _SAMPLER_OPTIONS),
            ("pruner", self.pruner, _PRUNER_OPTIONS),
        ):
            for owner, names in options.items():
                for name in names:
                    if getattr(self, name) is None or name in options[chosen]:
                        continue
                    raise ValueError(
                        f'{name} is an option of {kind} = "{owner}"; the {kind} is '
                        f'"{chosen}"'
                    )
        return self

    @model_validator(mode="after")
    def _aims_and_rungs_are_sound(self) -> Self:
        if self.sampler == "nsga2" and self.also_minimize is None:
            raise ValueError(
                'sampler = "nsga2" weighs two aims: also_minimize = "step_time"'
            )
        if self.also_minimize and self.sampler in ("gp", "qmc"):
            raise ValueError(
                f'also_minimize goes with sampler = "nsga2", "tpe" or "random", not '
                f'"{self.sampler}"'
            )
        if self.also_minimize and self.pruner != "none":
            raise ValueError('also_minimize needs pruner = "none": no net is worse yet')
        rungs = self.rungs
        if list(rungs) != sorted(set(rungs)) or any(rung <= 0 for rung in rungs):
            raise ValueError(f"rungs must rise from above 0, got {list(rungs)}")
        if self.pruner not in RUNG_PRUNERS and rungs:
            raise ValueError(f'pruner = "{self.pruner}" has no rungs')
        if self.pruner in RUNG_PRUNERS and self.rung_unit == "seconds" and not rungs:
            raise ValueError('rung_unit = "seconds" needs rungs = [...], in seconds')
        return self

    def check_runs(self, *, epochs: int, num_seeds: int) -> None:
        """Whether the pruner can do anything in runs of these epochs and seeds.

        Raises:
            ValueError: it cannot; the message names the nearest values that can.
        """
        if self.pruner in RUNG_PRUNERS and self.rung_unit == "macs":
            if self.rungs and self.rungs[-1] >= epochs:
                raise ValueError(
                    f"search.rungs must lie below train.epochs = {epochs}, got "
                    f"{list(self.rungs)}"
                )
            if not self.rungs and not self.default_rungs(epochs):
                raise ValueError(
                    f'search.pruner = "{self.pruner}" needs rungs, or train.epochs of '
                    f"{self.reduction_factor or 3} or more"
                )
        if self.p_threshold is not None:
            # n pairs give no p below 1 / 2^n, and behind the last none is saved.
            needed = math.floor(-math.log2(self.p_threshold)) + 2
            if num_seeds < needed:
                raise ValueError(
                    f"search.pruner: wilcoxon compares seeds; p_threshold = "
                    f"{self.p_threshold:g} needs run.seeds of {needed} or more"
                )

    def resolved(self, *, epochs: int) -> Self:
        """This part with its rungs settled, for runs of so many epochs."""
        if self.rungs or self.pruner not in RUNG_PRUNERS:
            return self
        return self.model_copy(update={"rungs": self.default_rungs(epochs)})

    def default_rungs(self, epochs: int) -> tuple[float, ...]:
        """Thirds of thirds of a run (by `reduction_factor`), at least one epoch each.

        Args:
            epochs: of a whole run.
        """
        factor = self.reduction_factor or 3
        rungs: list[float] = []
        rung = epochs // factor
        while rung >= 1:
            rungs.insert(0, float(rung))
            rung //= factor
        return tuple(rungs)
