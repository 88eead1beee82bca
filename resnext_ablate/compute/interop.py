"""Nets in and out of files: weights by name, state dict, torch.export and ONNX.

Weights are read without running any code of the file. What is exported is read back
and must give the outputs of the net.
"""

from __future__ import annotations

import json
import math
import struct
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resnext_ablate.architecture.spec import (
    InputError,
    MissingExtraError,
    ResNeXtSpec,
    spec_from_dict,
)
from resnext_ablate.compute.model import ResNeXt, build, load_weights

LARGEST_DIFFERENCE = 1e-4
"""Of an exported net's logits, as a share of the largest logit."""

_WRAPPERS = ("state_dict", "model")  # of training checkpoints
_PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel, torch.compile
_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
}


class ExportError(RuntimeError):
    """An exported net did not give the outputs of the net it was made of."""


@dataclass(frozen=True, slots=True)
class WeightFile:
    """What a weight file holds."""

    state_dict: dict[str, Any]
    """Tensors by name, on the CPU; not yet held against a net."""
    spec: ResNeXtSpec | None
    """The net they belong to, where the file says so: those of `export_net` do."""


@dataclass(frozen=True, slots=True)
class Exported:
    """A written file and how its net compares with the one it was made of."""

    path: Path
    num_bytes: int
    image_size: int
    largest_difference: float
    """Between the logits of both, on random images."""
    largest_logit: float


def read_weights(path: Path) -> WeightFile:
    """Reads a file of torch.save or a safetensors file, running no code of it.

    Checkpoints that keep the weights under `state_dict` or `model`, and names with the
    prefixes of wrapping modules, are taken as well.

    Raises:
        InputError: the file cannot be read, is damaged, or holds no tensors by name.
    """
    read = _read_safetensors if path.suffix == ".safetensors" else _read_torch
    try:
        content = read(path)
    except OSError as error:
        raise InputError(f"weights {path}: cannot be read: {error.strerror}.") from None
    # Damaged bytes make the readers fail with errors of every kind.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"weights {path}: no sound file of tensors, or one that would run code; "
            f"write it by torch.save(net.state_dict(), file). The reader says: "
            f"{reason[:200]}"
        ) from None
    spec = content.get("spec") if isinstance(content, Mapping) else None
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not _holds_tensors(content):
        raise InputError(
            f"weights {path}: must hold tensors by name, got {_kind(content)}."
        )
    return WeightFile(
        state_dict=_without_prefixes(dict(content)),
        spec=None if spec is None else _spec_of(spec, path),
    )


def load_net(path: Path, *, spec: ResNeXtSpec | None = None) -> ResNeXt:
    """The net of a weight file, on the CPU, in train mode.

    Args:
        path: weights in torchvision's names (timm's are the same), or a file of
            `export_net`.
        spec: the net; None takes the one that the file names.

    Raises:
        InputError: the file is unsound, names no net, or does not fit; the message
            then names the tensors and their shapes.
    """
    file = read_weights(path)
    spec = file.spec if spec is None else spec
    if spec is None:
        raise InputError(f"weights {path}: the file names no net, so give its spec.")
    model = drawn_net(spec, seed=0)
    try:
        load_weights(model, file.state_dict)
    except InputError as error:
        raise InputError(f"weights {path}: {error}") from None
    return model


def drawn_net(spec: ResNeXtSpec, *, seed: int) -> ResNeXt:
    """The net with freshly drawn weights."""
    return build(spec, generator=torch.Generator().manual_seed(seed))


def export_net(model: ResNeXt, *, path: Path, format: str, image_size: int) -> Exported:
    """Writes spec and weights, or the traced net, and reads them back to compare.

    Args:
        model: the net, on the CPU; exported in eval mode and left as it was.
        path: the file to write; it is whole or absent, and replaced where it exists.
        format: `state_dict` holds spec and weights, for `load_net`; `torch_export` and
            `onnx` hold the net for square images of this size in batches of any size.
        image_size: side of the images, pixels.

    Raises:
        InputError: unknown format, the image is too small, or the file cannot be
            written.
        MissingExtraError: ONNX's packages are not installed.
        ExportError: the outputs of the file differ; nothing is written.
    """
    if format not in _FORMATS:
        raise InputError(
            f"format must be one of {', '.join(_FORMATS)}; got {format!r}."
        )
    model.spec.layout(image_size)
    write, read = _FORMATS[format]
    if format == "onnx":
        _require_onnx()
    was_training = model.training
    model.eval()
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export") as folder:
            # torch.export asks for its own ending.
            part = Path(folder) / "net.pt2"
            with torch.no_grad():
                write(model, part, image_size)
                difference, logit = _compare(model, read(part), image_size)
            size = part.stat().st_size
            part.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}.") from None
    finally:
        model.train(was_training)
    return Exported(path, size, image_size, difference, logit)


