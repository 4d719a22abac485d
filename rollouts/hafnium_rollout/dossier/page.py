"""Facts → one HTML text: nothing outside of it is loaded, every text is escaped, and it reads as well on paper. Pure."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta

import yaml

from hafnium_contract.durations import format_duration
from hafnium_contract.evidence import EvidenceSpec
from hafnium_rollout.approvals import refusal
from hafnium_rollout.dossier.facts import Facts
from hafnium_rollout.dossier.plots import VERDICT_COLOURS, GateTrace, bounds_plot, gate_trace, statistic_plot, weights_plot
from hafnium_rollout.gate_spec import Gate
from hafnium_rollout.intake import alpha_parts, alphas_of
from hafnium_rollout.record_lines import rollout_data
from hafnium_rollout.status import GateStatus, HistoryPoint, ModelSeen
from hafnium_rollout.stores import Approval

VALUES_MAX = 60
"""Rows of one finding that are shown: the drifted ones and the largest. The rest is counted."""
FINDINGS_MAX = 40
WISH_EVENTS = ("Promote", "SkipStep", "Retry", "ActionIgnored")
"""By which history tells of people's wishes, beside a rollback with the reason Aborted."""
_STYLE = """
:root{color-scheme:light}
body{font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif;color:#22303c;max-width:60rem;margin:2rem auto;padding:0 1.2rem}
h1{font-size:1.55rem;margin:0 0 .2rem} h2{font-size:1.15rem;margin:2.2rem 0 .6rem;border-bottom:2px solid #e3e7ea;padding-bottom:.2rem}
h3{font-size:1rem;margin:1.4rem 0 .2rem} p{margin:.4rem 0} .sum{font-size:1.08rem} .note{color:#5b6873;font-size:.88rem}
table{border-collapse:collapse;width:100%;font-size:.88rem} caption{text-align:left;color:#5b6873;padding:.2rem 0}
td,th{text-align:left;vertical-align:top;padding:.22rem .6rem .22rem 0;border-bottom:1px solid #e3e7ea;overflow-wrap:break-word}
th{font-weight:600} td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap} td.t{white-space:nowrap}
svg{width:100%;height:auto;font:11px system-ui,sans-serif} figure{margin:.4rem 0} code{overflow-wrap:anywhere}
code,pre{font:12px/1.45 ui-monospace,Menlo,monospace}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#f6f8f9;padding:.8rem;border-radius:4px}
.Pass,.Promoted{color:#2a7f4f;font-weight:600}.Fail,.RolledBack,.alert{color:#b3262e;font-weight:600}
.Error{color:#7a3fa0;font-weight:600}.NoData,.Paused{color:#a06c00;font-weight:600}.Inconclusive{color:#5b6873;font-weight:600}
@page{size:A4;margin:15mm}
@media print{body{max-width:none;margin:0;padding:0;font-size:10.5pt} h2,h3{break-after:avoid} figure,tr{break-inside:avoid}
thead{display:table-header-group} pre{background:none;border:1px solid #ccc}}
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""The browser itself holds the page to it: no script, and nothing from elsewhere."""


