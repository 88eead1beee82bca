"""Weights from files, and nets exported and read back."""

from __future__ import annotations

import builtins
import importlib.util
import json
import os
import pickle
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import small_specs
from torch import Tensor

from resnext_ablate.architecture.names import parse_spec
from resnext_ablate.architecture.spec import InputError, MissingExtraError, ResNeXtSpec
from resnext_ablate.compute import interop
from resnext_ablate.compute.interop import (
    ExportError,
    drawn_net,
    export_net,
    load_net,
    read_weights,
)
from resnext_ablate.compute.model import ResNeXt
from resnext_ablate.face import cli

SMALL = "resnext11-4x3d-t8"
HAS_ONNX = all(map(importlib.util.find_spec, ("onnxruntime", "onnxscript")))


def _net(name: str = SMALL, seed: int = 1) -> ResNeXt:
    return drawn_net(parse_spec(name), seed=seed)


def _same(one: ResNeXt, other: ResNeXt) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) for name in ours
    )


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A plain state dict of the small net, as torch.save writes it."""
    path = tmp_path / "weights.pt"
    torch.save(_net().state_dict(), path)
    return path


# Reading


@pytest.mark.parametrize(
    "name", ["resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2"]
)
def test_torchvision_files_load_by_name(name: str, tmp_path: Path) -> None:
    """A file that torchvision's user saved loads into the net of the same name."""
    import torchvision.models

    with torch.device("meta"):
        theirs = getattr(torchvision.models, name)(num_classes=7)
    theirs = theirs.to_empty(device="cpu")
    ours = drawn_net(parse_spec(f"{name}-c7"), seed=3)
    theirs.load_state_dict(ours.state_dict())
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    assert _same(ours, load_net(tmp_path / "theirs.pth", spec=ours.spec))


@pytest.mark.parametrize(
    ("wrapper", "prefix"),
    [("state_dict", "module."), ("model", ""), (None, "_orig_mod."), ("model", "both")],
)
def test_checkpoints_load(wrapper: str | None, prefix: str, tmp_path: Path) -> None:
    """Weights under a checkpoint's key, or behind a wrapper's prefix, are found."""
    net = _net()
    prefix = "module._orig_mod." if prefix == "both" else prefix
    content: object = {prefix + n: t for n, t in net.state_dict().items()}
    if wrapper:
        content = {wrapper: content, "epoch": 90, "optimizer": {"state": {}}}
    torch.save(content, tmp_path / "checkpoint.pt")
    assert _same(net, load_net(tmp_path / "checkpoint.pt", spec=net.spec))


def _write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    names = {torch.float32: "F32", torch.int64: "I64", torch.bfloat16: "BF16"}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, tensor in tensors.items():
        raw = bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist())
        offsets = [len(data), len(data) + len(raw)]
        shape = list(tensor.shape)
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": shape,
            "data_offsets": offsets,
        }
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_safetensors_load(tmp_path: Path) -> None:
    """The file format of timm's weights loads, in other precisions too."""
    net = _net("resnext1.-2x2d-t2")
    path = tmp_path / "model.safetensors"
    _write_safetensors(path, net.state_dict())
    assert _same(net, load_net(path, spec=net.spec))
    halves = {name: tensor.bfloat16() for name, tensor in net.state_dict().items()}
    _write_safetensors(path, halves)
    loaded = load_net(path, spec=net.spec).conv1.weight
    assert torch.equal(loaded, net.conv1.weight.bfloat16().float())


@pytest.mark.parametrize("cut", [0, 5, 60, -1])
def test_damaged_safetensors(cut: int, tmp_path: Path) -> None:
    """A cut file is refused wherever it is cut."""
    path = tmp_path / "model.safetensors"
    _write_safetensors(path, _net("resnext1.-2x2d-t2").state_dict())
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(InputError, match=r"model\.safetensors: no sound file"):
        read_weights(path)


def test_safetensors_bytes_must_be_their_own(tmp_path: Path) -> None:
    """Offsets that do not fit the shape are refused with name and shape."""
    path = tmp_path / "model.safetensors"
    entry = {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 8]}
    text = json.dumps({"fc.weight": entry}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(48))
    with pytest.raises(InputError, match=r"fc\.weight \[3, 4\]: bytes 0 to 8"):
        read_weights(path)