def _compare(
    model: ResNeXt, exported: Callable[[Tensor], Tensor], image_size: int
) -> tuple[float, float]:
    """Largest difference and largest logit; raises where they are too far apart."""
    # Another batch size than that of tracing, which must not have been baked in.
    images = _images(model.spec, image_size, num=3)
    expected, actual = model(images), exported(images)
    if actual.shape != expected.shape:
        raise ExportError(
            f"the exported net gives logits {tuple(actual.shape)}, must be "
            f"{tuple(expected.shape)}."
        )
    difference = (actual - expected).abs().max().item()
    logit = expected.abs().max().item()
    if not difference <= LARGEST_DIFFERENCE * logit:  # so that nan fails as well
        raise ExportError(
            f"the exported net's logits differ by {difference:.3g}, with a largest "
            f"logit of {logit:.3g}."
        )
    return difference, logit


def _images(spec: ResNeXtSpec, image_size: int, *, num: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (num, spec.in_channels, image_size, image_size)
    return torch.randn(shape, generator=generator)


def _write_state_dict(model: ResNeXt, path: Path, image_size: int) -> None:
    content = {"spec": model.spec.to_dict(), "state_dict": model.state_dict()}
    torch.save(content, path)


def _read_state_dict(path: Path) -> Callable[[Tensor], Tensor]:
    return load_net(path).eval()


def _traced(model: ResNeXt, image_size: int) -> torch.export.ExportedProgram:
    images = _images(model.spec, image_size, num=2)
    batch = torch.export.Dim("batch")
    return torch.export.export(model, (images,), dynamic_shapes=({0: batch},))


def _write_program(model: ResNeXt, path: Path, image_size: int) -> None:
    torch.export.save(_traced(model, image_size), path)


def _read_program(path: Path) -> Callable[[Tensor], Tensor]:
    with warnings.catch_warnings():
        # torch 2.11 says this of bytes that it reads and does not write.
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        return torch.export.load(path).module()


def _write_onnx(model: ResNeXt, path: Path, image_size: int) -> None:
    program = torch.onnx.export(
        _traced(model, image_size),
        input_names=["images"],
        output_names=["logits"],
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    program.save(path)


def _read_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        path, options, providers=["CPUExecutionProvider"]
    )
    return lambda images: torch.from_numpy(
        session.run(["logits"], {"images": images.numpy()})[0]
    )


_FORMATS: dict[
    str,
    tuple[
        Callable[[ResNeXt, Path, int], None],
        Callable[[Path], Callable[[Tensor], Tensor]],
    ],
] = {
    "state_dict": (_write_state_dict, _read_state_dict),
    "torch_export": (_write_program, _read_program),
    "onnx": (_write_onnx, _read_onnx),
}


def _require_onnx() -> None:
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            f"format onnx needs the package {error.name}: pip install "
            "'resnext-ablate[export]'"
        ) from None


def _read_torch(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """Eight bytes of header length, a JSON header, then the tensors' bytes."""
    content = bytearray(path.read_bytes())
    (length,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    data = memoryview(content)[8 + length :]
    tensors = {}
    for name, entry in header.items():
        dtype, shape = _SAFETENSORS_DTYPES[entry["dtype"]], entry["shape"]
        begin, end = entry["data_offsets"]
        wanted = math.prod(shape) * dtype.itemsize
        if not 0 <= begin <= end <= len(data) or end - begin != wanted:
            raise ValueError(f"{name} {shape}: bytes {begin} to {end} are not its own")
        # An own copy: slices need not start where their type may.
        taken = bytearray(data[begin:end])
        flat = torch.frombuffer(taken, dtype=dtype) if taken else torch.empty(0)
        tensors[name] = flat.reshape(shape)
    return tensors


def _holds_tensors(content: Mapping[Any, Any]) -> bool:
    return all(isinstance(name, str) for name in content) and any(
        isinstance(value, Tensor) for value in content.values()
    )


def _kind(content: object) -> str:
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    names = ", ".join(map(repr, list(content)[:3]))
    return f"{len(content)} entries and no tensor: {names or 'none'}"


def _without_prefixes(state_dict: dict[str, Any]) -> dict[str, Any]:
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in state_dict):
            state_dict = {n.removeprefix(prefix): v for n, v in state_dict.items()}
    return state_dict


def _spec_of(values: object, path: Path) -> ResNeXtSpec:
    try:
        assert isinstance(values, dict)
        return spec_from_dict(values)
    except (AssertionError, TypeError) as error:
        raise InputError(f"weights {path}: its spec is none: {error}.") from None
