"""Random JSON schemas through the engine: every completion that ends validates, and everything ends in bounded time.

    pip install hypothesis-jsonschema==0.23.1 hypothesis==6.120.0 jsonschema
    python tests/structured/run.py --schemas 10000

Two kinds of schemas, one to nine: instances of JSON Schema's own schema (draft 7) by hypothesis-jsonschema, which hold
any keyword anywhere, and schemas as people write them, nested objects and arrays with all keywords that llguidance
enforces. A tiny random model writes the completions, some dozens in a batch, with greedy and random sampling.
jsonschema judges them. Not collected by pytest; tests/inference/test_structured_outputs.py runs a few of the second
kind.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from helpers.engines import all_back
from helpers.structured import TOKENIZERS, closing_bias, make_llm

from megatron.dmc.inference import LLM, InvalidRequest, SamplingParams, StructuredOutputsParams

DRAFT = "http://json-schema.org/draft-07/schema#"
SLOWEST = 10.0
"""Seconds of processor time that the compilation of one schema may take, on a slow machine."""


def leaves() -> st.SearchStrategy[dict]:
    """Schemas of strings, numbers, constants and choices."""
    small = st.integers(-50, 50)
    bounds = st.tuples(small, st.integers(0, 60)).map(lambda b: {"minimum": b[0], "maximum": b[0] + b[1]})
    lengths = st.tuples(st.integers(0, 4), st.integers(0, 8))
    data = st.recursive(
        st.one_of(st.none(), st.booleans(), small, st.text(max_size=6)),
        lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.text(max_size=4), inner, max_size=2)),
        max_leaves=4,
    )
    patterns = st.sampled_from(
        ["^[a-z]{1,4}$", "b", "^a|b$", r"^\d{2}-\d+$", "^(x|yz)*$", r"[^\s]", r"^\w+$", "ü.$", '"', r"\\\\", "^$"]
    )
    return st.one_of(
        st.sampled_from(["string", "integer", "number", "boolean", "null"]).map(lambda kind: {"type": kind}),
        bounds.map(lambda b: {"type": "integer", **b}),
        bounds.map(lambda b: {"type": "number", "exclusiveMinimum": b["minimum"], "maximum": b["maximum"] + 1}),
        st.integers(1, 12).map(lambda m: {"type": "integer", "multipleOf": m}),
        lengths.map(lambda n: {"type": "string", "minLength": n[0], "maxLength": n[0] + n[1]}),
        patterns.map(lambda p: {"type": "string", "pattern": p}),
        data.map(lambda value: {"const": value}),
        st.lists(data, min_size=1, max_size=4).map(lambda values: {"enum": values}),
        st.just({}),
        st.just(True),
        st.lists(st.sampled_from(["string", "integer", "null", "array"]), min_size=1, max_size=3, unique=True).map(
            lambda kinds: {"type": kinds}
        ),
    )


NAMES = st.one_of(st.sampled_from(["a", "b", "name", "ü", '"', "minItems"]), st.text(max_size=5))


@st.composite
def objects(draw: Any, inner: st.SearchStrategy[Any]) -> dict:
    properties = draw(st.dictionaries(NAMES, inner, max_size=4))
    schema: dict = {"type": "object", "properties": properties}
    if draw(st.booleans()):
        schema["required"] = draw(st.lists(st.sampled_from([*properties, "more"]), max_size=4, unique=True))
    extra = draw(st.sampled_from(["any", "none", "schema", "pattern", "few"]))
    if extra == "none":
        schema["additionalProperties"] = False
    elif extra == "schema":
        schema["additionalProperties"] = draw(inner)
    elif extra == "pattern":
        schema |= {"patternProperties": {"^x[a-z]*$": draw(inner)}, "additionalProperties": draw(st.booleans())}
    elif extra == "few":
        schema |= {"maxProperties": draw(st.integers(0, 3)), "minProperties": draw(st.integers(0, 2))}
    return schema


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Schemas around others."""
    some = st.lists(inner, min_size=1, max_size=3)
    sizes = st.tuples(st.integers(0, 2), st.integers(0, 3))
    return st.one_of(
        objects(inner),
        st.tuples(inner, sizes).map(
            lambda p: {"type": "array", "items": p[0], "minItems": p[1][0], "maxItems": p[1][0] + p[1][1]}
        ),
        some.map(lambda items: {"type": "array", "items": items, "additionalItems": False}),
        *(some.map(lambda parts, key=key: {key: parts}) for key in ("anyOf", "allOf", "oneOf")),
    )


def written_schemas() -> st.SearchStrategy[Any]:
    """Schemas as people write them, some with definitions, of which one refers to itself."""
    plain = st.recursive(leaves(), containers, max_leaves=8).filter(lambda schema: isinstance(schema, dict))
    reference = {"$ref": "#/definitions/d"}
    return st.one_of(
        plain,
        plain,
        plain.map(lambda part: {"definitions": {"d": part}, "type": "array", "items": reference}),
        plain.map(
            lambda part: {
                "definitions": {"d": {"type": "object", "properties": {"value": part, "next": reference}}},
                "anyOf": [reference, {"type": "null"}],
            }
        ),
    )


