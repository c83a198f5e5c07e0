"""Every metric that the dashboards and the alerts name is one that a server shows."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from exposed import names, shown, shown_of_images, used

DEPLOY = Path(__file__).parent.parent.parent / "deploy"
DASHBOARDS = sorted((DEPLOY / "grafana").glob("*.json"))
OF_PROMETHEUS = {"up"}  # what it says itself of whom it asks

_NO_NAMES = re.compile(
    r"\{[^}]*\}"  # matchers of labels
    r"|\[[^]]*\]"  # ranges
    r"|\"[^\"]*\""
    r"|\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)"  # labels
    r"|\b(?:and|or|unless|bool|offset)\b"
)
_NAME = re.compile(r"(?<![\w:.$])[a-zA-Z_:][\w:]*(?!\s*\()(?![\w:])")


def metrics_in(expression: str) -> set[str]:
    """Names in PromQL that are neither functions nor labels."""
    return set(_NAME.findall(_NO_NAMES.sub(" ", expression)))


def expressions(value: object) -> Iterator[str]:
    """Of a dashboard, wherever they stand: its panels, and the queries of its variables."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "expr":
                yield inner
            elif key == "definition":
                yield re.sub(r"^label_values\((.*),.*\)$", r"\1", inner)
            else:
                yield from expressions(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from expressions(inner)


def rules() -> list[dict[str, str]]:
    text = (DEPLOY / "prometheus" / "alerts.yml").read_text()
    return [rule for group in yaml.safe_load(text)["groups"] for rule in group["rules"]]


def unknown(found: Iterator[str]) -> set[str]:
    named = set().union(*map(metrics_in, found))
    assert len(named) > 5, "nothing was found to check"
    return named - names(shown(used())) - OF_PROMETHEUS


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_names_metrics_that_exist(path: Path) -> None:
    assert not unknown(expressions(json.loads(path.read_text())))


def test_alerts_name_metrics_that_exist() -> None:
    assert not unknown(rule["expr"] for rule in rules())


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_wrong_name_is_found(path: Path) -> None:
    planted = path.read_text().replace("bireme:num_requests_waiting", "bireme:num_requests_wating")
    assert unknown(expressions(json.loads(planted))) == {"bireme:num_requests_wating"}


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_panels_of_a_dashboard_are_apart(path: Path) -> None:
    panels = json.loads(path.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [
        (grid["x"] + column, grid["y"] + line)
        for grid in (panel["gridPos"] for panel in panels)
        for column in range(grid["w"])
        for line in range(grid["h"])
    ]
    assert len(set(places)) == len(places)
    assert max(column for column, _ in places) < 24


def test_every_alert_says_how_urgent_it_is_and_what_is_wrong() -> None:
    for rule in rules():
        assert rule["labels"]["severity"] in ("critical", "warning", "info")  # type: ignore[index]
        assert rule["annotations"]["summary"]  # type: ignore[index]
        assert rule["for"]


def test_prometheus_finds_the_alerts_beside_its_configuration() -> None:
    folder = DEPLOY / "prometheus"
    config = yaml.safe_load((folder / "prometheus.yml").read_text())
    assert all((folder / name).is_file() for name in config["rule_files"])
    assert [job["job_name"] for job in config["scrape_configs"]] == ["bireme"]


@pytest.mark.parametrize(
    ("expression", "found"),
    [
        ('sum by (le) (rate(a:b_bucket{x=~"$y"}[5m])) > 1e3', {"a:b_bucket"}),
        ("a / on (instance) group_left (z) b offset 5m", {"a", "b"}),
        ("histogram_quantile(0.9, c) and up == 0", {"c", "up"}),
    ],
)
def test_names_are_told_from_functions_and_labels(expression: str, found: set[str]) -> None:
    assert metrics_in(expression) == found


def test_the_guide_lists_every_metric_and_no_other() -> None:
    guide = (DEPLOY.parent / "docs" / "guide" / "watching-a-server.md").read_text()
    listed = set(re.findall(r"`(bireme:\w+)`", guide))
    all_names = names(shown(used())) | names(shown_of_images())
    ours = {name for name in all_names if name.startswith("bireme:")}
    assert listed == {re.sub(r"_(bucket|count|sum)$", "", name) for name in ours}
