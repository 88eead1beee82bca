"""The command line as a user meets it: answers, messages and exit codes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from resnext_ablate.architecture.spec import InputError
from resnext_ablate.face import cli, terminal
from resnext_ablate.face.answers import Answer
from resnext_ablate.study.schedule import Progress
from resnext_ablate.study.trials import RunningRun

PROGRAM = [sys.executable, "-c", "from resnext_ablate.face.cli import main; main()"]


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments))


def answer(*arguments: str) -> object:
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def program(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PROGRAM, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


def _said_after(*arguments: str, code: str) -> str:
    """What a command and then some code print, in one process of their own."""
    script = (
        f"import gc, sys; sys.argv = ['resnext-ablate', *{arguments!r}]\n"
        "from resnext_ablate.face.cli import main\n"
        "try: main()\n"
        f"except SystemExit: pass\n{code}"
    )
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout


def test_help_imports_nothing_heavy() -> None:
    """`--help` answers without torch, optuna, pandas, plotly or pydantic."""
    code = (
        "heavy = {'torch', 'optuna', 'pandas', 'plotly', 'pydantic', 'numpy'}\n"
        "print('HEAVY', sorted(heavy & set(sys.modules)))"
    )
    said = _said_after("--help", code=code)
    assert "describe" in said
    assert "HEAVY []" in said


def test_a_command_ends_without_a_search_for_garbage() -> None:
    """What is held when a command ends is nothing that Python looks through."""
    code = "print('LEFT', len(gc.get_objects()))"
    said = _said_after("describe", "resnet50", code=code)
    assert int(said.rpartition("LEFT ")[2]) < 1000


def test_report_and_status_need_no_torch(tmp_path: Path) -> None:
    """Looking at results works on a laptop without torch."""
    script = (
        "import sys\n"
        "import resnext_ablate.evidence.report\n"
        "import resnext_ablate.records.tables, resnext_ablate.study.trials\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)


def test_describe_gives_the_papers_resnext_50() -> None:
    """The JSON holds the counts of ResNeXt-50 (32x4d), fvcore's beside ours."""
    value = answer("describe", "resnext50-32x4d")
    assert isinstance(value, dict)
    stages = value.pop("stages")
    assert value == {
        "name": "resnext50-32x4d",
        "image_size": 224,
        "depth": 50,
        "cardinality": 32,
        "bottleneck_widths": [4, 8, 16, 32],
        "macs": 4230479872,
        "params": 25028904,
        "params_without_bn": 24960680,
        "activations": 14400512,
        "fvcore": {"conv_linear": 4230479872, "total": 4259381248},
        "not_held_at": [],
    }
    assert [stage["macs"] for stage in stages] == [
        118013952,
        634224640,
        1085407232,
        1525350400,
        865435648,
        2048000,
    ]


def test_describe_prints_a_table_whose_numbers_line_up() -> None:
    """Without --json people get the stage table, right-aligned, and fvcore's word."""
    result = invoke("describe", "resnet11-t16")
    lines = result.stdout.splitlines()
    assert lines[0] == "resnet11-t16: 11 layers, 32 x 32 pixels"
    header = next(line for line in lines if "activations" in line)
    total = next(line for line in lines if line.startswith("total"))
    assert len(header) == len(total)
    assert "(equal)" in result.stdout


def test_match_gives_the_papers_widths() -> None:
    """Holding a block's parameters gives Table 2: 64, 40, 24, 14, 4."""
    value = answer(
        *("match", "resnet50", "--cardinality", "1,2,4,8,32", "--hold", "block_params")
    )
    assert isinstance(value, list)
    assert [(one["cardinality"], one["base_width"]) for one in value] == [
        (1, 64),
        (2, 40),
        (4, 24),
        (8, 14),
        (32, 4),
    ]
    last = value[-1]
    assert last["bottleneck_widths"] == [4, 8, 16, 32]
    assert last["macs_error_pct"] == pytest.approx(3.4553, abs=1e-3)
    assert last["params_error_pct"] == pytest.approx(-2.0664, abs=1e-3)


def test_match_with_another_reference() -> None:
    """The widths of the 2x group: a 64x4d net meets 2x64d."""
    value = answer(
        *("match", "resnet101", "--reference", "2x64d", "--cardinality", "64"),
        *("--hold", "macs"),
    )
    assert isinstance(value, list)
    assert value[0]["name"] == "resnext101-64x4d"


def test_match_within_a_tenth_of_a_percent() -> None:
    """Where no base width is near enough the stages take widths of their own."""
    value = answer(
        *("match", "resnet50", "--cardinality", "1,8,16"), *("--tolerance", "0.1%")
    )
    assert isinstance(value, list)
    assert [one["setting"] for one in value] == [
        "1x64d",
        "8x13.27.54.109d",
        "16x7.15.29.60d",
    ]
    assert all(abs(one["macs_error_pct"]) <= 0.1 for one in value)


def test_match_takes_the_nearest_on_request() -> None:
    """With --nearest a cardinality without a match comes with its error."""
    value = answer(
        *("match", "resnet50", "--cardinality", "16", "--tolerance", "1%"),
        *("--widths", "doubling", "--nearest"),
    )
    assert isinstance(value, list)
    assert value[0]["setting"] == "16x7d"
    assert value[0]["macs_error_pct"] == pytest.approx(-4.30, abs=0.01)


SPACE = ("match", "resnet50", "--tolerance", "1%", "--cardinality", "1..8*2")


def test_match_counts_a_space() -> None:
    """--count says how many nets fit, of how many, and in which windows."""
    arguments = (*SPACE, "--axis", "stage-width=8..512/8", "--also", "params=2%")
    value = answer(*arguments, "--count")
    assert isinstance(value, dict)
    assert value["num_nets"] == 4 * 64**4
    assert [window["currency"] for window in value["windows"]] == ["macs", "params"]
    assert value["nets"] == []
    text = invoke(*arguments, "--count").stdout
    assert text.startswith(f"{value['count']:,} of 67,108,864 nets fit macs 4,048,")


