"""Several prompts through a model on four ranks, streamed as they come."""

from bireme import LLM, SamplingParams

PROMPTS = ["The with statement is", "Return a list of", "class collections.OrderedDict"]

with LLM("demo", tensor_parallel_size=2, pipeline_parallel_size=2) as llm:
    for delta in llm.stream(PROMPTS, SamplingParams(temperature=0.7, seed=1, max_tokens=32)):
        if delta.output is not None:
            print(f"{PROMPTS[delta.index]}|{delta.output.outputs[0].text}")
