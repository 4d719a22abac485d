"""FastAPI with pydantic, on uvicorn with uvloop."""

from __future__ import annotations

from fastapi import FastAPI
from onnx_session import open_session, score
from pydantic import BaseModel

SESSION = open_session()
app = FastAPI()


class Rows(BaseModel):
    instances: list[list[float | None]]


class Scores(BaseModel):
    predictions: list[float]


@app.get("/")
async def alive() -> dict[str, bool]:
    return {"alive": True}


@app.post("/v1/models/m:predict")
async def predict(rows: Rows) -> Scores:
    return Scores(predictions=score(SESSION, rows.instances))
