"""JSON schemas of the kinds that applications send, with bounds that a short answer keeps to."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

Schema = dict[str, Any]


def text(longest: int = 6, **more: Any) -> Schema:
    return {"type": "string", "maxLength": longest, **more}


def whole(least: int = 0, most: int = 99) -> Schema:
    return {"type": "integer", "minimum": least, "maximum": most}


def closed(required: bool = True, **properties: Schema) -> Schema:
    found: Schema = {"type": "object", "properties": properties, "additionalProperties": False}
    return {**found, "required": list(properties)} if required else found


def listed(items: Schema, most: int = 3, least: int = 0) -> Schema:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


WORDS = ("red", "green", "blau", "gelb", "été", "日本", "naïve", "Ω", "🙂", 'quote"d', "back\\slash", "tab\there")
LEAVES: list[Schema] = [
    text(),
    text(3, minLength=1),
    whole(),
    whole(-50, 50),
    {"type": "boolean"},
    {"type": "null"},
    {"enum": list(WORDS[:4])},
    {"enum": list(WORDS[4:])},
    {"enum": [1, "one", None, True, 2.5]},
    {"const": "fixed"},
    {"const": 17},
    {"type": "string", "pattern": "^[A-Z]{2}[0-9]{3}$"},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "uuid"},
    {"type": ["boolean", "null"]},
    {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 100},
]


def nested(depth: int) -> Schema:
    return closed(v=whole()) if not depth else closed(inner=nested(depth - 1), flag={"type": "boolean"})


def _shared() -> list[Schema]:
    point = closed(x=whole(), y=whole())
    tree = closed(v=whole(0, 9), next={"anyOf": [{"type": "null"}, {"$ref": "#/$defs/leaf"}]})
    return [
        {**closed(a={"$ref": "#/$defs/point"}, b={"$ref": "#/$defs/point"}), "$defs": {"point": point}},
        {**listed({"$ref": "#/$defs/point"}), "$defs": {"point": point}},
        {**tree, "$defs": {"leaf": closed(v=whole(0, 9))}},
        {**closed(p={"$ref": "#/definitions/p"}), "definitions": {"p": {"enum": ["a", "b"]}}},
        {"$ref": "#/$defs/top", "$defs": {"top": closed(k={"$ref": "#/$defs/kind"}), "kind": {"enum": ["x", "y"]}}},
    ]


def _tools() -> list[Schema]:
    """Arguments of functions, as agents have them."""
    return [
        closed(city=text(8), unit={"enum": ["celsius", "fahrenheit"]}),
        closed(query=text(8), limit=whole(1, 20), safe={"type": "boolean"}),
        closed(path={"type": "string", "pattern": "^/[a-z]{1,8}$"}, mode={"enum": ["r", "w", "a"]}),
        closed(to=listed(text(4), 2, 1), subject=text(8), urgent={"type": "boolean"}),
        closed(
            False, name=text(5), age=whole(0, 120), email={"type": "string", "pattern": "^[a-z]{1,5}@[a-z]{1,5}\\.de$"}
        ),
        closed(action={"const": "buy"}, symbol={"type": "string", "pattern": "^[A-Z]{1,4}$"}, shares=whole(1, 500)),
        closed(steps=listed(closed(what=text(5), done={"type": "boolean"}), 2, 1), answer=text(6)),
        closed(label={"enum": ["positive", "neutral", "negative"]}, score=whole(0, 10), why=text(8)),
        closed(start={"type": "string", "format": "date"}, end={"type": "string", "format": "date"}),
        closed(shape={"anyOf": [closed(r=whole()), closed(w=whole(), h=whole())]}),
    ]


def schemas() -> list[Schema]:
    """Return a hundred."""
    found: list[Schema] = [closed(value=leaf) for leaf in LEAVES]
    found += [listed(leaf, 2) for leaf in LEAVES]
    found += [nested(depth) for depth in range(1, 6)]
    found += _shared() + _tools()
    found += [{"anyOf": [leaf, closed(other=LEAVES[i - 3])]} for i, leaf in enumerate(LEAVES)]
    found += [closed(False, **{word: LEAVES[i]}) for i, word in enumerate(WORDS)]
    found += [{"type": "array", "prefixItems": [a, b], "items": False, "minItems": 2} for a, b in pairwise(LEAVES)]
    found += [closed(rows=listed(closed(id=whole(), tag=LEAVES[i]), 2, 1)) for i in range(100 - len(found))]
    return found[:100]
