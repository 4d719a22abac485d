"""Rules and dashboards speak of metrics that exist, with labels that those have; each alert has its page; promtool agrees, where it is."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from hafnium_manifests import ROOT, Json, load

from hafnium_contract.metric_names import ALL

RULES = ROOT / "kustomize/components/monitoring/rules.yaml"
DASHBOARDS = sorted((ROOT / "kustomize/components/monitoring/dashboards").glob("*.json"))
RUNBOOKS = ROOT / "docs/runbooks.md"
SCRAPED = {"namespace", "pod", "le", "serving_kserve_io_inferenceservice"}
"""Labels that Prometheus adds: its own, and the pod's label that the PodMonitor names."""
SERIES = {n: {*m.labels, *SCRAPED} for m in ALL
          for n in ((m.name,) if m.kind != "histogram" else (f"{m.name}_bucket", f"{m.name}_sum", f"{m.name}_count"))}
EXTERNAL = {"up"}
"""Prometheus' own."""
WORDS = {
    "sum", "max", "min", "avg", "count", "rate", "increase", "histogram_quantile", "by", "on", "ignoring", "without", "group_left",
    "group_right", "absent", "min_over_time", "max_over_time", "last_over_time", "label_join", "label_replace", "and", "or", "unless",
    "bool", "vector", "offset",
}


def groups() -> list[Json]:
    return yaml.safe_load(RULES.read_text(encoding="utf-8"))["spec"]["groups"]


def rules() -> list[Json]:
    return [r for g in groups() for r in g["rules"]]


def expressions() -> list[tuple[str, str]]:
    found = [(r.get("alert") or r["record"], r["expr"]) for r in rules()]
    for path in DASHBOARDS:
        board = json.loads(path.read_text(encoding="utf-8"))
        found += [(f"{board['uid']}: {p['title']}", t["expr"]) for p in board["panels"] for t in p.get("targets", [])]
        found += [(f"{board['uid']}: ${v['name']}", v["query"]) for v in board["templating"]["list"] if v["type"] == "query"]
    for o in load("prod.yaml"):
        if o["kind"] == "ModelRollout":
            found += [(f"{c} scales by", m["external"]["metric"]["query"]) for c, s in o["spec"]["service"].items()
                      for m in s["autoScaling"]["metrics"] if m["type"] == "External"]
    return found


def metrics_of(expression: str) -> set[str]:
    """Names that stand where a metric does: not in braces, not in a list of labels, no function."""
    text = re.sub(r"\{[^}]*\}|\[[^\]]*\]", " ", re.sub(r'"[^"]*"', '""', expression))
    text = re.sub(r"\b(by|on|ignoring|without|group_left|group_right)\s*\([^)]*\)", r"\1 ", text)
    text = re.sub(r"label_values\(([^,]*),[^)]*\)", r"\1", text)
    return set(re.findall(r"(?<![\w.:$])[a-z_][a-z0-9_:]*", text)) - WORDS


@pytest.mark.parametrize(("where", "expression"), expressions())
def test_metrics_and_their_labels_exist(where: str, expression: str) -> None:
    recorded = {r["record"] for r in rules() if "record" in r}
    names = metrics_of(expression)
    assert names, f"{where}: no metric in {expression}"
    assert names <= set(SERIES) | recorded | EXTERNAL, f"{where}: unknown {names - set(SERIES) - recorded - EXTERNAL}"
    known = set().union(*(SERIES.get(n, {x for m in ALL for x in m.labels} | SCRAPED) for n in names))
    for selector in re.findall(r"\{([^}]*)\}", re.sub(r'"[^"]*"', '""', expression)):
        labels = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector))
        assert labels <= known, f"{where}: {labels - known} are no labels of {names}"
    for grouped in re.findall(r"(?:by|on|group_left|ignoring) \(([^)]*)\)", expression):
        labels = {x.strip() for x in grouped.split(",") if x.strip()}
        assert labels <= known, f"{where}: {labels - known} are no labels of {names}"


def test_a_wrong_metric_or_label_is_found() -> None:
    for wrong in ("sum(rate(inference_request_total[5m]))", 'sum by (version) (rate(inference_requests_total[5m]))',
                  'inference_requests_total{model="a"}', "absent(modelrollout_leaders)"):
        with pytest.raises(AssertionError):
            test_metrics_and_their_labels_exist("wrong", wrong)