class _Opens:
    """Unpickled by a careless reader, this makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.folder),)


def test_no_code_of_a_file_runs(tmp_path: Path) -> None:
    """A pickle that calls a function is refused before it does."""
    path, folder = tmp_path / "evil.pt", tmp_path / "made"
    for content in (_Opens(folder), {"conv1.weight": _Opens(folder)}):
        torch.save(content, path)
        with pytest.raises(InputError, match=r"evil\.pt: no sound file of tensors, or"):
            read_weights(path)
        path.write_bytes(pickle.dumps(content))
        with pytest.raises(InputError, match=r"evil\.pt: no sound file of tensors, or"):
            read_weights(path)
    assert not folder.exists()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_damaged_file(data: st.DataObject, tmp_path_factory: object) -> None:
    """Any cut or garbled file is one InputError or loads as tensors; nothing else."""
    assert isinstance(tmp_path_factory, pytest.TempPathFactory)
    path = tmp_path_factory.mktemp("damaged") / "weights.pt"
    torch.save(_net("resnext1.-1x1d-t1").state_dict(), path)
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content = content[:at]
    else:
        content[at : at + 8] = data.draw(st.binary(min_size=1, max_size=8))
    path.write_bytes(content)
    try:
        load_net(path, spec=parse_spec("resnext1.-1x1d-t1"))
    except InputError as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "must hold tensors by name, got a list"),
        ({}, "got 0 entries and no tensor: none"),
        ({"epoch": 3, "lr": 0.1}, "got 2 entries and no tensor: 'epoch', 'lr'"),
        (torch.zeros(3), "got a Tensor"),
        ({3: torch.zeros(3)}, "got 1 entries and no tensor: 3"),
        ({"fc.bias": torch.zeros(3)}, r"1 misshapen: fc.bias \(3,\), must be \(10,\)"),
        ({"spec": {"depth": 3}, "x": torch.zeros(1)}, "its spec is none: .*'depth'"),
        ({"spec": 3, "x": torch.zeros(1)}, "its spec is none"),
    ],
)
def test_foreign_files(content: object, message: str, tmp_path: Path) -> None:
    """A sound file of something else is refused by what it holds."""
    path = tmp_path / "foreign.pt"
    torch.save(content, path)
    with pytest.raises(InputError, match=rf"foreign\.pt: .*{message}"):
        load_net(path, spec=parse_spec(SMALL))


def test_weights_of_another_net(weights: Path) -> None:
    """The message names the file, the net, and the tensors with both shapes."""
    with pytest.raises(InputError) as caught:
        load_net(weights, spec=parse_spec("resnext11-4x4d-t8"))
    text = str(caught.value)
    assert str(weights) in text
    assert "resnext11-4x4d-t8" in text
    assert "misshapen: layer1.0.bn1.bias (12,), must be (16,)" in text


def test_missing_file_and_missing_spec(weights: Path) -> None:
    """A file that is not there, and one that names no net, say so."""
    with pytest.raises(InputError, match=r"none\.pt: cannot be read: No such file"):
        read_weights(weights.with_name("none.pt"))
    with pytest.raises(InputError, match="the file names no net, so give its spec"):
        load_net(weights)


# Exporting


@settings(max_examples=15, deadline=None)
@given(spec=small_specs())
def test_spec_and_weights_round_trip(
    spec: ResNeXtSpec, tmp_path_factory: object
) -> None:
    """A written state dict gives back spec and weights of any net, bit by bit."""
    assert isinstance(tmp_path_factory, pytest.TempPathFactory)
    path = tmp_path_factory.mktemp("export") / "net.pt"
    net = drawn_net(spec, seed=2)
    size = spec.total_stride
    export_net(net, path=path, format="state_dict", image_size=size)
    back = load_net(path)
    assert back.spec == spec
    assert _same(net, back)


@pytest.mark.parametrize(
    "name",
    [SMALL, "resnext1.1-2x2d-t4-form_a-preact-shortcut_a", "from_scratch1.-2x2d"],
)
def test_exported_program_gives_the_outputs(name: str, tmp_path: Path) -> None:
    """torch.export's file takes batches of any size and gives the net's logits."""
    net, path = _net(name), tmp_path / "net.pt2"
    export_net(net, path=path, format="torch_export", image_size=16)
    assert net.training
    program = torch.export.load(path).module()
    images = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        torch.testing.assert_close(program(images), net.eval()(images))
    assert [file.name for file in tmp_path.iterdir()] == ["net.pt2"]


@pytest.mark.skipif(not HAS_ONNX, reason="needs the extra 'export'")
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", [SMALL, "resnext1.1-2x2d-t4-form_a-shortcut_a"])
def test_onnx_gives_the_outputs(name: str, tmp_path: Path) -> None:
    """ONNX Runtime gives the net's logits for batches of any size."""
    import onnxruntime

    net, path = _net(name), tmp_path / "net.onnx"
    exported = export_net(net, path=path, format="onnx", image_size=16)
    assert exported.largest_difference < 1e-5
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    images = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    (logits,) = session.run(["logits"], {"images": images.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), net.eval()(images))


