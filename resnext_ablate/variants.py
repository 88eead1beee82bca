"""Which nets a study trains: matched to the reference, labelled, and measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from resnext_ablate import model
from resnext_ablate.config import StudyConfig
from resnext_ablate.data import DataInfo
from resnext_ablate.matching import Match, certify, match
from resnext_ablate.records import NetRecord
from resnext_ablate.spec import ResNeXtSpec


def plan_nets(
    config: StudyConfig, *, data: DataInfo, known: Sequence[NetRecord]
) -> tuple[NetRecord, ...]:
    """The nets of a study with their certificates, the reference first.

    Args:
        config: the study.
        data: gives image size, channels and classes.
        known: records of earlier results; a net keeps its own.

    Raises:
        InputError: no width fits a cardinality, or the images are too small.
    """
    matches = _matches(config, data=data)
    recorded = {net.name: net for net in known}
    labels = _labels([one.spec for one in matches])
    return tuple(
        recorded.get(one.spec.name)
        or _net_record(one, label=label, is_reference=one is matches[0])
        for one, label in zip(matches, labels, strict=True)
    )


def _matches(config: StudyConfig, *, data: DataInfo) -> tuple[Match, ...]:
    """The study's nets beside their reference, which comes first."""
    net = config.net

    def for_data(spec: ResNeXtSpec) -> ResNeXtSpec:
        return replace(spec, in_channels=data.in_channels, num_classes=data.num_classes)

    reference = for_data(net.reference_spec())
    if net.cardinality:
        found = match(
            for_data(net.template_spec()),
            cardinalities=net.cardinality,
            hold=net.hold,
            widths=net.widths,
            tolerance_pct=net.tolerance_pct,
            image_size=data.image_size,
            reference=reference,
        )
    else:
        found = tuple(
            certify(for_data(spec), reference=reference, image_size=data.image_size)
            for spec in net.variant_specs()
        )
    own = certify(reference, reference=reference, image_size=data.image_size)
    return (own, *(one for one in found if one.spec != reference))


def _labels(specs: list[ResNeXtSpec]) -> tuple[str, ...]:
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
