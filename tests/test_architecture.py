"""Data flows one way: which room may import which is held here."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "resnext_ablate"
FILES = {path.stem: path for path in PACKAGE.glob("*/*.py") if path.stem != "__init__"}

# The package's folders, from the first of the flow to the last.
BANDS = [
    "architecture",
    "numbers",
    "records",
    "compute",
    "engines",
    "study",
    "evidence",
    "face",
]

# Rooms from the first of the flow to the last. A room imports only rooms named here.
# Any room may import `shapes` and `spec`, which also holds the error shown to users.
ROOMS: dict[str, set[str]] = {
    # architecture
    "shapes": set(),
    "spec": set(),
    "names": set(),
    "complexity": set(),
    "costs": {"complexity"},
    "space": {"complexity", "costs"},
    "wavelet": {"costs"},
    "halves": {"costs", "wavelet"},
    "feasible": {"complexity", "costs", "halves", "space"},
    "tightest": {"costs", "feasible", "space"},
    "matching": {"complexity", "space", "tightest"},
    "axes": {"costs", "space"},
    "space_bench": {"complexity", "costs", "feasible", "names", "space"},
    "roofline": set(),
    # numbers
    "stats": set(),
    "power": {"stats"},
    "families": {"power", "stats"},
    "verdicts": {"families", "power", "stats"},
    "looks": {"families", "power", "stats", "verdicts"},
    # records
    "complaints": set(),
    "study_file": {"complaints"},
    "search_config": {"costs"},
    "data_config": set(),
    "config": {
        "complaints",
        "data_config",
        "matching",
        "names",
        "search_config",
        "study_file",
    },
    "records": set(),
    "run_files": {"records"},
    "sleeping": {"names", "records"},
    "outcomes": {"records", "search_config"},
    "rungs": {"records"},
    "certificate": {"records", "roofline"},
    "training_costs": {"certificate", "records", "roofline"},
    "attempts": {"records"},
    "importance": {"records"},
    "progress": {"records"},
    "sinks": {"progress", "records"},
    "tables": {
        "attempts",
        "certificate",
        "config",
        "importance",
        "outcomes",
        "records",
    },
    "paper": {"complaints"},
    "checks": {
        "complaints",
        "complexity",
        "names",
        "paper",
        "records",
        "study_file",
        "tables",
    },
    # compute
    "lanes": set(),
    "traversal_loops": {"lanes"},
    "loops": {"lanes", "traversal_loops"},
    "taps": set(),
    "dots": {"lanes", "taps"},
    "tiles": {"dots", "lanes"},
    "bf16_group_loops": {"dots", "lanes", "taps"},
    "bf16_weight_loops": {"dots", "lanes", "taps", "tiles"},
    "bf16_product_loops": {"dots", "lanes", "tiles"},
    "row_loops": {"lanes"},
    "fp32_group_loops": {"lanes", "row_loops", "taps"},
    "triton_parts": set(),
    "triton_kernels": {"triton_parts"},
    "triton_norms": {"triton_kernels", "triton_parts"},
    "fused": {"lanes", "loops", "triton_norms"},
    "bf16_groups": {"bf16_group_loops", "bf16_weight_loops", "dots", "fused", "taps"},
    "fp32_groups": {"fp32_group_loops", "fused", "row_loops", "taps"},
    "bf16_products": {"bf16_product_loops", "dots", "fused"},
    "direct": {"bf16_groups", "bf16_products", "dots", "fp32_groups", "fused"},
    "triton_conv": {"fused", "triton_parts"},
    "layers": {"direct", "fused", "triton_conv"},
    "residual": {"direct", "fused", "layers", "triton_conv"},
    "blocks": {"layers", "residual"},
    "model": {"blocks", "layers", "names"},
    "interop": {"model"},
    "hardware": set(),
    "captures": {"hardware"},
    "form_check": {"checks", "complexity", "hardware", "model", "names"},
    "images": set(),
    "folders": {"data_config", "hardware", "images"},
    "sources": {"data_config", "folders", "images"},
    "preparation": {"data_config", "hardware", "images", "sources"},
    "image_loops": {"lanes"},
    "data": {"data_config", "image_loops", "preparation"},
    "endings": set(),
    "reading": {"images"},
    "streaming": {
        "data",
        "data_config",
        "endings",
        "hardware",
        "preparation",
        "reading",
    },
    "checkpoint": {"hardware", "records"},
    "optimization": {"config"},
    "tuning": {
        "blocks",
        "captures",
        "config",
        "direct",
        "hardware",
        "layers",
        "records",
        "residual",
        "sources",
    },
    "together": {"data", "model"},
    "peers": set(),
    "learner": {
        "config",
        "data",
        "hardware",
        "layers",
        "model",
        "optimization",
        "peers",
        "together",
        "tuning",
    },
    "peaks": {"hardware", "roofline", "tuning"},
    "graphs": {"captures", "data", "hardware", "learner"},
    "fuse_bench": {
        "config",
        "data",
        "hardware",
        "learner",
        "names",
        "peaks",
        "together",
        "tuning",
    },
    "training_state": {
        "checkpoint",
        "config",
        "data",
        "data_config",
        "endings",
        "graphs",
        "hardware",
        "learner",
        "records",
        "together",
    },
    "training": {
        "checkpoint",
        "config",
        "data",
        "data_config",
        "endings",
        "graphs",
        "hardware",
        "learner",
        "optimization",
        "peers",
        "records",
        "together",
        "training_state",
    },
    "benchmark": {
        "certificate",
        "config",
        "data",
        "graphs",
        "hardware",
        "learner",
        "peaks",
        "roofline",
        "together",
        "tuning",
    },
    "measured": {"certificate", "complexity", "matching", "space", "tightest"},
    "execution": {"hardware", "records"},
    "executor": {
        "checkpoint",
        "config",
        "data",
        "endings",
        "execution",
        "hardware",
        "peaks",
        "peers",
        "records",
        "roofline",
        "streaming",
        "training",
        "training_state",
    },
    "variants": {
        "benchmark",
        "certificate",
        "config",
        "matching",
        "measured",
        "model",
        "preparation",
        "records",
    },
    "storage": set(),
    "guards": {"records", "storage"},
    "trials": {"attempts", "progress", "records", "storage"},
    "search": {"feasible", "halves", "costs", "names", "space"},
    "sampling": {"importance", "records", "search", "search_config"},
    "search_plan": {
        "axes",
        "config",
        "importance",
        "outcomes",
        "records",
        "rungs",
        "sampling",
        "search",
        "search_config",
        "variants",
    },
    "seed_plan": {"config", "looks", "records", "verdicts"},
    "nodes": {"config", "preparation"},
    "ray_engine": {"config", "execution", "hardware", "nodes", "records"},
    "slurm_engine": {"config", "execution", "nodes", "records"},
    "engines": {"config", "execution", "ray_engine", "slurm_engine"},
    "seats": {"attempts", "records"},
    "study_plan": {
        "certificate",
        "config",
        "hardware",
        "looks",
        "paper",
        "preparation",
        "records",
        "search_plan",
        "seed_plan",
        "tuning",
        "variants",
    },
    "cells": {
        "attempts",
        "config",
        "execution",
        "progress",
        "records",
        "run_files",
        "seats",
        "trials",
    },
    "schedule": {
        "attempts",
        "cells",
        "config",
        "execution",
        "progress",
        "records",
        "seats",
        "trials",
    },
    "planner": {"config", "looks", "power", "records", "stats", "verdicts"},
    "calibration": {
        "config",
        "data",
        "execution",
        "planner",
        "preparation",
        "records",
    },
    "schedule_bench": {
        "config",
        "execution",
        "records",
        "run_files",
        "schedule",
        "sleeping",
        "storage",
        "trials",
    },
    "study": {
        "certificate",
        "config",
        "engines",
        "execution",
        "guards",
        "study_plan",
        "progress",
        "records",
        "run_files",
        "schedule",
        "sinks",
        "search_plan",
        "seed_plan",
        "storage",
        "trials",
    },
    "reference_loops": {"config", "data", "data_config", "model", "optimization"},
    "training_bench": {
        "config",
        "data",
        "hardware",
        "peaks",
        "records",
        "reference_loops",
        "study_plan",
        "roofline",
        "training",
        "training_costs",
    },
    # evidence
    "ranks": {"stats"},
    "effects": {"stats"},
    "image_tests": {"power", "stats", "verdicts"},
    "contrasts": {"families", "power", "stats"},
    "claim_nets": {"contrasts"},
    "claims": {"checks", "claim_nets", "contrasts", "paper", "ranks", "tables"},
    "chart_style": set(),
    "charts": {"chart_style"},
    "charts_compare": set(),
    "charts_cost": {"charts", "records"},
    "charts_ranking": {"ranks"},
    "drawing": {"chart_style"},
    "figures": {"chart_style", "charts", "drawing"},
    "figures_compare": {"chart_style", "charts_compare", "drawing"},
    "figures_cost": {"chart_style", "charts_cost", "drawing", "figures"},
    "figures_ranking": {"chart_style", "charts_ranking", "drawing"},
    "gallery": {
        "charts",
        "charts_compare",
        "charts_cost",
        "charts_ranking",
        "figures",
        "figures_compare",
        "figures_cost",
        "figures_ranking",
        "ranks",
    },
    "page": {"chart_style", "gallery"},
    "findings": {"charts_ranking", "effects", "page", "ranks"},
    "embedding": {"config", "page", "records", "tables"},
    "report_page": {"embedding", "gallery", "page", "records", "tables"},
    "search_report": {"page", "tables"},
    "report": {
        "charts",
        "config",
        "embedding",
        "findings",
        "gallery",
        "image_tests",
        "looks",
        "paper",
        "report_page",
        "search_report",
        "stats",
        "tables",
        "verdicts",
    },
    "verify": {"embedding", "page", "records", "report", "report_page", "tables"},
    "loops_page": {
        "chart_style",
        "drawing",
        "gallery",
        "page",
        "records",
        "stats",
        "training_costs",
    },
    "export": {"chart_style", "gallery", "page", "tables"},
    "charts_claims": set(),
    "figures_claims": {"chart_style", "charts_claims", "drawing"},
    "claims_report": {
        "charts_claims",
        "checks",
        "claims",
        "export",
        "figures_claims",
        "gallery",
        "page",
        "power",
        "records",
        "tables",
    },
    "charts_studies": {"chart_style"},
    "figures_studies": {"chart_style", "charts_studies", "drawing"},
    "compare": {
        "charts_ranking",
        "charts_studies",
        "config",
        "families",
        "figures_ranking",
        "figures_studies",
        "gallery",
        "page",
        "ranks",
        "report",
        "report_page",
        "tables",
    },
    # face
    "answers": {
        "complexity",
        "interop",
        "matching",
        "model",
        "progress",
        "records",
        "report",
        "space",
    },
    "cost_answers": {"answers", "certificate", "matching", "training_costs"},
    "results_answers": {"answers", "compare", "verify"},
    "plan_answers": {
        "answers",
        "cost_answers",
        "looks",
        "matching",
        "planner",
        "study_plan",
    },
    "search_answers": {
        "answers",
        "matching",
        "plan_answers",
        "study_plan",
        "search_report",
        "tables",
    },
    "claims_answers": {"answers", "checks", "claims", "page"},
    "terminal": {"answers", "progress"},
    "options": {"matching", "space"},
    "results_commands": {
        "answers",
        "compare",
        "config",
        "export",
        "options",
        "progress",
        "records",
        "report",
        "report_page",
        "results_answers",
        "search_answers",
        "tables",
        "terminal",
        "trials",
        "verify",
    },
    "bench_commands": {
        "benchmark",
        "certificate",
        "config",
        "cost_answers",
        "hardware",
        "loops_page",
        "names",
        "options",
        "study_plan",
        "terminal",
        "training_bench",
        "training_costs",
        "tuning",
        "records",
        "variants",
    },
    "net_commands": {
        "answers",
        "axes",
        "bench_commands",
        "cost_answers",
        "feasible",
        "interop",
        "matching",
        "model",
        "names",
        "options",
        "space",
        "terminal",
        "variants",
    },
    "study_commands": {
        "answers",
        "calibration",
        "checks",
        "claims_answers",
        "config",
        "execution",
        "form_check",
        "guards",
        "options",
        "plan_answers",
        "planner",
        "study_plan",
        "records",
        "results_commands",
        "search_answers",
        "search_plan",
        "study",
        "terminal",
    },
    "claims_commands": {
        "checks",
        "claims",
        "claims_answers",
        "claims_report",
        "config",
        "export",
        "options",
        "records",
        "results_commands",
        "study_commands",
        "study_file",
        "terminal",
    },
    "cli": {
        "bench_commands",
        "claims_commands",
        "net_commands",
        "results_commands",
        "study_commands",
        "terminal",
    },
}

# Who alone may use a library that is heavy or that one room is to hide.
KEEPERS = {
    "numba": {"dots", "lanes", "tiles"},
    "llvmlite": {"dots", "lanes", "tiles"},
    "optuna_dashboard": {"trials"},
    "wandb": {"sinks"},
    "mlflow": {"sinks"},
    "torch": {
        "bf16_groups",
        "bf16_products",
        "direct",
        "fp32_groups",
        "benchmark",
        "blocks",
        "captures",
        "checkpoint",
        "data",
        "execution",
        "executor",
        "form_check",
        "fuse_bench",
        "fused",
        "graphs",
        "hardware",
        "interop",
        "layers",
        "learner",
        "model",
        "bench_commands",
        "optimization",
        "peaks",
        "peers",
        "reading",
        "reference_loops",
        "residual",
        "study_plan",
        "sinks",
        "streaming",
        "together",
        "training",
        "training_bench",
        "training_state",
        "triton_conv",
        "triton_norms",
        "triton_parts",
        "tuning",
    },
    "triton": {"triton_conv", "triton_kernels", "triton_norms", "triton_parts"},
    "onnxruntime": {"interop"},
    "kaleido": {"export"},
    "torchvision": {"reading", "reference_loops", "sources"},
    "sklearn": {"sources"},
    "optuna": {"sampling", "search", "search_plan", "storage", "study", "trials"},
    "fvcore": {"model"},
    "pydantic": {
        "checks",
        "complaints",
        "config",
        "data_config",
        "embedding",
        "search_config",
    },
    "plotly": {
        "chart_style",
        "drawing",
        "export",
        "figures",
        "figures_claims",
        "figures_compare",
        "figures_cost",
        "figures_ranking",
        "figures_studies",
        "gallery",
        "loops_page",
        "page",
    },
    "ray": {"ray_engine"},
    "submitit": {"slurm_engine"},
    "typer": {
        "bench_commands",
        "claims_commands",
        "cli",
        "net_commands",
        "options",
        "results_commands",
        "study_commands",
    },
    "rich": {"terminal"},
}


def imports_of(source: str) -> tuple[set[str], set[str]]:
    """Our rooms and the other top-level packages a module imports, wherever it does."""
    ours: set[str] = set()
    theirs: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            package, *inside = (node.module or "").split(".")
            if package != "resnext_ablate":
                theirs.add(package)
            elif len(inside) == 2:
                ours.add(inside[1])
            else:
                ours |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            for alias in node.names:
                package, *inside = alias.name.split(".")
                if package == "resnext_ablate":
                    ours.add(inside[-1])
                else:
                    theirs.add(package)
    return ours - {"__version__"}, theirs


def violations(room: str, source: str) -> list[str]:
    """Every import that the tables above do not allow."""
    ours, theirs = imports_of(source)
    allowed = ROOMS[room] | ({"shapes", "spec"} if room != "shapes" else set())
    return [f"{room} imports {other}" for other in sorted(ours - allowed)] + [
        f"{room} imports {package}"
        for package, keepers in KEEPERS.items()
        if package in theirs and room not in keepers
    ]


def test_every_module_is_a_room() -> None:
    """A new module has its place in the table, and the table names no ghost."""
    assert set(FILES) == set(ROOMS)


def test_the_table_flows_one_way() -> None:
    """No room may import one that comes after it in the flow."""
    order = list(ROOMS)
    for room, allowed in ROOMS.items():
        later = [other for other in allowed if order.index(other) > order.index(room)]
        assert not later, f"{room} may import {later}"


def test_bands_flow_one_way() -> None:
    """Every room stands in a band, and no band imports one that comes after it."""
    band = {room: BANDS.index(path.parent.name) for room, path in FILES.items()}
    for room, allowed in ROOMS.items():
        later = [other for other in allowed if band[other] > band[room]]
        assert not later, f"{room} may import {later}"


@pytest.mark.parametrize("room", ROOMS)
def test_room_imports_only_what_the_table_allows(room: str) -> None:
    """A module's imports, those inside functions too, are in the tables."""
    source = FILES[room].read_text(encoding="utf-8")
    assert violations(room, source) == []


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("spec", "from resnext_ablate.study.study import run_study"),
        ("stats", "from resnext_ablate.records import records"),
        ("training", "def train():\n    import optuna"),
        ("report", "def late():\n    from torch import Tensor"),
        ("matching", "import resnext_ablate.compute.model"),
    ],
)
def test_planted_violation_is_found(room: str, line: str) -> None:
    """The check itself bites: a forbidden import added to a real module fails."""
    source = FILES[room].read_text(encoding="utf-8")
    assert violations(room, f"{source}\n{line}\n") != []


def test_package_init_imports_nothing() -> None:
    """Importing the package costs nothing and cannot close a cycle."""
    for path in PACKAGE.rglob("__init__.py"):
        source = path.read_text(encoding="utf-8")
        assert imports_of(source) == (set(), set()), path


def test_functions_and_modules_stay_short() -> None:
    """No module passes 450 lines and no function 60."""
    for path in PACKAGE.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        assert source.count("\n") <= 450, path.name
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length <= 60, f"{path.name}: {node.name}"
