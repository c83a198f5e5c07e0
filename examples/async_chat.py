"""Several conversations at once on one engine; each streams to its own caller, who may leave."""

import asyncio

from bireme import AsyncLLM, SamplingParams

QUESTIONS = ["What does math.sqrt do?", "What does json.dumps do?", "What does os.path.join do?"]


async def ask(llm: AsyncLLM, question: str) -> None:
    prompt = llm.chat_ids([{"role": "user", "content": question}])
    params = SamplingParams(temperature=0, max_tokens=120)
    text = ""
    async for delta in llm.stream(prompt, params, timeout_s=60):
        text += delta.text
    print(f"{question}\n  {text.splitlines()[0]}")


async def main() -> None:
    async with AsyncLLM("demo", pipeline_parallel_size=2) as llm:
        await asyncio.gather(*(ask(llm, question) for question in QUESTIONS))


asyncio.run(main())
