"""Writes the dashboards, each of one screen: ``dashboards/probescore.json``, of servers, four questions, a row each, and
``dashboards/probescore-audit.json``, of runs that are audited: do their probes still work?

pip install grafana-foundation-sdk && python docker/grafana/dashboard.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grafana_foundation_sdk.builders import common, dashboard, heatmap, prometheus, stat, table, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as options
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

DASHBOARDS = Path(__file__).parent / "dashboards"

SERVER = 'instance=~"$instance"'
PROBE = 'probe=~"$probe"'
DISTRIBUTION = "{{probe}}@{{version}} {{reduction}} {{label}}"
DATASOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
AUDITED = 'run=~"$run",probe=~"$probe",reading=~"$reading"'
AUDIT = "{{run}} {{probe}} {{reading}}"
SCORING = 'grpc_service="probescore.v1.ScoringService"'

Panel = Any


def query(expr: str, legend: str = "", *, instant: bool = False) -> prometheus.Dataquery:
    """One expression of a panel."""
    built = prometheus.Dataquery().expr(expr).legend_format(legend).datasource(DATASOURCE)
    return built.instant() if instant else built.range()


def place(panel: Panel, at: tuple[int, int, int, int], title: str, description: str, *targets: prometheus.Dataquery) -> Panel:
    """What every panel has. `at`: column, row, width, height; a screen has 24 columns."""
    x, y, w, h = at
    panel = panel.title(title).description(description).datasource(DATASOURCE).grid_pos(models.GridPos(h=h, w=w, x=x, y=y))
    for letter, target in zip("ABCDEF", targets, strict=False):
        panel = panel.with_target(target.ref_id(letter))
    return panel


def number(good_below: float | None = None) -> stat.Panel:
    """A large number; red from `good_below` on."""
    panel = stat.Panel().reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"])).graph_mode(options.BigValueGraphMode.AREA)
    if good_below is None:
        return panel.color_mode(options.BigValueColorMode.NONE)
    steps = [models.Threshold(None, "green"), models.Threshold(good_below, "red")]
    return panel.thresholds(dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps))


def lines(unit: str, *, stacked: bool = False, signed: bool = False) -> timeseries.Panel:
    """Lines over time, with a legend below."""
    panel = timeseries.Panel() if signed else timeseries.Panel().min(0)
    panel = panel.unit(unit).line_width(1).fill_opacity(30 if stacked else 5)
    panel = panel.legend(common.VizLegendOptions().display_mode(options.LegendDisplayMode.LIST).placement(options.LegendPlacement.BOTTOM))
    return panel.stacking(common.StackingConfig().mode(options.StackingMode.NORMAL)) if stacked else panel


def healthy() -> list[Panel]:
    """Is it healthy?"""
    failures = f'{SCORING},{SERVER},grpc_code=~"INTERNAL|UNKNOWN|UNAVAILABLE|DATA_LOSS"'
    numbers = [
        (number(), "Servers ready", "Servers in which some worker can score.", f"sum(probescore_ready{{{SERVER}}})"),
        (number(), "Workers asleep", "They gave their memory back; calls wait.", f"sum(probescore_worker_asleep{{{SERVER}}})"),
        (number(1), "Worker restarts, 1 h", "A worker died.", f"sum(changes(probescore_worker_restarts{{{SERVER}}}[1h]))"),
        (
            number(0.001).unit("reqps").decimals(3),
            "Failed calls / s",
            "For reasons of the server's; refusals do not count.",
            f"sum(rate(grpc_server_handled_total{{{failures}}}[5m])) or vector(0)",
        ),
        (number(), "Calls in flight", "Started and not yet completed.", f"sum(probescore_rpcs_in_flight{{{SERVER}}})"),
        (
            number(1).decimals(0),
            "Refused for NaN, 30 min",
            "Rollouts that some probe could not score.",
            f"sum(increase(probescore_probe_non_finite_total{{{PROBE},{SERVER}}}[30m]))",
        ),
    ]
    return [
        place(panel, (4 * index, 0, 4, 3), title, description, query(expr))
        for index, (panel, title, description, expr) in enumerate(numbers)
    ]


def fast() -> list[Panel]:
    """Is it fast?"""
    tokens = query(f"sum by (source) (rate(probescore_tokens_total{{{SERVER}}}[5m]))", "{{source}}")
    stages = query(f"histogram_quantile(0.95, sum by (stage, le) (rate(probescore_stage_seconds_bucket{{{SERVER}}}[5m])))", "{{stage}}")
    waiting = query(f"sum(probescore_queue_tokens{{{SERVER}}})", "waiting")
    batch = f"sum(rate(probescore_batch_tokens_sum{{{SERVER}}}[5m])) / sum(rate(probescore_batch_tokens_count{{{SERVER}}}[5m]))"
    calls = query(f"sum by (grpc_code) (rate(grpc_server_handled_total{{{SCORING},{SERVER}}}[5m]))", "{{grpc_code}}")
    refused = query(f"sum by (reason) (rate(probescore_refused_total{{{SERVER}}}[5m]))", "refused: {{reason}}")
    memory = query(f"sum by (instance, device) (probescore_device_memory_bytes{{{SERVER}}})", "{{instance}} {{device}}")
    cache = query(f"sum by (instance, device) (probescore_kv_cache_bytes{{{SERVER}}})", "cache {{instance}} {{device}}")
    where = "Scored, by where they came from: only those computed cost anything."
    held = "What workers have taken of their devices, and the cache's part of it."
    growing = "A queue that grows: more is asked for than the devices can compute."
    return [
        place(lines("short", stacked=True), (0, 3, 6, 6), "Tokens / s", where, tokens),
        place(lines("s"), (6, 3, 4, 6), "Seconds of a call, p95", "check, queue (waiting for a device), compute.", stages),
        place(lines("short"), (10, 3, 4, 6), "Tokens waiting, tokens a batch", growing, waiting, query(batch, "a batch")),
        place(lines("reqps"), (14, 3, 5, 6), "Calls / s", "By status; what was refused, by reason.", calls, refused),
        place(lines("bytes"), (19, 3, 5, 6), "Memory", held, memory, cache),
    ]


def say() -> list[Panel]:
    """What do the probes say?"""
    of = "sum by (probe, version, reduction, label)"
    flagged, scored = (f"{of} (rate(probescore_probe_{name}{{{PROBE},{SERVER}}}[5m]))" for name in ("flagged_total", "score_count"))
    share = query(f"{flagged} / ({scored} > 0)", DISTRIBUTION)
    buckets = f"sum by (probe, version, reduction, label, le) (rate(probescore_probe_score_bucket{{{PROBE},{SERVER}}}[5m]))"
    quantiles = [query(f"histogram_quantile({q}, {buckets})", f"p{round(100 * q)} {DISTRIBUTION}") for q in (0.1, 0.5, 0.9)]
    digests = f"max by (probe, version, unit, graph_sha256, manifest_sha256) (probescore_probe_info{{{PROBE},{SERVER}}})"
    hidden = models.DataTransformerConfig(id_val="organize", options={"excludeByName": {"Time": True, "Value": True}})
    above = "Of the rollouts scored; the threshold is the calibration's."
    files = "Digests of the files that are served. Two lines for one version: replicas disagree."
    return [
        place(lines("percentunit").max(1), (0, 9, 8, 6), "Share at or above the threshold", above, share),
        place(lines("short", signed=True), (8, 9, 8, 6), "Scores: p10, p50, p90", "In the probe's own unit.", *quantiles),
        place(
            table.Panel().show_header(True).with_transformation(hidden),
            (16, 9, 8, 6),
            "Who they are",
            files,
            query(digests, instant=True).format(PromQueryFormat.TABLE),
        ),
    ]


def moving() -> list[Panel]:
    """Is their distribution moving?"""
    steps = [models.Threshold(None, "transparent"), models.Threshold(0.25, "red")]
    drift = lines("short").max(1).thresholds(dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps))
    drift = drift.thresholds_style(common.GraphThresholdsStyleConfig().mode(options.GraphThresholdsStyleMode.DASHED))
    shift = query(f"probe:probescore_probe_score:shift{{{PROBE}}}", DISTRIBUTION)
    buckets = query(f"sum by (le) (increase(probescore_probe_score_bucket{{{PROBE},{SERVER}}}[$__rate_interval]))", "{{le}}")
    distance = "Kolmogorov-Smirnov distance: 0 = as before, 1 = nothing in common."
    scale = "Choose one probe above: probes do not share a scale."
    return [
        place(drift, (0, 15, 10, 6), "Shift of the last 30 minutes against the last day", distance, shift),
        place(heatmap.Panel().calculate(False), (10, 15, 14, 6), "Scores over time", scale, buckets.format(PromQueryFormat.HEATMAP)),
    ]


def verdicts() -> list[Panel]:
    """What is said of the probes now?"""
    hidden = dict.fromkeys(("Time", "Value", "__name__", "instance", "job"), True)
    shown = models.DataTransformerConfig(id_val="organize", options={"excludeByName": hidden})
    said = query(f"probescore_audit_verdict{{{AUDITED}}} == 1", instant=True).format(PromQueryFormat.TABLE)
    behind = 'probescore_audit_step{run=~"$run"} - on (instance, run) group_right () probescore_audit_labelled_step'
    numbers = [
        (number(1).decimals(0), "Alarms", "Monitors that raised one: stop the run.", f"sum(probescore_audit_alarm{{{AUDITED}}})"),
        (number(), "Step", "The last of the record, of the run that is furthest.", 'max(probescore_audit_step{run=~"$run"})'),
        (number(20).decimals(0), "Steps without labels", "By which the labels are behind.", f"max({behind})"),
        (
            number(30).unit("m").decimals(0),
            "Since the last audit",
            "An audit is made when the record has grown.",
            '(time() - min(probescore_audit_audited_seconds{run=~"$run"})) / 60',
        ),
    ]
    table_of = table.Panel().show_header(True).with_transformation(shown)
    placed = place(table_of, (0, 0, 12, 6), "Verdicts", "On the last labelled steps; what each means is in the how-to on audits.", said)
    return [
        placed,
        *(
            place(panel, (12 + 3 * index, 0, 3, 6), title, description, query(expr))
            for index, (panel, title, description, expr) in enumerate(numbers)
        ),
    ]


def estimates() -> list[Panel]:
    """What do the verdicts rest on?"""
    bounded = {"recall": "recall", "missed": "missed rate"}
    asked = [
        ("positive_rate", "With the behaviour", "Share of the rollouts, with the ends of its 95% interval."),
        ("recall", "Recall", "Flagged of those with the behaviour; the bound is what the monitor accepts at least."),
        ("missed", "There and missed", "Of all rollouts; the bound is what the monitor accepts at most."),
        ("false_positive_rate", "False alarms", "Flagged of those without the behaviour."),
        ("auroc", "AUROC", "Approximate."),
        (
            "honest_share",
            "Real part of the fall",
            "Of a fall of detections, the part that is not missed. None if detections have not fallen.",
        ),
    ]
    drawn = []
    for index, (name, title, description) in enumerate(asked):
        targets = [query(f"probescore_audit_{name}{{{AUDITED}}}", f"{AUDIT} {{{{bound}}}}")]
        if name in bounded:
            targets.append(query(f'probescore_audit_bound{{{AUDITED},monitor="{bounded[name]}"}}', f"{AUDIT} bound"))
        at = (8 * (index % 3), 6 + 9 * (index // 3), 8, 9)
        drawn.append(place(lines("none" if name == "auroc" else "percentunit"), at, title, description, *targets))
    return drawn


def build() -> models.Dashboard:
    """The dashboard of servers."""
    built = (
        _started("probescore", "probescore")
        .with_variable(_choice("instance", "Server", "label_values(probescore_ready, instance)"))
        .with_variable(_choice("probe", "Probe", "label_values(probescore_probe_info, probe)"))
    )
    return _with_panels(built, [*healthy(), *fast(), *say(), *moving()])


def build_audit() -> models.Dashboard:
    """The dashboard of runs that are audited."""
    built = (
        _started("probescore: do the probes still work?", "probescore-audit")
        .with_variable(_choice("run", "Run", "label_values(probescore_audit_step, run)"))
        .with_variable(_choice("probe", "Probe", "label_values(probescore_audit_verdict, probe)"))
        .with_variable(_choice("reading", "Reading", "label_values(probescore_audit_verdict, reading)"))
    )
    return _with_panels(built, [*verdicts(), *estimates()])


BUILT = {"probescore.json": build, "probescore-audit.json": build_audit}


def _started(title: str, identity: str) -> dashboard.Dashboard:
    return (
        dashboard.Dashboard(title)
        .uid(identity)
        .tags(["probescore"])
        .refresh("30s")
        .time("now-3h", "now")
        .timezone("browser")
        .editable()
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
    )


def _with_panels(built: dashboard.Dashboard, panels: list[Panel]) -> models.Dashboard:
    for identity, panel in enumerate(panels, start=1):
        built = built.with_panel(panel.id(identity))
    return built.build()


def encode(built: models.Dashboard) -> str:
    """As JSON, the way it is kept."""
    for variable in built.templating.list_val or []:
        # of interval variables only; Grafana's schema does not know them on others
        variable.auto = variable.auto_count = variable.auto_min = None
    return JSONEncoder(sort_keys=True, indent=2).encode(built) + "\n"


def _choice(name: str, label: str, values: str) -> dashboard.QueryVariable:
    every = models.VariableOption(text="All", value="$__all", selected=True)
    variable = dashboard.QueryVariable(name).label(label).query({"query": values, "refId": name}).datasource(DATASOURCE)
    return variable.multi(True).include_all(True).all_value(".*").current(every).refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)


if __name__ == "__main__":
    DASHBOARDS.mkdir(exist_ok=True)
    for name, each in BUILT.items():
        (DASHBOARDS / name).write_text(encode(each()))