@pytest.mark.parametrize(("where", "expression"), [(w, e) for w, e in expressions() if w.startswith("hafnium-")])
def test_panels_show_the_chosen_namespaces_and_keep_rollouts_and_models_of_one_name_apart(where: str, expression: str) -> None:
    if not where.endswith("$namespace"):
        for name in metrics_of(expression) - {"modelrollout_leader"}:  # the operator is one for all
            for selector in re.findall(rf"\b{name}\b(\{{[^}}]*\}})?", expression):
                assert 'namespace=~"$namespace' in selector, f"{where}: {name} of all namespaces"
    for grouped in re.findall(r"(?:by|on) \(([^)]*)\)", expression):
        labels = {x.strip() for x in grouped.split(",")}
        assert not labels & {"rollout", "model_name", "model_version"} or "namespace" in labels, f"{where}: by ({grouped})"
        assert "model_version" not in labels or "model_name" in labels, f"{where}: versions of several models in by ({grouped})"


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda p: p.stem)
def test_a_curve_is_named_by_all_that_it_is_grouped_by(path: Path) -> None:
    for panel in json.loads(path.read_text(encoding="utf-8"))["panels"]:
        for target in panel.get("targets", []):
            grouped = {x.strip() for g in re.findall(r"by \(([^)]*)\)", target["expr"]) for x in g.split(",")} - {"le"}
            if target.get("format") != "table":
                assert {*re.findall(r"{{(\w+)}}", target["legendFormat"])} == grouped, f"{panel['title']}: {target}"


def test_each_alert_has_its_page_and_each_page_its_alert() -> None:
    alerts = [r for r in rules() if "alert" in r]
    text = RUNBOOKS.read_text(encoding="utf-8")
    pages = re.findall(r"^## (\w+)$", text, re.MULTILINE)
    assert pages == [a["alert"] for a in alerts]
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        for heading in ("**Meaning.**", "**Impact.**", "**Diagnosis.**", "**Mitigation.**"):
            assert heading in section, section.split("\n")[0]
    for a in alerts:
        assert a["labels"]["severity"] in ("critical", "warning"), a["alert"]
        assert a["annotations"]["summary"], a["alert"]
        assert a["annotations"]["runbook"] == f"docs/runbooks.md#{a['alert'].lower()}"


def promtool() -> str:
    path = shutil.which("promtool")
    if path is None:
        pytest.skip("no promtool on the PATH (Debian: apt-get install prometheus)")
    return path


