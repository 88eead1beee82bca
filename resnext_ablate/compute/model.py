"""The net of a spec as an `nn.Module`, built from the shapes that complexity sums.

State dicts carry torchvision's ResNet names, so weights load both ways. Nets that
torchvision lacks keep to them: `branches.N.` stands before the layers of a branch,
`norm` is the last batch norm of a pre-activation net, and the from-scratch net calls
its projection `identity_downsample`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from resnext_ablate.architecture.names import parse_spec
from resnext_ablate.architecture.shapes import BlockForm, Conv, Layout, Norm
from resnext_ablate.architecture.spec import InputError, ResNeXtSpec
from resnext_ablate.compute.blocks import ResidualBlock, convolution, norm
from resnext_ablate.compute.layers import GlobalAvgPool2d, Head, folded


class ResNeXt(nn.Module):
    """Stem, stages `layer1`, `layer2`, ..., global average pooling and head.

    Made by `build`, which draws the weights from a generator.

    Args:
        spec: the net.
        copies: so many nets of the spec side by side in one, see `together`.
    """

    def __init__(self, spec: ResNeXtSpec, *, copies: int = 1) -> None:
        super().__init__()
        self.spec = spec
        self.copies = copies
        # No weight depends on the image size: the smallest one will do.
        layout = spec.layout(spec.total_stride).times(copies)
        self.conv1, self.bn1 = convolution(layout.stem), norm(layout.stem_norm)
        self.maxpool = _max_pool(layout)
        for stage, blocks in groupby(layout.blocks, key=lambda block: block.stage):
            self.add_module(f"layer{stage}", nn.Sequential(*map(ResidualBlock, blocks)))
        # Pre-activation blocks leave the last sum without batch norm and ReLU.
        self.norm = None if layout.last_norm is None else norm(layout.last_norm)
        self.avgpool = GlobalAvgPool2d()
        self.fc = Head(layout.head.in_features, layout.head.out_features, copies=copies)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of a batch.

        Args:
            images: float (N, copies * C, H, W), sides of at least `spec.total_stride`
                pixels.

        Returns:
            Float (N, copies * num_classes), not normalised.
        """
        features = self.bn1.relu(self.conv1(images))
        features = self.maxpool(features)
        for stage in range(1, self.spec.num_stages + 1):
            features = self.get_submodule(f"layer{stage}")(features)
        if self.norm is not None:
            features = self.norm.relu(features)
        logits: Tensor = self.fc(torch.flatten(self.avgpool(features), 1))
        return logits


@dataclass(frozen=True, slots=True)
class FvcoreCount:
    """What fvcore counts for one image in eval mode; a multiply-add counts as 1."""

    conv_linear: int
    """Convolutions and the head: comparable with `Complexity.macs`."""
    total: int
    """With batch normalisation and average pooling, as fvcore's own total."""


def build(
    spec: ResNeXtSpec | str, *, generator: torch.Generator | None = None
) -> ResNeXt:
    """The net of a spec or of its name, on the CPU, in train mode.

    Convolutions start He normal by fan-out, batch normalisation at scale 1 and shift 0,
    the head uniform in 1 / sqrt(in_features) with bias 0, as in the paper's code.
    Block forms (a) and (b) take the weights drawn for (c), so that equal seeds give
    equal functions in all three. (The paper's code draws (b) branch by branch, which
    makes its branches sqrt(C) larger.)

    Args:
        spec: the net, or a name that `parse_spec` reads.
        generator: the CPU generator of every draw; None is torch's global one.

    Raises:
        InputError: the name does not parse.
    """
    spec = parse_spec(spec) if isinstance(spec, str) else spec
    model = with_tensors(replace(spec, block_form="c"), None)
    _initialise(model, generator)
    return convert_form(model, form=spec.block_form)


def convert_form(model: ResNeXt, *, form: BlockForm) -> ResNeXt:
    """The same function in another form of Fig. 3, with the weights in their places.

    Outputs agree up to rounding, in train mode as in eval mode, and the given net stays
    as it is. In form (a) one batch norm stands behind the sum of the branches.

    Args:
        model: the net, on any device.
        form: (a) sums C branches, (b) concatenates them before the last layer, (c) has
            grouped convolutions.
    """
    spec = replace(model.spec, block_form=form)
    tensors = _in_form(model.state_dict(), model.spec, spec)
    return with_tensors(spec, tensors).train(model.training)


def for_evaluation(model: ResNeXt) -> nn.Module:
    """The net in eval mode; with fused kernels a copy whose batch norms are folded."""
    if model.bn1.kernels == "torch":
        return model.eval()
    layout = model.spec.layout(model.spec.total_stride)
    return folded(model, layout.times(model.copies))


