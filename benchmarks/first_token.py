"""A process that ends once it has a model's first token; `starting.py` measures how long that takes.

    python benchmarks/first_token.py '{"model": "demo"}'

It imports what a user's program would, and nothing of the benchmarks.
"""

import json
import sys

from bireme import LLM, SamplingParams

if __name__ == "__main__":
    with LLM(**json.loads(sys.argv[1])) as llm:
        llm.generate([[1] * 16], SamplingParams(temperature=0, max_tokens=1))
        print("first token", flush=True)
