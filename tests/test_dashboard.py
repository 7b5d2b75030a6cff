"""The dashboard's specification, read back by the library; and W&B's API, as a server on this machine."""

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import wandb_workspaces.reports.v2 as wr
from conftest import ROOT
from wandb_workspaces import expr
from wandb_workspaces.workspaces import Workspace

from mixprec import dashboard, tracking

KEY = "k" * 40


@pytest.fixture(scope="module")
def specification(tmp_path_factory):
    results = tmp_path_factory.mktemp("results")
    assert dashboard.main(["--results", str(results)]) == 0
    return {file.name: file.read_text() for file in (results / "dashboard").iterdir()}


def panels(specification):
    view = dashboard.read_back("workspace.json", specification["workspace.json"])
    found = [panel for section in Workspace._from_model(view).sections for panel in section.panels]
    report = dashboard.read_back("report.json", specification["report.json"])
    blocks = wr.Report._from_model(report).blocks
    return found, [p for block in blocks if isinstance(block, wr.PanelGrid) for p in block.panels]


def test_workspace_and_report_have_the_same_panels_and_all_are_known_to_the_library(specification):
    in_workspace, in_report = panels(specification)
    kinds = [sorted(type(panel).__name__ for panel in group) for group in (in_workspace, in_report)]
    assert kinds[0] == kinds[1]
    assert {"LinePlot", "ScatterPlot", "WeavePanelSummaryTable", "MediaBrowser", "RunComparer"} == {
        *kinds[0]
    }


def test_every_panel_is_of_something_that_a_cells_run_has(specification):
    place = ROOT / "results/five-250/smollm2_135m/mxfp4_mxfp8/fisher-5"
    logged = set(tracking.scalars(json.loads((place / "result.json").read_text())))
    logged |= {"allocation/heat_map", "allocation/layers"}
    asked = set()
    for panel in panels(specification)[0]:
        if isinstance(panel, wr.ScatterPlot):
            asked |= {panel.x.name, panel.y.name}
        elif isinstance(panel, wr.LinePlot):
            asked |= {getattr(one, "name", one) for one in (panel.x, *panel.y)}
        elif isinstance(panel, wr.MediaBrowser):
            asked |= set(panel.media_keys)
    assert {"acc/mean", "kl/mean", "bits/realised", "kl/predicted", "allocation/heat_map"} <= asked
    assert asked | set(dashboard.COLUMNS) <= logged


def test_runs_are_grouped_by_baseline_and_by_what_must_not_be_averaged(specification):
    view = dashboard.read_back("workspace.json", specification["workspace.json"])
    grouped = Workspace._from_model(view).runset_settings.groupby
    assert [type(one) for one in grouped] == [expr.Config] * len(grouped)
    assert [one.name for one in grouped] == list(dashboard.GROUPS)
    assert grouped[0].name == "baseline.name"


def test_without_a_key_it_says_how_to_apply_it(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert dashboard.main(["--results", str(tmp_path), "--track", "online"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert "WANDB_API_KEY" in last and "make dashboard TRACK=online" in last


@pytest.fixture
def environment(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    monkeypatch.setenv("WANDB_API_KEY", KEY)

    def at(port: int):
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")

    return at


def test_a_server_that_never_answers_is_one_line(tmp_path, environment, monkeypatch, capsys):
    monkeypatch.setattr(dashboard, "APPLY_SECONDS", 4)
    with socket.create_server(("127.0.0.1", 0)) as server:
        environment(server.getsockname()[1])
        assert dashboard.main(["--results", str(tmp_path), "--track", "online"]) == 1
    output = capsys.readouterr()
    assert output.err.count("\n") == 1 and "W&B did not answer within 4 s" in output.err
    assert KEY not in output.out + output.err
    assert (tmp_path / "dashboard/report.json").is_file()


class Server(BaseHTTPRequestHandler):
    """As much of W&B's API as creates and finds views."""

    views: list[dict]
    saved: list[str]

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        try:
            asked = json.loads(body)
            answer = json.dumps({"data": self.answer(asked["query"], asked.get("variables") or {})})
        except (ValueError, KeyError):
            answer = "{}"
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer.encode())

    def answer(self, query: str, given: dict) -> dict:
        page = {"pageInfo": {"endCursor": None, "hasNextPage": False}}
        if "upsertView" in query:
            view = next((v for v in self.views if v["id"] == given.get("id")), None)
            if view is None:
                view = {"id": f"Vmlldzo{len(self.views) + 1}"}
                self.views.append(view)
            view |= {key: given[key] for key in ("name", "displayName", "type", "spec")}
            self.saved.append(view["id"])
            project = {"id": "1", "name": given["projectName"], "entityName": given["entityName"]}
            return {"upsertView": {"view": {**view, "project": project}, "inserted": True}}
        if "allViews" in query:
            found = [
                {"node": {"description": "", "user": None, **view}, "cursor": "c"}
                for view in self.views
                if view["type"] == given.get("viewType", "runs")
                and given.get("viewName") in (None, view["name"])
            ]
            return {"project": {"allViews": {"edges": found, **page}}}
        if "upsertModel" in query:
            project = {"id": "1", "name": "mixprec", "entity": {"name": "team"}}
            return {"result": {"project": project, "model": {"name": "mixprec"}, "inserted": True}}
        if "models(" in query:
            return {"models": {"edges": [], **page}}
        teams = {"edges": []}
        who = {"id": "1", "entity": "team", "username": "u", "email": "", "flags": "{}"}
        return {"viewer": {**who, "teams": teams}}


def test_it_is_created_once_and_then_updated(tmp_path, environment, capsys):
    Server.views, Server.saved = [], []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment(server.server_address[1])
    for _ in range(2):
        assert dashboard.main(["--results", str(tmp_path), "--track", "online"]) == 0
        line = capsys.readouterr().out.splitlines()[-1]
        assert "/team/mixprec?nw=mixprec" in line and "/team/mixprec/reports/" in line
    server.shutdown()
    assert [view["type"] for view in Server.views] == ["runs", "project-view"]
    assert Server.saved == ["Vmlldzo1", "Vmlldzo2"] * 2
    assert Server.views[1]["name"] == dashboard.VIEW
