"""The study file: TOML in, one frozen `StudyConfig` out.

TOML because a study is data: one from a stranger runs no code. Unknown keys are
refused, and every error names file, line, key, rule and the nearest valid key.
"""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from resnext_ablate.architecture.matching import MEASURED, Hold, Widths
from resnext_ablate.architecture.names import parse_setting, parse_spec
from resnext_ablate.architecture.spec import InputError, ResNeXtSpec
from resnext_ablate.records import complaints, study_file
from resnext_ablate.records.data_config import DataConfig
from resnext_ablate.records.search_config import SearchConfig

ConvForm = Annotated[
    str,
    Field(
        pattern=r"^(plain|matmul|direct|nchw|triton|((nchw|triton)\+)?merge[1-9][0-9]*)$"
    ),
]
_List = Field(strict=False)  # TOML has arrays, the config has tuples.


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class NetConfig(_Part):
    """Which variants: cardinalities matched to a reference, or a list of nets.

    In a search these are the nets that the best ones found are compared with.
    """

    template: str
    """Name of the net that gives depth, template width and stem."""
    reference: str | None = None
    """Setting that all are matched to and compared with; None: the template's own."""
    cardinality: Annotated[tuple[int, ...], _List] = ()
    """Cardinalities; the width of each is solved."""
    variants: Annotated[tuple[str, ...], _List] = ()
    """In place of `cardinality`: settings such as "2x20d", or whole names."""
    hold: Hold = "macs"
    """What is held equal; step time and peak memory are measured on the device."""
    widths: Widths = "doubling"
    """Whether widths double by stage; free or auto reach tolerances below 1 %."""
    tolerance_pct: float = Field(default=5.0, gt=0, le=100)
    """Largest difference from the reference, in percent of what is held."""

    measure: bool = False
    """Measure step time and peak memory of each variant before the runs: they join its
    certificate. Nets that are matched by measuring are measured in any case."""

    @field_validator("template")
    @classmethod
    def _template_is_a_net(cls, value: str) -> str:
        parse_spec(value)
        return value

    @model_validator(mode="after")
    def _nets_are_sound(self) -> Self:
        if self.cardinality and self.variants:
            raise ValueError(
                "needs either cardinality = [1, 2, ...] or variants = [...], not both"
            )
        if len(set(self.cardinality)) < len(self.cardinality):
            raise ValueError("cardinality names a value twice")
        if any(cardinality < 1 for cardinality in self.cardinality):
            raise ValueError("cardinality must be at least 1 everywhere")
        if self.is_matched_by_measuring and not self.cardinality:
            raise ValueError(
                f"hold = {self.hold!r} solves widths: name cardinalities, not variants"
            )
        names = [spec.name for spec in self.variant_specs()]
        if len(set(names)) < len(names):
            raise ValueError("variants names a net twice")
        self.reference_spec()
        return self

    @property
    def is_matched_by_measuring(self) -> bool:
        """Whether only a device can tell what is held."""
        return self.hold in MEASURED

    def template_spec(self) -> ResNeXtSpec:
        return parse_spec(self.template)

    def reference_spec(self) -> ResNeXtSpec:
        """The net that every variant is matched to and compared with."""
        template = self.template_spec()
        if self.reference is None:
            return template
        cardinality, widths = parse_setting(self.reference)
        return template.with_setting(cardinality, *widths)

    def variant_specs(self) -> tuple[ResNeXtSpec, ...]:
        """The nets of `variants`; empty where `cardinality` is given."""
        template = self.template_spec()
        specs = []
        for variant in self.variants:
            if re.match(r"\d", variant):
                cardinality, widths = parse_setting(variant)
                specs.append(template.with_setting(cardinality, *widths))
            else:
                specs.append(parse_spec(variant))
        return tuple(specs)