def test_a_wrong_export_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file whose outputs differ, or are not numbers, is not written."""
    net, path = _net(), tmp_path / "net.pt"
    for factor, message in ((1.01, "logits differ by"), (float("nan"), "by nan")):

        def read(path: Path, factor: float = factor) -> torch.nn.Module:
            wrong = load_net(path).eval()
            wrong.fc.weight.data.mul_(factor)
            return wrong

        write = interop._FORMATS["state_dict"][0]
        monkeypatch.setitem(interop._FORMATS, "state_dict", (write, read))
        with pytest.raises(ExportError, match=message):
            export_net(net, path=path, format="state_dict", image_size=8)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "tflite"}, "format must be one of state_dict, torch_export, onnx"),
        ({"image_size": 3}, "image_size must be at least 4"),
        (
            {"path": Path("no", "folder", "net.pt")},
            "net.pt: cannot be written: No such",
        ),
    ],
)
def test_bad_exports(change: dict[str, object], message: str, tmp_path: Path) -> None:
    """What cannot be exported is refused by name, rule and value."""
    arguments = {"path": tmp_path / "x", "format": "state_dict", "image_size": 8}
    with pytest.raises(InputError, match=message):
        export_net(_net(), **{**arguments, **change})  # type: ignore[arg-type]


@pytest.fixture
def without_onnx(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a machine where the extra is not installed."""
    find = builtins.__import__

    def refuse(name: str, *rest: object) -> object:
        if name.startswith("onnx"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return find(name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", refuse)
    yield


# The command line


def _run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Exit code of `resnext-ablate ARGUMENTS`."""
    monkeypatch.setattr("sys.argv", ["resnext-ablate", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    code = caught.value.code
    return code if isinstance(code, int) else 0


def test_missing_extra_is_exit_code_4(
    without_onnx: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Without ONNX's packages the command says how to get them and exits with 4."""
    with pytest.raises(MissingExtraError, match="needs the package onnxruntime"):
        export_net(_net(), path=tmp_path / "x", format="onnx", image_size=8)
    out = tmp_path / "net.onnx"
    code = _run(monkeypatch, "export-net", SMALL, "--format", "onnx", "--out", out)
    assert code == 4
    assert "pip install 'resnext-ablate[export]'" in capsys.readouterr().err
    assert not out.exists()


def test_export_net_command(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    weights: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The given weights are exported, and the answer is JSON where asked."""
    out = tmp_path / "net.pt"
    arguments = ("export-net", SMALL, "--weights", weights, "--out", out, "--json")
    assert _run(monkeypatch, *arguments) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["num_bytes"] == out.stat().st_size
    assert (answer["name"], answer["largest_difference"]) == (SMALL, 0.0)
    assert _same(load_net(out), _net())


def test_export_net_command_refuses_foreign_weights(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    weights: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Weights of another net are bad input: exit code 2 and no file."""
    out = tmp_path / "net.pt"
    code = _run(
        monkeypatch, "export-net", "resnet11-t8", "--weights", weights, "--out", out
    )
    assert code == 2
    assert "misshapen" in capsys.readouterr().err
    assert not out.exists()


def test_describe_says_what_is_not_held(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The from-scratch net's drift is told and measured; the paper's net has none."""
    assert _run(monkeypatch, "describe", "from_scratch-32x4d", "--json") == 0
    unheld = json.loads(capsys.readouterr().out)["not_held_at"]
    errors = {row["setting"]: round(row["macs_error_pct"], 2) for row in unheld}
    assert errors["1x64d"] == -30.08  # 2,957,795,328 against 4,230,479,872
    assert errors["32x4d"] == 0
    assert _run(monkeypatch, "describe", "from_scratch1.-2x2d") == 0
    text = capsys.readouterr().out
    assert "Complexity is NOT held when cardinality changes" in text
    assert _run(monkeypatch, "describe", SMALL) == 0
    assert "NOT held" not in capsys.readouterr().out