def page(facts: Facts) -> str:
    """The whole file."""
    candidate = facts.candidate  # a queued model doesn't take its place
    title = f"Rollout of {facts.rollout.name} {candidate.version if candidate and candidate.version else facts.rollout.spec.model.version}"
    parts = [
        f"<h1>{_e(title)}</h1>",
        f'<p class="note">Namespace {_e(facts.rollout.metadata.namespace)}. Written {_when(facts.made_at)} by Hafnium {_e(facts.version)}. '
        f"sha256 of the inputs: <code>{facts.sha256}</code></p>",
        f'<p class="sum">{summary(facts)}</p>', _unknown(facts), _identity(facts), _weights(facts), _gates(facts),
        _evidence(facts), _people(facts), _timeline(facts), _spec(facts), _sources(facts),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{html.escape(_POLICY, quote=True)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_e(title)}</title><style>{_STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _e(text: object) -> str:
    return html.escape(str(text), quote=True)


def _when(time: datetime | None) -> str:
    return "–" if time is None else f"{time:%Y-%m-%d %H:%M:%S} UTC"


def _duration(value: timedelta) -> str:
    return format_duration(timedelta(seconds=round(value.total_seconds())))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str = "", numbers: Sequence[int] = ()) -> str:
    """Cells are HTML already. `numbers`: columns that are right-aligned."""
    def cell(tag: str, i: int, text: str) -> str:
        return f'<{tag} class="n">{text}</{tag}>' if i in numbers else f"<{tag}>{text}</{tag}>"

    top = f"<thead><tr>{''.join(cell('th', i, h) for i, h in enumerate(head))}</tr></thead>" if head else ""
    body = "".join("<tr>" + "".join(cell("td", i, c) for i, c in enumerate(r)) + "</tr>" for r in rows)
    return f"<table>{f'<caption>{_e(caption)}</caption>' if caption else ''}{top}<tbody>{body}</tbody></table>"


def _model(version: str, digest: str) -> str:
    return f"Model {_e(version)} (<code>{_e(digest[:19])}</code>)"


def summary(facts: Facts) -> str:
    """The sentence for who reads no further, as HTML."""
    status, model = facts.status, facts.rollout.spec.model
    candidate, stable = facts.candidate, status.stable
    who = _model(candidate.version or model.version, candidate.digest or model.digest) if candidate else _model(model.version, model.digest)
    last = next((p for p in reversed(facts.history) if p.event in ("Promoted", "RolledBack", "Paused")), None)
    end = last.time if last is not None else facts.history[-1].time if facts.history else None
    took = f" after {_duration(end - status.started_at)}" if end is not None and status.started_at is not None else ""
    # What ended it, not what came after: a wish that had nothing left to act on is the status' last word, too.
    taken_back = status.phase == "RolledBack" or status.taken_back is not None
    ended = "RolledBack" if taken_back else status.phase
    told = last if last is not None and ended in ("RolledBack", "Paused") and last.event == ended else status
    why = f"{_e(told.reason)}: {_e(told.message)}"
    if status.taken_back is not None and stable is not None:
        version = stable.version or (model.version if model.digest == stable.digest else "")
        return (f"{_model(version, stable.digest)} is in production; the last run, of {who}, was "
                f'<span class="RolledBack">taken back</span>{took}. {why}')
    if status.phase == "Promoted":
        gates = [g for g in status.gates if g.role != "Advisory"]
        on = f" Its gates at the end: {', '.join(f'{_e(g.name)} {_e(g.verdict)}' for g in gates)}." if gates else ""
        return f'{who} was <span class="Promoted">promoted</span>{took}.{on}'
    if status.phase == "RolledBack":
        return f'{who} was <span class="RolledBack">taken back</span>{took}. {why}'
    if status.phase == "Paused":
        return f'{who} is <span class="Paused">paused</span>{took}; a person has to decide. {why}'
    step = status.step
    share = "an unknown share" if step is None or step.weight_observed is None else f"{step.weight_observed} %"
    at = "" if step is None else f" at step {step.index}, " + ("in shadow" if step.shadow_observed else f"with {share} of requests")
    return f"{who} is under way{at}: {_e(status.phase)}. {why}"


def _unknown(facts: Facts) -> str:
    if not facts.unknown:
        return ""
    return ('<p><span class="alert">Not on this page</span>, nor in its sums, because what wrote it is newer than Hafnium '
            f"{_e(facts.version)}: {_e(', '.join(facts.unknown))}.</p>")


def _identity(facts: Facts) -> str:
    def row(title: str, model: ModelSeen | None) -> list[str]:
        if model is None:
            return [title, "–", "–", "–", "–"]
        digest = f"<code>{_e(model.digest or 'not known')}</code>"
        return [title, _e(model.version or "–"), digest, _e(model.storage_uri or "–"), _e(model.service)]

    status = facts.status
    rows = [row("candidate", facts.candidate), row("stable now", status.stable)]
    rows += [row("stable before", m) for m in status.previous[:3]]
    out = ["<h2>Models</h2>", _table(["", "version", "digest", "storageUri", "service"], rows)]
    if status.rejected_digests:
        listed = ", ".join(f"<code>{_e(d)}</code>" for d in status.rejected_digests)
        out.append(f"<p>Rejected digests, which only a person's <i>retry</i> lets in again: {listed}</p>")
    return "".join(out)


def _weights(facts: Facts) -> str:
    plot = weights_plot(facts.history)
    return "<h2>Weights over time</h2>" + (f"<figure>{plot}</figure>" if plot else "<p>Nothing was seen yet.</p>")


def _gates(facts: Facts) -> str:
    spec = facts.rollout.spec
    parts = alpha_parts(spec)
    latest = {g.name: g for g in facts.status.gates}
    out = [
        "<h2>Gates</h2>",
        '<p class="note">The band is a confidence sequence of candidate − stable in percentage points, valid at every look at the gate’s '
        "alpha. A gate passes when the band lies below the margin, and fails when it lies above what is harmless. Evidence for Pass begins "
        "anew with each step (dotted lines). Dots are verdicts: "
        + ", ".join(f'<span style="color:{c}">●</span> {v}' for v, c in VERDICT_COLOURS.items()) + ".</p>",
    ]
    for gate in spec.gates:
        trace, alpha_fail = gate_trace(gate, facts.history), alphas_of(gate, parts)[0]
        out.append(f"<h3>{_e(gate.name)} <span class=\"note\">{_e(gate.role)}, {_e(_question(gate))}</span></h3>")
        out.append(_gate_line(latest.get(gate.name)))
        out += [f"<figure>{plot}</figure>" for plot in _gate_plots(gate, trace, alpha_fail) if plot]
    return "".join(out)


def _question(gate: Gate) -> str:
    if gate.latency is not None:
        what = f"share slower than {format_duration(gate.latency.slower_than)}"
    else:
        what = {"requests": "share of failed requests", "prometheus": "share of bad requests by query",
                "scores": "scores of the same request"}.get(gate.kind, f"{gate.evidence.kind if gate.evidence else 'drift'} evidence")
    if not gate.counted and gate.kind != "scores":
        return what
    limit = f", hard limit {100 * gate.hard_limit:g} %" if gate.hard_limit is not None else ""
    margin = f"{100 * gate.margin:g} points" if gate.counted else f"{gate.margin:g}"
    return f"{what}: margin {margin}, alpha {gate.compare.alpha:g}{limit}"


def _gate_line(status: GateStatus | None) -> str:
    if status is None:
        return "<p>Not judged yet.</p>"
    return f'<p><span class="{_e(status.verdict)}">{_e(status.verdict)}</span>, {status.samples:,} samples: {_e(status.message)}</p>'


def _gate_plots(gate: Gate, trace: GateTrace, alpha_fail: float) -> list[str]:
    if not gate.counted and gate.kind != "scores":
        return [statistic_plot(trace, name="largest statistic of the finding", line=None, line_name="")]
    line = math.log(1.0 / gate.compare.alpha)
    return [bounds_plot(trace), statistic_plot(
        trace, name="ln of the e-value that speaks for the verdict", line=line,
        line_name=f"ln(1/alpha) for Pass; Fail needs {math.log((2.0 if gate.kind == 'scores' else 1.0) / alpha_fail):.1f}")]


def _evidence(facts: Facts) -> str:
    out = ["<h2>Findings of monitoring jobs</h2>"]
    if not facts.evidence:
        return out[0] + "<p>No job has written a finding about these models.</p>"
    shown = facts.evidence[-FINDINGS_MAX:]
    digests = {m.digest: n for n, m in (("stable", facts.status.stable), ("candidate", facts.candidate)) if m is not None}
    rows = [[
        _when(e.window_start), _when(e.window_end), _e(e.kind), _e(digests.get(e.model_digest, e.model_digest[:19])),
        f'<span class="{_e(e.verdict)}">{_e(e.verdict)}</span>', f"{e.samples:,}", _e(e.message) + (" (both arms)" if e.both_arms else ""),
        _e(e.report or e.job or "–"),
    ] for e in shown]
    more = f"; {len(facts.evidence) - len(shown)} older ones are not shown" if len(facts.evidence) > len(shown) else ""
    out.append(_table(["from", "to", "kind", "model", "verdict", "samples", "finding", "report"], rows, numbers=(5,),
                      caption=f"{len(facts.evidence)} findings{more}"))
    for kind in sorted({e.kind for e in facts.evidence}):
        last = [e for e in facts.evidence if e.kind == kind and e.values]
        if last:
            out.append(_values(last[-1]))
    return "".join(out)


def _values(finding: EvidenceSpec) -> str:
    ranked = sorted(finding.values, key=lambda v: (not v.drifted, -v.value if math.isfinite(v.value) else 0.0, v.name))
    rows = [[
        _e(v.name), _e(v.statistic), f"{v.value:.4g}", "–" if v.threshold is None else f"{v.threshold:.4g}",
        "–" if v.p_value is None else f"{v.p_value:.3g}", _e(v.compared_with), '<span class="Fail">yes</span>' if v.drifted else "no",
    ] for v in ranked[:VALUES_MAX]]
    more = f"; {len(ranked) - VALUES_MAX} smaller ones are not shown" if len(ranked) > VALUES_MAX else ""
    return f"<h3>Last {_e(finding.kind)} finding, value by value</h3>" + _table(
        ["measured on", "statistic", "value", "threshold", "p", "against", "beyond"], rows, numbers=(2, 3, 4),
        caption=f"window until {_when(finding.window_end)}, {finding.samples:,} rows of the model{more}")


def _people(facts: Facts) -> str:
    return "<h2>Who approved, who acted</h2>" + _approvals(facts) + _wishes(facts) + _outside(facts)


def _approvals(facts: Facts) -> str:
    required, stages = facts.rollout.spec.approvals.required, facts.counted.stages
    missing = [s for s in required if s not in stages]
    of = f"Approvals are of <code>{_e(facts.approved_digest)}</code>, trained by {_e(facts.trained_by or 'an unknown person')}. "
    out = [f"<p>{of}Required: {_e(', '.join(required)) or 'none'}. "
           + (f"Missing: {_e(', '.join(missing))}." if missing else "All are given." if required else "") + "</p>"]
    if facts.counted.refused:
        out.append(f'<p><span class="alert">Not counted</span>: {_e("; ".join(facts.counted.refused))}.</p>')
    queued = facts.rollout.spec.model.digest
    if queued != facts.approved_digest and facts.status.taken_back is None:
        out.append(f"<p>The ModelRollout asks for <code>{_e(queued)}</code> next: approvals of that one are no approvals of this one.</p>")
    if facts.approvals:
        rows = [[
            _when(a.time), _e(a.stage), _e(a.approver), f"<code>{_e(a.digest[:19])}</code>", _counts(facts, a)] for a in facts.approvals]
        out.append(_table(["when", "stage", "approver", "digest", "counts"], rows, caption="Approvals"))
    return "".join(out)


def _counts(facts: Facts, approval: Approval) -> str:
    """For this rollout's candidate."""
    if approval.digest != facts.approved_digest:
        return "no, of another model"
    return "no" if refusal(approval.approver, facts.trained_by) else "yes"


def _wishes(facts: Facts) -> str:
    out: list[str] = []
    if facts.asked:
        title = "Wishes of people" if facts.asked_from_record else "The last wish, as the ModelRollout still has it"
        out.append(_table(["seen", "what", "by, as claimed", "reason", "about", "id"], [[
            _when(a.time), _e(a.action.type), _e(a.action.requested_by or "not named"), _e(a.action.reason or "–"),
            f"<code>{_e(a.action.candidate_digest[:19])}</code>",
            _e(a.action.id) + ("" if a.action.id in facts.acted_on else " (not acted on)"),
        ] for a in facts.asked], caption=title))
    if facts.asked_from_record:
        return "".join(out) or "<p>No person asked for anything (promote, skip, abort, retry) in the recorded time.</p>"
    told = [p for p in facts.status.history if p.event in WISH_EVENTS or (p.event, p.reason) == ("Rollback", "Aborted")]
    if told:
        out.append(_table(["when", "what", "why, and by whom as claimed"], [[
            _when(p.time), _e("Abort" if p.reason == "Aborted" else p.event), _e(p.message)] for p in told],
            caption="Wishes that were acted on, from the status' history"))
    rest = "others may be missing here" if out else "it is not known whether any person asked for anything (promote, skip, abort, retry)"
    return "".join(out) + (
        f"<p>No record of the turns could be read: {rest}. A report with --record tells every wish of the recorded time.</p>")


def _outside(facts: Facts) -> str:
    outside = [p for p in facts.status.history if p.event == "ExternalChange" or p.reason == "AbortedOutside"]
    if outside:
        return _table(["when", "what"], [[_when(p.time), _e(p.message)] for p in outside], caption="Changes from outside")
    return "<p>The history tells of no change of the route by anybody else.</p>"


def _timeline(facts: Facts) -> str:
    def row(p: HistoryPoint) -> list[str]:
        share = "shadow" if p.shadow else f"{p.weight} %"
        wanted = "" if p.weight_desired is None else f"{p.weight_desired} %"
        name = f'<span class="alert">{_e(p.event)}</span>' if p.alert else _e(p.event)
        return [_when(p.time), name, _e(p.phase or "–"), wanted, share, _e(p.message)]

    events = [p for p in facts.status.history if p.event != "Look"]
    looks = len(facts.status.history) - len(events)
    return "<h2>What happened</h2>" + _table(
        ["when", "event", "phase", "wanted", "observed", "why"], [row(p) for p in events], numbers=(3, 4),
        caption=f"{len(events)} events, and {looks} looks without one. {facts.replayed}.")


def _spec(facts: Facts) -> str:
    text = yaml.safe_dump(rollout_data(facts.rollout), sort_keys=False, allow_unicode=True, width=110)
    return f"<h2>The exact ModelRollout</h2><pre>{_e(text)}</pre>"


def _sources(facts: Facts) -> str:
    rows = [[_e(s.name), f"<code>{s.sha256}</code>", f"{s.size_bytes:,}"] for s in facts.sources]
    return "<h2>Inputs</h2>" + _table(["input", "sha256", "bytes"], rows, numbers=(2,), caption=(
        "Files of the record by their bytes; the rest as JSON with sorted keys, without blanks. The sum at the top is the sha256 of the "
        "lines “sha256, two blanks, name” in this order"))
