"""The JSON Schema of campaign files as they are written: with search spaces for values of methods."""

from typing import Any

from orchestrator.config.campaign import CampaignConfig

_REFERENCE = "#/$defs/"
_SEARCHED = "Searched"
_METHOD = "MethodConfig"

_GROUPED = {"type": "string", "pattern": r"^[-+]?\d+(_\d+)+$"}
_SCIENTIFIC = {"type": "string", "pattern": r"^[-+]?\d+(_\d+)*(\.\d*)?([eE][-+]?\d+)$"}
_SPELLED = {"integer": [_GROUPED], "number": [_GROUPED, _SCIENTIFIC]}
"""Numbers that the project reads in a file and that are texts to some editors: 2_500_000 under YAML 1.2, 1e-3
under YAML 1.1."""

_SHOWN = ("title", "description", "default")

Schema = dict[str, Any]


def campaign_schema() -> Schema:
    """Return what `iterabre schema` prints.

    Only a method's values may be search spaces (`orchestrator.config.search_space`), and some sections,
    such as texts, stand in methods and elsewhere. So methods have definitions of their own, in
    which each value is what it is elsewhere or a space of such values.
    """
    described = CampaignConfig.model_json_schema()
    definitions = described["$defs"]
    names = [_METHOD]
    for name in names:
        section = definitions[name]
        names += [inner for inner in _references(section) if inner not in names]
        fields = {
            field: inner if (name, field) == (_METHOD, "name") else _or_space(_in_methods(inner))
            for field, inner in section["properties"].items()
        }
        definitions[_SEARCHED + name] = {**section, "properties": fields}
    described["properties"]["methods"]["items"] = {"$ref": f"{_REFERENCE}{_SEARCHED}{_METHOD}"}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **_as_spelled(described)}


def _as_spelled(schema: Any) -> Any:
    """Return `schema` taking each number in all spellings that the project reads."""
    if isinstance(schema, list):
        return [_as_spelled(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    spellings = _SPELLED.get(schema["type"]) if isinstance(schema.get("type"), str) else None
    if spellings is None:
        return {key: _as_spelled(inner) for key, inner in schema.items()}
    shown = {key: schema[key] for key in _SHOWN if key in schema}
    value = {key: inner for key, inner in schema.items() if key not in shown}
    return {**shown, "anyOf": [value, *spellings]}


def _references(schema: Any) -> list[str]:
    if isinstance(schema, list):
        return [name for inner in schema for name in _references(inner)]
    if not isinstance(schema, dict):
        return []
    own = [schema["$ref"].removeprefix(_REFERENCE)] if "$ref" in schema else []
    return list(dict.fromkeys([*own, *_references(list(schema.values()))]))


def _in_methods(schema: Any) -> Any:
    """Return `schema` with its references led to the definitions for methods."""
    if isinstance(schema, list):
        return [_in_methods(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: value.replace(_REFERENCE, _REFERENCE + _SEARCHED) if key == "$ref" else _in_methods(value)
        for key, value in schema.items()
    }


def _or_space(field: Schema) -> Schema:
    """Return `field`, or a search space of its values; what editors show of it stays outside."""
    shown: Schema = {key: field[key] for key in _SHOWN if key in field}
    value = {key: inner for key, inner in field.items() if key not in shown}
    values = {"type": "array", "items": value, "minItems": 1}
    spaces = [_space(kind, values) for kind in ("grid", "choice")]
    if "number" in (option.get("type") for option in value.get("anyOf", [value])):
        bounds = {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}
        positive = {**bounds, "items": {"type": "number", "exclusiveMinimum": 0}}
        spaces += [_space("uniform", bounds), _space("loguniform", positive)]
    return {**shown, "anyOf": [value, *spaces]}


def _space(kind: str, options: Schema) -> Schema:
    return {
        "type": "object",
        "properties": {kind: options},
        "required": [kind],
        "additionalProperties": False,
    }