def meta_schemas() -> st.SearchStrategy[Any]:
    """Instances of JSON Schema's own schema."""
    import jsonschema
    from hypothesis_jsonschema import from_schema

    def valid(schema: Any) -> bool:
        try:
            jsonschema.Draft7Validator.check_schema(schema)
        except jsonschema.SchemaError:
            return False
        return isinstance(schema, dict)

    meta = dict(jsonschema.Draft7Validator.META_SCHEMA)
    definitions = meta.pop("definitions")
    meta.pop("$id")

    def unrolled(node: Any, depth: int) -> Any:
        """Its own schema refers to itself, which hypothesis-jsonschema 0.23 cannot follow."""
        if isinstance(node, list):
            return [unrolled(part, depth) for part in node]
        if not isinstance(node, dict):
            return node
        reference = node.get("$ref")
        if reference == "#":
            return unrolled(meta, depth - 1) if depth else {"enum": [True, {}, {"type": "string"}, {"type": "integer"}]}
        if isinstance(reference, str):
            return unrolled(definitions[reference.rpartition("/")[2]], depth)
        return {key: unrolled(part, depth) for key, part in node.items()}

    return from_schema(unrolled(meta, 1)).filter(valid)


def collect(strategy: st.SearchStrategy[Any], count: int, start: int) -> list[Any]:
    """Different schemas of a strategy."""
    found: dict[str, Any] = {}
    while len(found) < count:

        @seed(start)
        @settings(
            max_examples=min(2000, count - len(found) + 10),
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(strategy)
        def one(schema: Any) -> None:
            found[json.dumps(schema)] = schema

        one()
        start += 1
    return list(found.values())[:count]


def judge(schema: dict, text: str) -> str | None:
    """What is wrong with a completion; None when it validates."""
    import jsonschema

    try:
        value = json.loads(text)
    except ValueError as error:
        return f"no JSON: {error}"
    try:
        jsonschema.Draft7Validator(schema).validate(value)
    except jsonschema.ValidationError as error:
        return error.message
    except Exception as error:  # a pattern that Python's re does not know, a $ref to nothing
        return None if isinstance(error, re.error) else f"cannot be judged: {error!r}"
    return None


def check(llm: LLM, schemas: list[dict], start: int, max_tokens: int = 100) -> tuple[collections.Counter, list[str]]:
    """Run a batch of schemas. Returns (how they ended, what is wrong)."""
    counts: collections.Counter = collections.Counter()
    wrong, asked, bias = [], [], closing_bias(llm)
    for at, schema in enumerate(schemas):
        sampling = {"temperature": 0} if at % 4 == 0 else {"temperature": 1.3, "seed": start + at}
        began = time.process_time()
        try:
            constraint = StructuredOutputsParams(json={"$schema": DRAFT} | schema)
            params = SamplingParams(max_tokens=max_tokens, structured_outputs=constraint, logit_bias=bias, **sampling)
            llm.engine.input_processor.grammar(params)
            asked.append((schema, params))
        except InvalidRequest as error:
            counts["refused: " + re.sub(r"[^a-zA-Z:_. ]+", "#", str(error))[:90]] += 1
        if (spent := time.process_time() - began) > SLOWEST:
            wrong.append(f"{spent:.1f} s to compile {json.dumps(schema)[:500]}")
    results = llm.generate([[7, 8, 9 + at % 5] for at in range(len(asked))], [params for _, params in asked])
    for (schema, _), result in zip(asked, results):
        if result.error is not None:
            counts[f"error: {result.error[:90]}"] += 1
            continue
        completion = result.outputs[0]
        counts[completion.finish_reason] += 1
        if completion.finish_reason == "stop" and (problem := judge(schema, completion.text)) is not None:
            wrong.append(f"{json.dumps(schema)}\n    {completion.text!r}\n    {problem}")
    return counts, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--schemas", type=int, default=10_000, help="number of schemas")
    parser.add_argument("--seed", type=int, default=1, help="of the first schema")
    parser.add_argument("--batch", type=int, default=32, help="schemas in one batch")
    options = parser.parse_args()
    began, counts, wrong = time.monotonic(), collections.Counter(), []
    few = max(1, options.schemas // 10)
    schemas = collect(meta_schemas(), few, options.seed)
    schemas += collect(written_schemas(), options.schemas - few, options.seed)
    print(f"{len(schemas)} schemas made in {time.monotonic() - began:.0f} s", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        llms = [make_llm(Path(directory) / kind, kind, max_num_seqs=options.batch) for kind in TOKENIZERS]
        for at in range(0, len(schemas), options.batch):
            llm = llms[at // options.batch % len(llms)]
            more, problems = check(llm, schemas[at : at + options.batch], at)
            counts += more
            wrong += problems
            for problem in problems:
                print("WRONG", problem, flush=True)
        for llm in llms:
            all_back(llm.engine)
    for name, count in counts.most_common():
        print(f"{count:7} {name}")
    print(f"{len(wrong)} wrong of {counts['stop']} that ended; {time.monotonic() - began:.0f} s")
    return bool(wrong) or not counts["stop"]


if __name__ == "__main__":
    sys.exit(main())
