"""Which nets a study trains: matched to the reference, labelled, and measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from resnext_ablate.architecture.matching import Hold, Match, Widths, certify, match
from resnext_ablate.architecture.shapes import Conv
from resnext_ablate.architecture.spec import ResNeXtSpec, spec_from_dict
from resnext_ablate.compute import benchmark, model
from resnext_ablate.compute.benchmark import Setup
from resnext_ablate.compute.measured import match_measured
from resnext_ablate.compute.preparation import DataInfo
from resnext_ablate.records.certificate import DeviceCosts
from resnext_ablate.records.config import StudyConfig
from resnext_ablate.records.records import NetRecord


@dataclass(frozen=True)
class PlannedNets:
    """The nets of a study, the reference first, and what they cost on its device."""

    nets: tuple[NetRecord, ...]
    costs: DeviceCosts | None
    """None where nothing was to be measured."""


def plan_nets(
    config: StudyConfig,
    *,
    data: DataInfo,
    device: str,
    known: Sequence[NetRecord] = (),
    known_costs: DeviceCosts | None = None,
) -> PlannedNets:
    """The nets of a study with their certificates.

    Args:
        config: the study, nothing in it `auto`.
        data: gives image size, channels and classes.
        device: where to measure, if that is asked for.
        known: records of earlier results. A net keeps its own, and a cardinality that
            was matched by measuring keeps its net.
        known_costs: what was measured for them; kept where it covers all nets.

    Raises:
        InputError: no width fits a cardinality, or the images are too small.
        MeasuringError: nets cannot be measured.
    """
    setup = measuring_setup(config, image_size=data.image_size, device=device)
    specs, costs = _specs(config, data=data, setup=setup, known=known)
    recorded = {net.name: net for net in known}
    nets = tuple(
        recorded.get(spec.name)
        or _net_record(
            certify(spec, reference=specs[0], image_size=data.image_size),
            label=label,
            is_reference=spec == specs[0],
        )
        for spec, label in zip(specs, _labels(specs), strict=True)
    )
    if config.net.measure or config.net.is_matched_by_measuring:
        if _covers(known_costs, nets):
            costs = known_costs
        elif not _covers(costs, nets):
            costs = benchmark.measure(specs, setup=setup)
    return PlannedNets(nets, costs)


def convolutions(config: StudyConfig, nets: Sequence[NetRecord]) -> list[Conv]:
    """Every convolution that a run of the study may have, of seeds fused and alone."""
    layouts = [spec_from_dict(net.spec).layout(net.image_size) for net in nets]
    return [
        conv
        for layout in layouts
        for count in config.run.fused_counts()
        for conv in layout.times(count).convs
    ]


def measuring_setup(config: StudyConfig, *, image_size: int, device: str) -> Setup:
    """Measuring as the study's runs train, on one of their devices."""
    part = {"batch_size": config.train.batch_size // config.run.devices_per_run}
    return Setup(
        train=config.train.model_copy(update=part),
        image_size=image_size,
        device=device,
        deterministic=config.run.deterministic,
    )


def found_net(spec: ResNeXtSpec, *, reference: NetRecord) -> NetRecord:
    """The record of a net that a search has found, beside its reference."""
    one = certify(
        spec,
        reference=spec_from_dict(reference.spec),
        image_size=reference.image_size,
    )
    return _net_record(one, label=spec.name, is_reference=False)


def _specs(
    config: StudyConfig,
    *,
    data: DataInfo,
    setup: Setup,
    known: Sequence[NetRecord],
) -> tuple[tuple[ResNeXtSpec, ...], DeviceCosts | None]:
    """The study's nets, the reference first; their costs where those gave widths."""
    net, costs = config.net, None

    def for_data(spec: ResNeXtSpec) -> ResNeXtSpec:
        return replace(spec, in_channels=data.in_channels, num_classes=data.num_classes)

    reference = for_data(net.reference_spec())
    template = for_data(net.template_spec())
    if not net.cardinality:
        found = tuple(map(for_data, net.variant_specs()))
    elif net.is_matched_by_measuring:
        # A cardinality that was matched before keeps its net: noise would move it.
        earlier = {spec.cardinality: spec for spec in map(_spec_of, known)}
        missing = [c for c in net.cardinality if c not in earlier]
        if missing:
            solved, costs = matched_by_measuring(
                template,
                cardinalities=missing,
                hold=net.hold,
                tolerance_pct=net.tolerance_pct,
                reference=reference,
                widths=net.widths,
                setup=setup,
            )
            earlier |= zip(missing, solved, strict=True)
        found = tuple(earlier[cardinality] for cardinality in net.cardinality)
    else:
        matches = match(
            template,
            cardinalities=net.cardinality,
            hold=net.hold,
            widths=net.widths,
            tolerance_pct=net.tolerance_pct,
            image_size=data.image_size,
            reference=reference,
        )
        found = tuple(one.spec for one in matches)
    others = tuple(spec for spec in found if spec != reference)
    return (reference, *others), costs


def matched_by_measuring(
    template: ResNeXtSpec,
    *,
    cardinalities: Sequence[int],
    hold: Hold,
    tolerance_pct: float,
    reference: ResNeXtSpec,
    widths: Widths,
    setup: Setup,
) -> tuple[tuple[ResNeXtSpec, ...], DeviceCosts]:
    """`measured.match_measured` with nets measured in processes of their own."""
    quick = replace(setup, seconds_per_net=1.0, min_repeats=5)
    return match_measured(
        template,
        cardinalities=cardinalities,
        hold=hold,
        tolerance_pct=tolerance_pct,
        image_size=setup.image_size,
        reference=reference,
        widths=widths,
        search=partial(benchmark.measure, setup=quick),
        confirm=partial(benchmark.measure, setup=setup),
    )


def _spec_of(net: NetRecord) -> ResNeXtSpec:
    return spec_from_dict(net.spec)


def _covers(costs: DeviceCosts | None, nets: Sequence[NetRecord]) -> bool:
    if costs is None:
        return False
    return {net.name for net in nets} <= {cost.name for cost in costs.nets}


def _labels(specs: Sequence[ResNeXtSpec]) -> tuple[str, ...]:
    """Settings such as `32x4d` where they tell the nets apart, else whole names."""
    shared = Counter(spec.setting for spec in specs)
    return tuple(
        spec.setting if shared[spec.setting] == 1 else spec.name for spec in specs
    )


def _net_record(one: Match, *, label: str, is_reference: bool) -> NetRecord:
    fvcore = model.measure_fvcore(one.spec, image_size=one.image_size)
    assert fvcore.conv_linear == one.complexity.macs, (one.spec.name, fvcore)
    return NetRecord(
        variant=label,
        name=one.spec.name,
        spec=one.spec.to_dict(),
        image_size=one.image_size,
        macs=one.complexity.macs,
        params=one.complexity.params,
        params_without_bn=one.complexity.params_without_bn,
        activations=one.complexity.activations,
        fvcore_macs=fvcore.conv_linear,
        fvcore_total=fvcore.total,
        macs_error_pct=one.macs_error_pct,
        params_error_pct=one.params_error_pct,
        activations_error_pct=one.activations_error_pct,
        is_reference=is_reference,
    )
