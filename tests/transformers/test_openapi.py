"""The OpenAPI document tells the truth: requests that it allows are answered as it says, others are refused, none ends as a 500."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from jsonschema import Draft202012Validator
from schemathesis import GenerationMode

from hafnium_testing import synthetic_rows


def test_the_document_s_requests_are_ours(chain: Any) -> None:
    document = chain.transformer.get("/openapi.json").json
    schemas = document["components"]["schemas"]
    request = Draft202012Validator({**schemas["Request"], "components": document["components"]})
    answer = Draft202012Validator({**schemas["Answer"], "components": document["components"]})
    for row in synthetic_rows(chain.contract, 20, seed=6):
        request.validate(row)
        answer.validate(chain.transformer.post("/v1/score", {**row, "explain": True}).json)
    assert not request.is_valid({"features": {}})
    assert document["info"] == {"title": "unified-risk", "version": "7", "description": chain.contract.description}


@pytest.mark.parametrize("path", ["/v1/score", "/v1/score/batch"])
@pytest.mark.parametrize("mode", GenerationMode, ids=lambda m: m.value)
def test_requests_made_from_the_document(chain: Any, path: str, mode: GenerationMode) -> None:
    schema: Any = schemathesis.openapi.from_url(f"{chain.transformer.url}/openapi.json")
    operation = schema[path]["POST"]
    statuses: set[int] = set()

    @settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def press(case: Any) -> None:
        response = case.call()
        statuses.add(response.status_code)
        assert response.status_code in (200, 400, 413, 415, 422, 503), response.text
        operation.validate_response(response)  # the body is as the document says for this status
        if mode is GenerationMode.NEGATIVE and path == "/v1/score":
            assert response.status_code != 200, case.body

    press()
    assert len(statuses) > 0


@pytest.mark.parametrize("mode", GenerationMode, ids=lambda m: m.value)
@pytest.mark.parametrize("part", ["predictor", "transformer"])
def test_v2_requests_made_from_the_sdk_s_document_never_end_as_a_500(chain: Any, part: str, mode: GenerationMode) -> None:
    schema: Any = schemathesis.openapi.from_url(f"{chain.predictor.url}/openapi.json")
    schema.config.update(base_url=getattr(chain, part).url)

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=schema["/v2/models/{model_name}/infer"]["POST"].as_strategy(generation_mode=mode))
    def press(case: Any) -> None:
        case.path_parameters = {"model_name": "m"}
        response = case.call()
        assert response.status_code in (200, 400, 413, 415, 422, 501, 503), response.text
        assert response.status_code == 200 or "problem+json" in response.headers["content-type"][0], response.headers

    press()
