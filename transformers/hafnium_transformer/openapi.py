"""The OpenAPI document of a transformer: its own routes, with the fields of the contract that is in force."""

from __future__ import annotations

from typing import Any

from hafnium_contract.model_contract import FLOAT_MAX, Feature
from hafnium_contract.wire import BATCH_ROWS_MAX, PROBLEM_JSON, STORE_SILENT
from hafnium_transformer.plan import ENTITY_TEXT, Plan
from hafnium_transformer.rows import NUMBER_AS_TEXT, TEXT_MAX

_PROBLEMS = {
    "400": "no JSON, or not the form of a request", "413": "the body is too long", "422": "fields break the contract; errors names each",
    "429": "this client asks for too many rows",
    "503": "too many requests of all, or predictor, store or a value that the contract demands is not available; of the last, the title "
           f"{STORE_SILENT!r} may pass, 'Feature not available' comes again with the next request",
    "504": "the time given for the answer is over",
}


def document(plan: Plan, model_name: str, model_version: str, rows_max: int = BATCH_ROWS_MAX) -> dict[str, Any]:
    """OpenAPI 3.1. `model_name`: as in the URLs; the contract's own name is the title."""
    contract = plan.contract
    row, answer = {"$ref": "#/components/schemas/Request"}, {"$ref": "#/components/schemas/Answer"}
    problem = {"$ref": "#/components/schemas/Problem"}
    batch = _object({"requests": {"type": "array", "items": row, "minItems": 1, "maxItems": rows_max}}, ["requests"])
    results = _object({"results": {"type": "array", "items": {"anyOf": [answer, problem]}}}, ["results"])
    contract_path = f"/v1/models/{model_name}/contract"
    return {
        "openapi": "3.1.0",
        "info": {"title": contract.name, "version": model_version, "description": contract.description},
        "paths": {
            "/v1/score": {"post": _operation("score", "Score one row.", row, answer)},
            "/v1/score/batch": {"post": _operation("scoreBatch", "Score rows; a bad row is its own error.", batch, results)},
            contract_path: {"get": _get("contract", "The contract in force.", {"type": "object"})},
            "/health/live": {"get": _get("live", "Whether the process runs.", _object({"live": {"type": "boolean"}}))},
            "/health/ready": {"get": _get("ready", "Whether a request could be answered now.", _object({"ready": {"type": "boolean"}}))},
        },
        "components": {"schemas": {"Request": _row(plan), "Answer": _answer(plan), "Problem": _PROBLEM}},
    }


def _object(properties: dict[str, Any], required: list[str] | None = None, *, closed: bool = True) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required or [], "additionalProperties": not closed}


def _content(schema: dict[str, Any], media: str = "application/json") -> dict[str, Any]:
    return {media: {"schema": schema}}


def _errors(codes: tuple[str, ...]) -> dict[str, Any]:
    content = _content({"$ref": "#/components/schemas/Problem"}, PROBLEM_JSON)
    return {code: {"description": _PROBLEMS[code], "content": content} for code in codes}


def _operation(name: str, summary: str, body: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
    return {
        "operationId": name, "summary": summary, "requestBody": {"required": True, "content": _content(body)},
        "responses": {"200": {"description": "scored", "content": _content(answer)}, **_errors(tuple(_PROBLEMS))},
    }


def _get(name: str, summary: str, answer: dict[str, Any]) -> dict[str, Any]:
    responses = {"200": {"description": "as it is", "content": _content(answer)}, **_errors(("503",))}
    return {"operationId": name, "summary": summary, "responses": responses}


def _row(plan: Plan) -> dict[str, Any]:
    features = {field: _feature(f) for field, f in plan.request_features}
    needed = [field for field, f in plan.request_features if f.missing == "reject"]
    entity = {
        key: {"type": "string", "minLength": 1, "maxLength": TEXT_MAX} if plan.entity_types.get(key, ENTITY_TEXT) == ENTITY_TEXT
        else {"type": ["integer", "string"], "minimum": -(2**63) + 1, "maximum": 2**63 - 1, "pattern": NUMBER_AS_TEXT}
        for key in sorted(plan.declared_keys)
    }
    return _object({
        "request_id": {"type": ["string", "null"], "minLength": 1, "maxLength": TEXT_MAX, "description": "comes back in the answer"},
        "event_time": {"type": ["string", "null"], "format": "date-time", "description": "with an offset; without it: now"},
        "entity": _object(entity, list(plan.join_keys)),
        "features": _object(features, needed),
        "explain": {"type": "boolean", "description": "adds the largest contributions"},
    }, [*(["entity"] if plan.join_keys else []), *(["features"] if needed else [])])


def _feature(feature: Feature) -> dict[str, Any]:
    kind = {"float": "number", "int": "integer", "bool": "boolean", "category": "string"}[feature.dtype]
    schema: dict[str, Any] = {"type": kind if feature.missing == "reject" else [kind, "null"], "description": feature.description}
    if feature.categories:
        schema["examples"] = list(feature.categories[:5])
    if feature.range is not None:
        low, high = feature.range
        most = 2**53 if feature.dtype == "int" else FLOAT_MAX
        reject = feature.out_of_range == "reject"
        schema["minimum"], schema["maximum"] = (max(low, -most), min(high, most)) if reject else (-most, most)
    return schema


def _answer(plan: Plan) -> dict[str, Any]:
    score = {"type": "number", "minimum": 0, "maximum": 1}
    rule = plan.contract.decision
    contribution = _object({"feature": {"type": "string"}, "value": {}, "contribution": {"type": "number"}})
    return _object({
        "request_id": {"type": "string"}, "score": score, "confidence_lower": score, "confidence_upper": score,
        "decision": {"enum": [rule.above, rule.below]}, "model_name": {"type": "string"}, "model_version": {"type": "string"},
        "degraded": {"type": "array", "items": {"type": "string"}}, "explanation": {"type": "array", "items": contribution},
        "explanation_base": {**score, "description": "score of a row with everything missing: all contributions add up from it"},
    }, ["request_id", "score", "confidence_lower", "confidence_upper", "decision", "model_name", "model_version", "degraded"])


_PROBLEM = _object({
    "type": {"type": "string"}, "title": {"type": "string"}, "status": {"type": "integer"}, "detail": {"type": "string"},
    "errors": {"type": "array", "items": _object({"path": {"type": "string"}, "message": {"type": "string"}}, ["path", "message"])},
}, ["type", "title", "status", "detail"])
