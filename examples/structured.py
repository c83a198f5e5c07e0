"""Answers of a form that is asked for: JSON of a schema, a choice, an expression."""

import json

from bireme import LLM, SamplingParams, StructuredOutputsParams

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "kind": {"enum": ["function", "class", "module"]},
    },
    "required": ["name", "kind"],
    "additionalProperties": False,
}
FORMS = [
    StructuredOutputsParams(json=SCHEMA),
    StructuredOutputsParams(choice=["yes", "no"]),
    StructuredOutputsParams(regex=r"[A-Z][a-z]{3,8} \d{4}"),
]

with LLM("demo", tensor_parallel_size=2) as llm:
    params = [
        SamplingParams(temperature=1, seed=1, max_tokens=80, structured_outputs=form)
        for form in FORMS
    ]
    for output in llm.generate(["About json.dumps:"] * len(FORMS), params):
        print(output.outputs[0].text)
        if output.outputs[0].text.startswith("{"):
            print("  kind:", json.loads(output.outputs[0].text)["kind"])