class TrainConfig(_Part):
    """How one run trains. Defaults: the paper's CIFAR recipe (Sec. 5.3)."""

    epochs: int = Field(ge=1)
    batch_size: int = Field(default=128, ge=2)
    learning_rate: float = Field(default=0.1, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    nesterov: bool = True
    weight_decay: float = Field(default=5e-4, ge=0)
    decay_norm_and_bias: bool = True
    """Decay batch normalisation and biases too, as the paper's code does."""
    schedule: Literal["step", "cosine", "one_cycle"] = "step"
    step_milestones: Annotated[tuple[float, ...], _List] = (0.5, 0.75)
    """Where the step schedule drops, as fractions of the epochs (150, 225 of 300)."""
    step_factor: float = Field(default=0.1, gt=0, le=1)
    """What the learning rate is multiplied with at each drop."""
    warmup_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Share of the epochs in which the rate first rises in a straight line."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 where a short timed probe finds it faster."""
    channels_last: bool = True
    kernels: Literal["auto", "torch", "fused"] = "auto"
    """fused takes batch norm, ReLU and the addition in one pass; auto: on a CPU,
    and on CUDA where a short timed probe finds it faster."""
    conv_forms: Literal["auto"] | dict[str, ConvForm] = "auto"
    """By shape, the exact form in which a convolution is computed. Shapes left out are
    timed when a study begins, which keeps the fastest here; {}: torch's own for all."""

    @model_validator(mode="after")
    def _schedule_is_sound(self) -> Self:
        marks = self.step_milestones
        if list(marks) != sorted(marks) or not all(0 < mark < 1 for mark in marks):
            raise ValueError(
                "step_milestones must rise and lie between 0 and 1, got "
                f"{list(marks)}; the paper's are [0.5, 0.75]"
            )
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov = true needs momentum above 0")
        return self


class RunConfig(_Part):
    """How the runs of a study execute."""

    seeds: Literal["adaptive"] | int | Annotated[tuple[int, ...], _List] = 3
    """How many seeds (0, 1, ...), or the list of them. adaptive: 3 of each variant,
    then further ones where a comparison is open, up to `max_seeds`."""
    max_seeds: int | None = Field(default=None, ge=4, le=100)
    """With adaptive seeds, how many a variant gets at most (10 if not given)."""
    executors: Literal["auto"] | Annotated[int, Field(ge=1, le=1024)] = "auto"
    """Child processes that train; auto: one per core, or `runs_per_device` per GPU."""
    runs_per_device: int = Field(default=1, ge=1, le=64)
    """Runs that share a GPU side by side, where `executors` is auto, and on Ray."""
    engine: Literal["local", "ray", "slurm"] = "local"
    """Where executors are: on this machine, on a Ray cluster, in Slurm jobs."""
    ray_address: str | None = None
    """Of the cluster, HOST:PORT or "auto"; None: one is started on this machine."""
    slurm_cluster: Literal["slurm", "local"] = "slurm"
    """local: jobs are processes of this machine, to try a study out."""
    slurm_timeout_min: int = Field(default=240, ge=1)
    """Minutes of a job; then it saves its run and queues again."""
    slurm_options: dict[str, str | int] = {}
    """Further options of sbatch, such as { partition = "gpu", account = "lab" }."""
    devices_per_run: int = Field(default=1, ge=1, le=64)
    """Devices, or processes on a CPU, that train each run together by torchrun, each a
    part of every batch, which batch normalisation sees alone."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    deterministic: bool = True
    """The same seed gives the same numbers on the same hardware."""
    fuse_seeds: int = Field(default=1, ge=1, le=64)
    """How many seeds of a variant are trained as one net with as many times the groups.
    Each is the run that it would be alone, up to rounding, in less time where batches
    and nets are small; after a fault they go on one by one."""
    max_attempts: int = Field(default=3, ge=1)
    """How often a run is tried that ends for the same cause: its executor dies, hangs
    or is terminated, or memory runs out (each time in half as large micro-batches)."""
    checkpoint_every_s: float = Field(default=60.0, gt=0)
    """Seconds after which a run is saved in mid-epoch; epochs' ends come sooner."""
    lease_s: float = Field(default=300.0, gt=0)
    """Seconds without a step after which an executor counts as hung and is killed."""
    storage: str = "sqlite"
    """Where Optuna's trials go: a file in the results, or a database by its URL,
    postgresql://USER@HOST:PORT/DATABASE. Its password comes from PGPASSWORD or from
    ~/.pgpass, and never from here."""

    sinks: Annotated[tuple[Literal["tensorboard", "wandb", "mlflow"], ...], _List] = ()
    """Trackers fed with each epoch: event files, offline runs or a database in the
    results, unless WANDB_MODE or MLFLOW_TRACKING_URI says otherwise."""

    @model_validator(mode="before")
    @classmethod
    def _adaptive_seeds_have_an_end(cls, values: object) -> object:
        if isinstance(values, dict) and values.get("seeds") == "adaptive":
            return {"max_seeds": 10, **values}
        return values

    @model_validator(mode="after")
    def _most_seeds_are_of_adaptive_ones(self) -> Self:
        if self.max_seeds is not None and self.seeds != "adaptive":
            raise ValueError('max_seeds needs seeds = "adaptive"')
        return self

    @model_validator(mode="after")
    def _engine_has_what_it_needs(self) -> Self:
        if self.engine != "local" and self.executors == "auto":
            raise ValueError(
                f'engine = "{self.engine}" needs executors = N: those without room wait'
            )
        if self.engine == "slurm" and self.fuse_seeds > 1:
            raise ValueError(
                'fuse_seeds needs engine = "local" or "ray": a Slurm job hands back '
                "one run at a time; set fuse_seeds = 1"
            )
        if self.devices_per_run > 1 and max(self.runs_per_device, self.fuse_seeds) > 1:
            raise ValueError(
                "devices_per_run excludes runs_per_device and fuse_seeds above 1"
            )
        if self.ray_address is not None and self.engine != "ray":
            raise ValueError('ray_address needs engine = "ray"')
        of_slurm = self.slurm_cluster != "slurm" or self.slurm_options
        if of_slurm and self.engine != "slurm":
            raise ValueError('slurm_cluster and slurm_options need engine = "slurm"')
        return self

    @field_validator("storage")
    @classmethod
    def _storage_is_known_and_holds_no_secret(cls, value: str) -> str:
        url = urllib.parse.urlsplit(value)
        if value != "sqlite" and (url.scheme != "postgresql" or not url.hostname):
            raise ValueError(
                'must be "sqlite" or "postgresql://USER@HOST:PORT/DATABASE"'
            )
        if url.password is not None or "password" in url.query.lower():
            # The study file is copied into the results, the command line too.
            raise ValueError(
                "must not hold a password: set it in PGPASSWORD or in ~/.pgpass"
            )
        return value

    @field_validator("seeds", mode="before")
    @classmethod
    def _seeds_are_sound(cls, value: object) -> object:
        if value == "adaptive":
            return value
        if isinstance(value, (list, tuple)):
            seeds = list(value)
        elif isinstance(value, int) and 1 <= value <= 10_000:
            seeds = list(range(value))
        else:
            raise ValueError(
                'must be a number of seeds from 1 to 10000, a list, or "adaptive", '
                f"got {value!r}"
            )
        if not all(type(seed) is int and 0 <= seed < 2**31 for seed in seeds):
            raise ValueError(f"each seed must lie in 0 .. 2**31 - 1, got {value!r}")
        if not seeds or len(set(seeds)) < len(seeds):
            raise ValueError(f"must name at least one seed, none twice, got {value!r}")
        return value

    def seed_list(self) -> tuple[int, ...]:
        """The seeds of every variant; of adaptive ones all that it may get."""
        if self.seeds == "adaptive":
            assert self.max_seeds is not None
            return tuple(range(self.max_seeds))
        return tuple(range(self.seeds)) if isinstance(self.seeds, int) else self.seeds

    def fused_counts(self) -> tuple[int, ...]:
        """How many seeds are one net: 1 after a fault, all, and what is left of all."""
        count = len(self.seed_list())
        fused = min(count, self.fuse_seeds)
        return tuple(sorted({1, fused, count % fused or 1}))


class ReportConfig(_Part):
    """What the report adds to the results."""

    paper: str | None = None
    """Rows of the paper set beside ours, as "table3/ResNet-50"."""
    equivalence_margin_pct: float = Field(default=0.5, gt=0)
    """Differences of the test error within this many points count as none."""
    family: Literal["reference", "pairs"] = "reference"
    """Which variants are compared: each with the reference, or each with each."""
    pairing: Literal["auto", "paired", "unpaired"] = "auto"
    """Whether runs are paired by seed; auto: where the residuals show common shifts."""


class StudyConfig(_Part):
    """A study file, parsed and checked."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    """Also the folder below results/: letters, digits, dot, dash, underscore."""
    question: str = ""
    kind: Literal["ablation", "search"] = "ablation"
    """ablation: the nets of [net], each with each seed. search: nets are sampled, and
    the best are compared with those of [net]."""
    net: NetConfig
    search: SearchConfig | None = None
    data: DataConfig
    train: TrainConfig
    run: RunConfig = RunConfig()
    report: ReportConfig = ReportConfig()

    @model_validator(mode="after")
    def _batch_divides_by_devices(self) -> Self:
        devices, size = self.run.devices_per_run, self.train.batch_size
        if size % devices or size < 2 * devices:
            raise ValueError(
                f"run.devices_per_run = {devices} must divide train.batch_size = "
                f"{size}, and leave each device 2 images or more"
            )
        return self

    @model_validator(mode="after")
    def _kind_has_its_part(self) -> Self:
        if self.kind == "search":
            if self.run.fuse_seeds > 1:
                raise ValueError(
                    'run.fuse_seeds needs kind = "ablation": a search tries the seeds '
                    "of a net in turn; set run.fuse_seeds = 1"
                )
            if self.search is None:
                raise ValueError('kind = "search" needs a [search] part with its axes')
            if self.run.seeds == "adaptive":
                raise ValueError('run.seeds = "adaptive" needs kind = "ablation"')
            self.search.check_runs(
                epochs=self.train.epochs, num_seeds=len(self.run.seed_list())
            )
        elif self.search:
            raise ValueError('[search] needs kind = "search"')
        elif not self.net.cardinality and not self.net.variants:
            raise ValueError(
                "net: needs either cardinality = [1, 2, ...] or variants = [...]"
            )
        return self

    def confirm_seeds(self) -> tuple[int, ...]:
        """The fresh seeds that a search confirms its best nets with."""
        if self.search is None:
            return ()
        first = max(self.run.seed_list()) + 1
        return tuple(range(first, first + self.search.confirm_seeds))

    def to_toml(self) -> str:
        """This config as a study file; reading it gives this config again."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))


def load_study(
    path: Path, *, overrides: Sequence[str] = (), profile: str | None = None
) -> StudyConfig:
    """Reads and checks a study file.

    Args:
        path: the TOML file.
        overrides: `key=value` texts such as `train.epochs=2`. The value is parsed as
            TOML, and a bare word is a string.
        profile: which of the file's profiles is laid over it, below the overrides.

    Raises:
        InputError: the file cannot be read, is not TOML, or breaks a rule. All broken
            rules are named, each with its line and key.
    """
    found = study_file.read(path, profile=profile, overrides=overrides)
    messages = [
        f"{found.place_in(name, key)}: {message}"
        for name, values in found.profiles.items()
        for key, message in complaints.unknown_keys(values, model=StudyConfig).items()
    ]
    if messages:
        raise InputError("\n".join(messages))
    try:
        return StudyConfig.model_validate(found.values)
    except ValidationError as error:
        told = complaints.describe(error, model=StudyConfig)
        raise InputError(
            "\n".join(f"{found.place_of(key)}: {told[key]}" for key in told)
        ) from None


def json_schema() -> dict[str, Any]:
    """The JSON schema of a study file, for editors."""
    schema = study_file.with_profiles(StudyConfig.model_json_schema())
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def differences(
    old: StudyConfig, new: StudyConfig, *, may_change: Sequence[str]
) -> tuple[str, ...]:
    """The keys whose values differ, each as `key: old -> new`.

    Keys in `may_change`, and those below them, are passed over.
    """
    before, after = (
        dict(study_file.flat(c.model_dump(mode="json"))) for c in (old, new)
    )
    return tuple(
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted({*before, *after})
        if before.get(key) != after.get(key)
        and not any(study_file.covers(free, key) for free in may_change)
    )