def test_match_samples_a_space() -> None:
    """--sample draws nets of the space that fit; equal seeds draw equal nets."""
    arguments = (*SPACE, "--axis", "depth=2..4", "--axis", "image-size=192,224")
    value = answer(*arguments, "--sample", "5", "--seed", "3", "--multiple", "8")
    assert isinstance(value, dict)
    assert len(value["nets"]) == 5
    for one in value["nets"]:
        assert abs(one["macs_error_pct"]) <= 1
        assert one["image_size"] in (192, 224)
        assert not any(one["cardinality"] * d % 8 for d in one["bottleneck_widths"])
    same = answer(*arguments, "--sample", "5", "--seed", "3", "--multiple", "8")
    other = answer(*arguments, "--sample", "5", "--seed", "4", "--multiple", "8")
    assert same == value
    assert other != value
    text = invoke(*arguments, "--sample", "2").stdout
    assert text.count(" pixels ") == 2


def test_empty_space_names_the_nearest() -> None:
    """Where nothing fits, the count is 0 and the nearest nets are named."""
    arguments = ("match", "resnet50", "--cardinality", "8,16", "--tolerance", "1%")
    text = invoke(*arguments, "--axis", "width=1..64", "--count").stdout
    assert text.startswith("0 of 128 nets fit macs ")
    assert "nearest: resnext50-8x13d (3,949,895,680 macs), resnext50-8x14d" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["describe", "resnet51"], "depth must be 18, 34, 50, 101, 152, 200 or 9n + 2"),
        (["describe", "nonsense"], "'nonsense' names no net"),
        (["describe", "resnet50", "--image-size", "16"], "image_size must be at least"),
        (["match", "resnet50", "--cardinality", "1,x"], "--cardinality must be whole"),
        (["match", "resnet50", "--cardinality", "0"], "at least 1"),
        (["match", "resnet50", "--cardinality", "2", "--tolerance", "x"], "percentage"),
        (
            ["match", "resnet50", "--cardinality", "16", "--hold", "block_params"],
            "nearest 16x7d (-7.51 %), 16x8d (+7.35 %)",
        ),
        (["run", "absent.toml"], "absent.toml: cannot be read"),
        (["report", "absent"], "holds no study"),
        (["status", "absent"], "holds no study"),
    ],
)
def test_bad_input_is_one_message_and_code_2(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    """No traceback, nothing on standard output, exit code 2."""
    done = program(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--axis", "foo=1", "--count"], "an axis is NAME=VALUES"),
        (
            ["--axis", "width=1", "--axis", "width=2", "--count"],
            "width is given more than once",
        ),
        (["--count", "--hold", "block_params"], "counted within"),
        (["--count", "--multiple", "0"], "inner_multiple must be"),
        (["--multiple", "8"], "need --count or --sample"),
        ([], "cardinalities must name at least one"),
        (
            [
                "--axis",
                "stage-width=1..99999",
                "--axis",
                "stage-depth=1..999",
                "--count",
            ],
            "at most 4,000,000 fit into memory",
        ),
    ],
)
def test_bad_spaces_are_refused(arguments: list[str], message: str) -> None:
    """What cannot be counted or matched is refused by name, rule and value."""
    result = invoke("match", "resnet50", *arguments)
    assert isinstance(result.exception, InputError)
    assert message in str(result.exception)


def test_input_error_reaches_the_user_from_any_verb() -> None:
    """Verbs raise; `main` alone turns the error into a message."""
    result = invoke("describe", "resnet51")
    assert isinstance(result.exception, InputError)


def test_plan_names_nets_runs_and_compute(tmp_path: Path) -> None:
    """Before anything runs, the plan shows the matched nets and what they cost."""
    study = Path(__file__).parents[1] / "studies" / "quickstart.toml"
    value = answer("plan", str(study), "--results", str(tmp_path))
    assert isinstance(value, dict)
    assert value["num_runs"] == 3 * len(value["nets"]) >= 12
    assert value["num_done"] == 0
    assert all(net["fvcore_macs"] == net["macs"] for net in value["nets"])
    assert all(abs(net["macs_error_pct"]) <= 5 for net in value["nets"])
    # 3 passes, 8 epochs, 3 seeds; 1,797 digits less test and validation.
    images = 3 * 8 * 3 * 1294
    total = images * sum(net["macs"] for net in value["nets"])
    assert value["training_macs"] == pytest.approx(total, rel=0.01)


def test_table_aligns_text_left_and_numbers_right(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Columns line up whatever is in them, and no line ends in spaces."""
    table = Answer(
        value=None, header=("net", "macs"), rows=(("a", "1,000"), ("long name", "5"))
    )
    terminal.print_answer(table, as_json=False)
    assert capsys.readouterr().out == (
        "net         macs\na          1,000\nlong name      5\n"
    )


def test_progress_is_plain_lines_when_not_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A log file gets whole lines, at most one per 30 s between finished runs."""
    now = 0.0
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now)
    one = Progress(
        num_planned=12,
        num_complete=3,
        num_failed=1,
        running=(RunningRun(variant="4x6d", seed=1, epoch=2, val_error_pct=7.5),),
        eta_s=95,
    )
    with terminal.RunProgress() as progress:
        progress(one)
        now = 31.0
        progress(one)
        progress(one)
    assert capsys.readouterr().err == (
        "4 of 12 runs, 1 failed, about 1 min 35 s left | 4x6d seed 1 epoch 2 (7.5 %)\n"
    )