def load_weights(model: ResNeXt, state_dict: Mapping[str, Any]) -> None:
    """Copies weights and batch-norm statistics into the net, in torchvision's names.

    Nothing is copied unless all of it fits.

    Args:
        model: the net, on any device.
        state_dict: tensors by name, as `torchvision.models.resnet50().state_dict()`.

    Raises:
        InputError: names are missing or unknown, or shapes differ.
    """
    wanted = model.state_dict()
    missing = [
        name
        for name in wanted.keys() - state_dict.keys()
        if not name.endswith("num_batches_tracked")  # absent in old state dicts
    ]
    problems = [
        _listing("missing", missing),
        _listing("unexpected", list(state_dict.keys() - wanted.keys())),
        _listing("misshapen", _misshapen(wanted, state_dict)),
    ]
    if any(problems):
        raise InputError(
            f"state_dict must hold the tensors of {model.spec.name}, by torchvision's "
            f"names: {'; '.join(filter(None, problems))}."
        )
    model.load_state_dict({**wanted, **state_dict})


def measure_fvcore(spec: ResNeXtSpec, *, image_size: int) -> FvcoreCount:
    """Counts one forward pass of the built net with fvcore: CPU, batch of 1, eval mode.

    Takes 0.05 s for a small net, about 1 s for ResNet-50.

    Raises:
        InputError: the image is smaller than the net's total stride.
    """
    spec.layout(image_size)
    model = build(spec, generator=torch.Generator().manual_seed(0)).eval()
    images = torch.zeros(1, spec.in_channels, image_size, image_size)
    with torch.no_grad(), warnings.catch_warnings():
        # fvcore compiles and traces by torch.jit, which is deprecated.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        # Imported here because training imports this module and never counts.
        from fvcore.nn import FlopCountAnalysis

        analysis = FlopCountAnalysis(model, images)
        analysis.unsupported_ops_warnings(False)  # ReLU, additions, max-pool
        analysis.uncalled_modules_warnings(False)
        analysis.tracer_warnings("none")
        by_operator = analysis.by_operator()
    return FvcoreCount(
        conv_linear=int(by_operator["conv"] + by_operator["linear"]),
        total=int(sum(by_operator.values())),
    )


def with_tensors(
    spec: ResNeXtSpec, tensors: Mapping[str, Tensor] | None, *, copies: int = 1
) -> ResNeXt:
    """The net around given tensors; without, around uninitialised ones on the CPU."""
    with torch.device("meta"):  # torch's own initialisation draws globally
        model = ResNeXt(spec, copies=copies)
    if tensors is None:
        # Not `to_empty`, which imports half a second of torch on its first call.
        on_meta = model.state_dict().items()
        tensors = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in on_meta}
    model.load_state_dict(tensors, assign=True)
    return model


def _in_form(
    state_dict: Mapping[str, Tensor], spec: ResNeXtSpec, target: ResNeXtSpec
) -> dict[str, Tensor]:
    """Copies of a net's tensors under the names and in the shapes of another form."""
    moved = {name: tensor.clone() for name, tensor in state_dict.items()}
    old = spec.layout(spec.total_stride).blocks
    new = target.layout(target.total_stride).blocks
    for before, after in zip(old, new, strict=True):
        last = [step for step in before.steps if isinstance(step, Conv)][-1]
        for step, place in zip(before.steps, after.steps, strict=True):
            # A branch is a slice of the outputs, and in the last layer of the inputs.
            dim = 1 if step is last else 0
            for part in _PARTS[type(step)]:
                taken = [moved.pop(f"{path}.{part}") for path in step.paths]
                pieces = _split(taken, len(place.paths), dim=dim)
                for path, piece in zip(place.paths, pieces, strict=True):
                    moved[f"{path}.{part}"] = piece
    return moved


_PARTS: dict[type[Conv | Norm], tuple[str, ...]] = {
    Conv: ("weight",),
    Norm: ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"),
}


def _split(tensors: Sequence[Tensor], parts: int, *, dim: int) -> list[Tensor]:
    if tensors[0].ndim == 0:  # num_batches_tracked, the same in all branches
        return [tensors[0].clone() for _ in range(parts)]
    whole = torch.cat(list(tensors), dim=dim)
    return [piece.clone() for piece in whole.chunk(parts, dim=dim)]


def _max_pool(layout: Layout) -> nn.Module:
    if layout.has_max_pool:
        return nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
    return nn.Identity()


def _initialise(model: nn.Module, generator: torch.Generator | None) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(
                module.weight,
                mode="fan_out",
                nonlinearity="relu",
                generator=generator,
            )
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
        elif isinstance(module, nn.Linear):
            bound = 1 / math.sqrt(module.in_features)
            nn.init.uniform_(module.weight, -bound, bound, generator=generator)
            nn.init.zeros_(module.bias)


def _misshapen(
    wanted: Mapping[str, Tensor], state_dict: Mapping[str, Any]
) -> list[str]:
    problems = []
    for name in wanted.keys() & state_dict.keys():
        given, shape = state_dict[name], tuple(wanted[name].shape)
        if not isinstance(given, Tensor):
            problems.append(f"{name} (a {type(given).__name__}, must be a tensor)")
        elif tuple(given.shape) != shape:
            problems.append(f"{name} {tuple(given.shape)}, must be {shape}")
    return problems


def _listing(problem: str, names: Sequence[str]) -> str:
    """The count and the first names, or nothing when there are none."""
    if not names:
        return ""
    shown = sorted(names)[:3]
    more = ", ..." if len(names) > len(shown) else ""
    return f"{len(names)} {problem}: {', '.join(shown)}{more}"
