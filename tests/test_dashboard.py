"""Charts stand beside the trials in optuna-dashboard, which opens the storage as is."""

from __future__ import annotations

import json
from pathlib import Path
from wsgiref.util import setup_testing_defaults

import pytest

import studies

dashboard = pytest.importorskip("optuna_dashboard")


def asked(app: object, path: str) -> object:
    """What the dashboard's server answers to a GET."""
    place, _, query = path.partition("?")
    environment: dict[str, object] = {"PATH_INFO": place, "QUERY_STRING": query}
    setup_testing_defaults(environment)
    answer = app(environment, lambda status, headers, error=None: None)  # type: ignore[operator]
    return json.loads(b"".join(answer))


@pytest.mark.slow
def test_dashboard_shows_trials_and_charts(tmp_path: Path) -> None:
    """The storage opens as it is, with a trial per run and the charts of the report."""
    import optuna

    done = studies.run(tmp_path, "run.seeds=1", "train.epochs=2")
    assert done.returncode == 0, done.stderr
    again = studies.run(tmp_path, "run.seeds=1", "train.epochs=2")
    assert again.returncode == 0, again.stderr
    database = tmp_path / "results" / "tiny" / "study.db"
    storage = optuna.storages.RDBStorage(f"sqlite:///{database}")
    app = dashboard.wsgi(storage)
    (study,) = asked(app, "/api/studies")["study_summaries"]  # type: ignore[index]
    assert study["study_name"] == "tiny"
    detail = asked(app, f"/api/studies/{study['study_id']}?after=0")
    assert len(detail["trials"]) == 2  # type: ignore[index]
    pinned = {
        one["graph_object"] and one["id"] for one in detail["plotly_graph_objects"]
    }  # type: ignore[index]
    assert {"error-cardinality", "curves", "pareto", "timeline"} <= pinned
    assert len(pinned) == len(detail["plotly_graph_objects"])  # type: ignore[index]
