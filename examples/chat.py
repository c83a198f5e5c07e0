"""A conversation with the demo model: each turn goes through its chat template."""

from bireme import LLM, SamplingParams

with LLM("demo", tensor_parallel_size=2) as llm:
    messages = [{"role": "user", "content": "What does json.dumps do?"}]
    answer = llm.chat(messages, SamplingParams(temperature=0, max_tokens=120))[0]
    print(answer.outputs[0].text)
