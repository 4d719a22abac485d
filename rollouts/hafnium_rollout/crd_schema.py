"""pydantic model → structural OpenAPI v3 schema, the form that the API server takes in a CustomResourceDefinition.

What differs from pydantic's JSON Schema: references are written out; `X | None` is a field that may be absent (the API server
drops a null of such a field, so none is stored); `const` is an enum of one; a number's exclusive bound is a flag beside the
bound; a tuple of one type is a list of fixed length; `additionalProperties: false` goes away, because unknown fields are pruned
(`kubectl` refuses them before that). Anything that can't be said this way is an error here and not a surprise in a cluster.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema

from hafnium_contract.durations import format_duration
from hafnium_rollout.errors import SchemaError

JSON = dict[str, Any]
_KEPT = ("type", "enum", "pattern", "format", "minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems", "maxProperties")
_LIMITS = ("pattern", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minLength", "maxLength", "minItems", "maxItems",
           "maxProperties")


@dataclass(frozen=True, slots=True)
class Extras:
    """What Kubernetes wants to know besides the types.

    `objects`: keys of every schema of the class of that name; `fields`: keys of `Class.field`, where the field is named as in the file.
    A key with the value None is taken away.
    """

    objects: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    fields: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])


class AsWritten(GenerateJsonSchema):
    """Defaults as people write them: `10m`, where pydantic would say `PT10M`, which no duration of ours reads."""

    def encode_default(self, dft: Any) -> Any:
        return format_duration(dft) if isinstance(dft, timedelta) else super().encode_default(dft)


def structural(model: type[BaseModel], extras: Extras, *, lenient: bool = False) -> JSON:
    """The model's schema. Raises SchemaError for what a CRD can't express, and for extras that name nothing.

    `lenient`: types only, without limits or defaults. A status is written by the operator in the midst of its work, and a rollback
    must never be refused because a message is a character too long.
    """
    source = model.model_json_schema(by_alias=True, schema_generator=AsWritten)
    builder = _Builder(source.get("$defs", {}), extras, lenient)
    out = builder.convert(source, model.__name__)
    unused = [name for name in (*extras.objects, *extras.fields) if name not in builder.used and name.split(".")[0] in builder.seen]
    if unused:
        raise SchemaError(f"rules for {', '.join(unused)}, which {model.__name__} does not have")
    return out


class _Builder:
    def __init__(self, defs: Mapping[str, JSON], extras: Extras, lenient: bool) -> None:
        self._defs, self._extras, self._lenient = defs, extras, lenient
        self.used: set[str] = set()
        self.seen: set[str] = set()

    def convert(self, source: JSON, where: str) -> JSON:
        """One schema. `where` is for messages."""
        source, described = self._resolve(source, where)
        name = str(source.get("title", "")) if "properties" in source else ""
        if "allOf" in source or "anyOf" in source or "oneOf" in source:
            raise SchemaError(f"{where}: a choice between types has no structural schema")
        out: JSON = {}
        if described:
            out["description"] = " ".join(described.split())
        if "const" in source:
            source = {**source, "enum": [source["const"]], "type": source.get("type", "string")}
        if "type" not in source and source.get("additionalProperties") is not True:
            raise SchemaError(f"{where}: has no type; a CRD needs one (or a mapping that is kept as it is)")
        out |= {k: source[k] for k in _KEPT if k in source}
        for bound, flag in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
            if flag in source:
                out |= {bound: source[flag], flag: True}
        if source.get("type") == "array":
            out["items"] = self._items(source, where)
        if source.get("type") == "object":
            out |= self._object(source, name, where)
        if self._lenient:
            out = {k: v for k, v in out.items() if k not in _LIMITS}
        if name:
            self.seen.add(name)
            out |= self._take(self._extras.objects, name)
        if source.get("x-positive"):
            out |= {} if self._lenient else {"x-kubernetes-validations": [
                {"rule": "self.matches('[1-9]')", "message": "must be longer than 0s"}]}
        return out

    def _resolve(self, source: JSON, where: str) -> tuple[JSON, str]:
        """Without references and without null; and the description: the field's own, else its type's."""
        described = str(source.get("description", ""))
        while True:
            if "$ref" in source:
                key = str(source["$ref"]).removeprefix("#/$defs/")
                rest = {k: v for k, v in source.items() if k in ("default", "description")}
                source = {**self._defs[key], **rest}
            elif "anyOf" in source:
                given = [s for s in source["anyOf"] if s.get("type") != "null"]
                if len(given) != 1:
                    raise SchemaError(f"{where}: a choice between {len(given)} types has no structural schema")
                rest = {k: v for k, v in source.items() if k == "description"}
                source = {**given[0], **rest}
            else:
                return source, described or str(source.get("description", ""))

    def _items(self, source: JSON, where: str) -> JSON:
        fixed = source.get("prefixItems")
        if fixed is None:
            return self.convert(source["items"], f"{where}[]")
        found = [self.convert(s, f"{where}[{i}]") for i, s in enumerate(fixed)]
        if any(f != found[0] for f in found):
            raise SchemaError(f"{where}: a tuple of different types has no structural schema; make it an object")
        return found[0]

    def _object(self, source: JSON, name: str, where: str) -> JSON:
        more = source.get("additionalProperties", name == "")
        out: JSON = {}
        if "properties" in source:
            out["properties"] = {k: self._field(k, v, name, where) for k, v in source["properties"].items()}
            if source.get("required"):
                out["required"] = list(source["required"])
        if more is True:
            out["x-kubernetes-preserve-unknown-fields"] = True
        elif isinstance(more, dict):
            out["additionalProperties"] = self.convert(more, f"{where}.*")
        return out

    def _field(self, key: str, source: JSON, name: str, where: str) -> JSON:
        out = self.convert(source, f"{where}.{key}")
        default = source.get("default")
        if default is not None and not self._lenient:
            out["default"] = {} if isinstance(default, dict) else default
        extra = self._take(self._extras.fields, f"{name}.{key}")
        if "x-kubernetes-validations" in extra and "x-kubernetes-validations" in out:
            extra = {**extra, "x-kubernetes-validations": [*out["x-kubernetes-validations"], *extra["x-kubernetes-validations"]]}
        return {k: v for k, v in (out | extra).items() if v is not None}

    def _take(self, table: Mapping[str, Mapping[str, Any]], key: str) -> JSON:
        if key not in table:
            return {}
        self.used.add(key)
        return dict(table[key])