def test_promtool_takes_the_rules_and_every_expression_of_the_dashboards(tmp_path: Path) -> None:
    program = promtool()
    panels = [{"record": f"panel:{i}", "expr": e.replace("$__rate_interval", "5m")} for i, (_, e) in enumerate(expressions())
              if "label_values(" not in e]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [*groups(), {"name": "panels", "rules": panels}]}), encoding="utf-8")
    done = subprocess.run([program, "check", "rules", "rules.yaml"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def case(series: Json, alert: str, minute: int, fires: bool) -> Json:
    """Whether ALERTS says that it fires, by its number: labels and texts aren't spelled out again."""
    return {
        "interval": "1m", "input_series": [{"series": k, "values": v} for k, v in series.items()],
        "promql_expr_test": [{
            "expr": f'count(ALERTS{{alertname="{alert}",alertstate="firing"}}) or vector(0)', "eval_time": f"{minute}m",
            "exp_samples": [{"labels": "{}", "value": 1 if fires else 0}],
        }],
    }


M = 'component="transformer",model_name="risk",model_version="1",namespace="risk",pod="a"'
L = 'model_name="risk",namespace="risk",pod="a"'
R = 'namespace="risk",rollout="risk"'
S = 'serving_kserve_io_inferenceservice="risk-0123abcd"'
P = M.replace('pod="a"', 'pod="b"')
ROLLOUT = f'modelrollout_info{{{R},stable_service="risk-0123abcd",stable_digest="sha256:0123abcd4567",candidate_digest="sha256:89ab"}}'
C = f'namespace="risk",pod="c",{S}'
UP, UP_P = (f'up{{namespace="risk",pod="{pod}",{S}}}' for pod in "ab")


def of_service(name: str, series: dict[str, str]) -> dict[str, str]:
    """The same of another service."""
    return {k.replace("0123abcd", name): v for k, v in series.items()}


CASES = {
    # alert: (series with values a minute, minute at which it is silent, minute at which it fires)
    "HafniumErrorsHigh": (
        {f"inference_requests_total{{{M}}}": "0+6000x60", f'inference_errors_total{{{M},type="unavailable"}}': "0+120x60"}, 9, 12),
    # A model lacks a feature in all its rows, beside another one with twenty times its rows
    "HafniumFeaturesMissing": (
        {f'feature_missing_total{{{L},feature_name="mcc"}}': "0+60x60", f"feature_rows_total{{{L}}}": "0+60x60",
         f"feature_rows_total{{{L}}}".replace('model_name="risk"', 'model_name="other"'): "0+1200x60",
         f"inference_requests_total{{{M}}}": "0+60x60",
         f"inference_requests_total{{{M}}}".replace('model_name="risk"', 'model_name="other"'): "0+1200x60"}, 14, 17),
    # The store is gone from minute 10 on: two lookups a minute try, the others are not asked
    "HafniumFeatureStoreFailing": (
        {f"feature_lookup_seconds_count{{{L}}}": "0+600x10 6002+2x50",
         f'feature_lookup_failures_total{{{L},type="unavailable"}}': "0x10 2+2x50",
         f'feature_lookup_failures_total{{{L},type="not_asked"}}': "0x10 600+600x50"}, 15, 18),
    # One burst, of one moment
    "HafniumInferenceLogDropping": ({f'inference_log_dropped_total{{{L},reason="queue_full"}}': "0x10 100000x100"}, 10, 12),
    # The predictor's pod goes at minute 10, and with it its series, five minutes later at most; the transformer's stays
    "HafniumPredictorsGone": (
        {f"inference_requests_total{{{M},{S}}}": "0+600x10 6000x400", f"inference_log_rows_total{{{L},{S}}}": "0x400",
         f"model_info{{{L},{S}}}": "1x10 stale"}, 13, 14),
    # The transformers' pods go at minute 10; the predictor's stay
    "HafniumTransformersGone": (
        {f"inference_requests_total{{{M},{S}}}": "0+600x10 stale", f"inference_active{{{L},{S}}}": "1x10 stale",
         f"model_info{{{P},{S}}}": "1x400", UP: "1x10 stale", UP_P: "1x400"}, 13, 14),
    "HafniumOperatorDown": ({"modelrollout_leader{pod=\"a\"}": "0x60", "modelrollout_leader{pod=\"b\"}": "0x60"}, 1, 2),
    "HafniumOperatorFailing": ({f"modelrollout_failing_seconds{{{R}}}": "0x10 0+60x60"}, 16, 17),
    "HafniumRolloutGateBlind": ({f'modelrollout_blind_seconds{{{R},gate="errors"}}': "0+60x60"}, 15, 16),
    "HafniumRolloutWaitsForPerson": ({f'modelrollout_phase{{{R},phase="Paused"}}': "1x300"}, 239, 240),
    "HafniumRolloutWeightStuck": (
        {f'modelrollout_weight{{{R},kind="desired"}}': "25x60", f'modelrollout_weight{{{R},kind="observed"}}': "5x60"}, 14, 15),
    "HafniumRolloutRollbackUnconfirmed": ({f"modelrollout_rollback_unconfirmed_seconds{{{R}}}": "0x10 0+60x60"}, 26, 27),
    "HafniumRecordHasGaps": ({f"modelrollout_record_lost_total{{{R}}}": "0x10 3x50"}, 9, 12),
    # some each hour, that are gone at the next look, are as it should be
    "HafniumEvidenceNotRemoved": ({'modelrollout_evidence_surplus{namespace="risk"}': "5 0x58 5 0x58 5x450"}, 538, 541),
}
GONE = {f"inference_requests_total{{{M},{S}}}": "0+600x10 stale", f"inference_active{{{L},{S}}}": "1x10 stale",
        f"model_info{{{P},{S}}}": "1x10 stale", UP: "1x10 stale", UP_P: "1x10 stale"}
"""Of a service of which nothing is left: deleted, scaled to 0, or all its pods without a node."""
OUTAGES = {
    "no pod of the stable model's service is left": {**GONE, ROLLOUT: "1x400"},
    "its pods are there and can't be scraped": {**GONE, UP: "1x10 0x400", UP_P: "1x10 0x400"},
    # Redis goes at minute 10; HafniumFeatureStoreFailing ends with the pods that were started anew at 30, and now wait for it
    "transformers wait for a store that is gone": {
        f"inference_requests_total{{{M},{S}}}": "0+600x30 stale", f"inference_active{{{L},{S}}}": "1x30 stale", UP: "1x30 stale",
        f"feature_lookup_seconds_count{{{L},{S}}}": "0+600x10 6002+2x20 stale",
        f'feature_lookup_failures_total{{{L},{S},type="unavailable"}}': "0x10 2+2x20 stale",
        f'feature_lookup_failures_total{{{L},{S},type="not_asked"}}': "0x10 600+600x20 stale",
        f"model_info{{{P},{S}}}": "1x400", UP_P: "1x400",
        f"inference_active{{{C}}}": "_x30 0x400", f"up{{{C}}}": "_x30 1x400"},
}
NEVER = {
    # One row of a thousand lacks it, in every request
    "HafniumFeaturesMissing": {
        f'feature_missing_total{{{L},feature_name="mcc"}}': "0+60x60", f"feature_rows_total{{{L}}}": "0+60000x60",
        f"inference_requests_total{{{M}}}": "0+60x60"},
    # A minute without Redis, and a client that gives its lookups no time
    "HafniumFeatureStoreFailing": {
        f"feature_lookup_seconds_count{{{L}}}": "0+600x60", f'feature_lookup_failures_total{{{L},type="unavailable"}}': "0x53 400x7",
        f'feature_lookup_failures_total{{{L},type="hurry"}}': "0+500x60"},
    # A candidate whose predictor never came up, a service that somebody took away, and one whose model server is somebody else's
    "HafniumPredictorsGone": {
        f"inference_requests_total{{{M},{S}}}": "0x60", f"inference_log_rows_total{{{L},{S}}}": "0x60",
        f'inference_requests_total{{{M.replace("risk", "old")},{S.replace("risk", "old")}}}': "0+600x30 stale",
        f'inference_log_rows_total{{{L.replace("risk", "old")},{S.replace("risk", "old")}}}': "0x30 stale",
        f'model_info{{{L.replace("risk", "old")},{S.replace("risk", "old")}}}': "1x30 stale",
        f'inference_requests_total{{{M.replace("risk", "other")},{S.replace("risk", "other")}}}': "0+600x60",
        f'inference_log_rows_total{{{L.replace("risk", "other")},{S.replace("risk", "other")}}}': "0x60"},
    # A candidate that waits since it came and was asked by somebody, a service that was deleted or scaled to 0, one that a promotion
    # retired (its rollout is there and names another), a night without requests in which a transformer was restarted, and one of the
    # release before
    "HafniumTransformersGone": {
        f"inference_requests_total{{{M},{S}}}".replace('model_version="1"', 'model_version="none"'): "0+6x60",
        f"inference_active{{{L},{S}}}": "0x60", UP: "1x60",
        **of_service("deleted", GONE), **of_service("89ab89ab", GONE), ROLLOUT: "1x60",
        **{k.replace("risk-0123abcd", "risk"): v for k, v in GONE.items()},  # adopted, named as the rollout, and retired by a promotion
        **of_service("night", {**GONE, f"inference_active{{{C}}}": "_x10 0x1 1x50", f"up{{{C}}}": "_x10 1x50"}),
        **of_service("older", {f"inference_requests_total{{{M},{S}}}": "0+600x60", UP: "1x60"})},
    "HafniumErrorsHigh": {
        f"inference_requests_total{{{M}}}": "0+6000x60", f'inference_errors_total{{{M},type="invalid_row"}}': "0+1200x60",
        f'inference_errors_total{{{M},type="too_large"}}': "0+1200x60", f'inference_errors_total{{{M},type="not_found"}}': "0+1200x60"},
    "HafniumOperatorDown": {"modelrollout_leader{pod=\"a\"}": "0x60", "modelrollout_leader{pod=\"b\"}": "1x60"},
    "HafniumRolloutWeightStuck": {
        f'modelrollout_weight{{{R},kind="desired"}}': "5x60", f'modelrollout_weight{{{R},kind="observed"}}': "5x60"},
}


PAUSED, DESIRED, OBSERVED = (f"modelrollout_{x}}}" for x in (
    f'phase{{{R},phase="Paused"', f'weight{{{R},kind="desired"', f'weight{{{R},kind="observed"'))
MOVED = {k.replace(R, f'{R},pod="b"'): v for k, v in {PAUSED: "_x211 1x400", DESIRED: "_x11 25x60", OBSERVED: "_x11 5x60"}.items()}
"""Of the pod that leads from then on: a minute after the one before it knew nothing any more."""
MORE = [
    *(case({PAUSED: "1x209 stale", **MOVED}, "HafniumRolloutWaitsForPerson", minute, minute == 241) for minute in (239, 241)),
    *(case({DESIRED: "25x9 stale", OBSERVED: "5x9 stale", **MOVED}, "HafniumRolloutWeightStuck", minute, minute == 16)
      for minute in (14, 16)),
    # a weight that is raised while the gateway follows within a minute each time
    case({DESIRED: "5x20 25x20 50x20", OBSERVED: "5x21 25x20 50x20"}, "HafniumRolloutWeightStuck", 55, False),
    # ended long before, and Retry: each pause begins anew
    case({PAUSED: "1x200 0x10 1x100"}, "HafniumRolloutWaitsForPerson", 300, False),
    # the first turn of the operator that leads now finds the change; the one before it had seen others
    *(case({f"modelrollout_external_change_total{{{R},pod=\"a\"}}": "2x99 stale",
            f"modelrollout_external_change_total{{{R},pod=\"b\"}}": "_x100 1x200"}, "HafniumRouteChangedOutside", minute, fires)
      for minute, fires in ((99, False), (101, True), (150, True), (170, False))),
    *(case({f"modelrollout_record_lost_total{{{R}}}": "_x10 1x100"}, "HafniumRecordHasGaps", minute, fires)
      for minute, fires in ((9, False), (11, True), (90, False))),
    # Prometheus itself was away for half an hour: nothing new
    case({f"modelrollout_external_change_total{{{R}}}": "2x100 _x30 2x100"}, "HafniumRouteChangedOutside", 165, False),
]


def test_alerts_fire_at_their_edge_and_not_before(tmp_path: Path) -> None:
    program = promtool()
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": groups()}), encoding="utf-8")
    cases: list[Json] = []
    for alert, (series, silent, fires) in CASES.items():
        cases += [case(series, alert, silent, False), case(series, alert, fires, True)]
    cases += [case(series, alert, 59, False) for alert, series in NEVER.items()]
    for alert in ("HafniumPredictorsGone", "HafniumTransformersGone"):  # beyond a day
        cases.append(case({k: v.replace("x400", "x1600") for k, v in CASES[alert][0].items()}, alert, 1590, True))
    cases += MORE
    unseen = {f'modelrollout_weight{{{R},kind="desired"}}': "25x60", f'modelrollout_weight{{{R},kind="observed"}}': "25x10 stale"}
    cases += [case(unseen, "HafniumRolloutWeightStuck", minute, minute == 26) for minute in (25, 26)]  # what isn't seen is not as wanted
    cases.append(case({"up": "1x60"}, "HafniumOperatorDown", 5, True))  # no series at all is no leader either
    agree(program, tmp_path, cases)


@pytest.mark.parametrize("outage", OUTAGES)
def test_somebody_is_called_for_as_long_as_no_transformer_is_left(tmp_path: Path, outage: str) -> None:
    program = promtool()
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": groups()}), encoding="utf-8")
    alerts = ("HafniumTransformersGone", "HafniumFeatureStoreFailing")
    minutes = {"its pods are there and can't be scraped": (14, 300), "no pod of the stable model's service is left": (14, 300)}
    cases = [case(OUTAGES[outage], alerts[0], minute, True) for minute in minutes.get(outage, (35, 60, 300))]
    if outage not in minutes:  # no minute between them in which nobody is called
        cases += [case(OUTAGES[outage], alerts[1], minute, True) for minute in (20, 34)]
    agree(program, tmp_path, cases)


def agree(program: str, tmp_path: Path, cases: list[Json]) -> None:
    """Each by itself, so that the first that is wrong is named."""
    for i, c in enumerate(cases):
        every = "10m" if int(c["promql_expr_test"][0]["eval_time"].removesuffix("m")) > 1000 else "1m"
        (tmp_path / f"test-{i}.yaml").write_text(
            yaml.safe_dump({"rule_files": ["rules.yaml"], "evaluation_interval": every, "tests": [c]}), encoding="utf-8")
        done = subprocess.run(
            [program, "test", "rules", f"test-{i}.yaml"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
        wanted = c["promql_expr_test"][0]
        assert done.returncode == 0, f"{wanted}: {done.stdout}{done.stderr}"
