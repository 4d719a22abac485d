"""The contract as people read it: Markdown, generated, so that it can't be out of date."""

from __future__ import annotations

from hafnium_contract.durations import format_duration
from hafnium_contract.model_contract import Feature, FromDerived, FromView, ModelContract


def source_text(contract: ModelContract, feature: Feature) -> str:
    """Where a feature comes from, in a few words."""
    if isinstance(feature.source, FromView):
        age = feature.max_age or contract.view(feature.source.view).max_age
        return f"view {feature.source.view}.{feature.source.field}, at most {format_duration(age)} old"
    if isinstance(feature.source, FromDerived):
        d = feature.source.derived
        return f"{d.operation}({', '.join(d.inputs)})"
    return f"request field {feature.request_field}"


def _values(feature: Feature) -> str:
    if feature.range is not None:
        low, high = feature.range
        return f"{low:g} … {high:g} ({feature.out_of_range} outside)"
    if feature.dtype == "category":
        shown = ", ".join(feature.categories[:12])
        more = len(feature.categories) - 12
        return shown + (f" and {more} more" if more > 0 else "")
    return "true, false"


_DIRECTION = {"increasing": "score rises", "decreasing": "score falls", "none": "free"}


def contract_markdown(contract: ModelContract) -> str:
    """Feature documentation: type, unit, range, source, owner, monotone direction, personal or not."""
    rows = [
        "| feature | type | unit | values | source | when missing | as it rises | personal | drift | owner | meaning |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for f in contract.features:
        drift = "not watched" if f.drift.test == "none" else f"{f.drift.test} > {f.drift.threshold:g}"
        cells = [
            f.name + ("" if f.model_input else " (not an input)"), f.dtype, f.unit, _values(f),
            source_text(contract, f), f.missing, _DIRECTION[f.monotone], "yes" if f.personal else "no", drift,
            f.owner or contract.owner, f.description,
        ]
        rows.append("| " + " | ".join(c.replace("|", "\\|").replace("\n", " ").strip() for c in cells) + " |")
    parts = [
        f"# {contract.name} {contract.version}", contract.description.strip(),
        f"Owner: {contract.owner}. Contract digest: `{contract.digest}`.",
        f"A score of {contract.decision.threshold:g} or more is decided as `{contract.decision.above}`, "
        f"less as `{contract.decision.below}`.",
        f"## Features ({len(contract.inputs)} inputs of the model, in this order)", "\n".join(rows),
    ]
    if contract.views:
        lines = [f"- `{v.name}`, per {v.entity}, at most {format_duration(v.max_age)} old. {v.description}".rstrip()
                 for v in contract.views]
        parts += ["## Feature views", "\n".join(lines)]
    if contract.protected:
        lines = [f"- `{p.name}`: {p.description}".rstrip(": ") for p in contract.protected]
        parts += ["## Protected attributes (evaluation only, never an input)", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"
