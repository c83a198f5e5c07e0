"""Bireme: distributed inference by tensor and pipeline parallelism, with every second accounted for."""

from typing import TYPE_CHECKING, Any

from bireme.outputs import CompletionOutput, RequestOutput
from bireme.sampling_params import SamplingParams, StructuredOutputsParams

if TYPE_CHECKING:
    from bireme.engine.async_llm import AsyncLLM
    from bireme.engine.llm import LLM

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """`LLM` and `AsyncLLM` bring torch once one is made; the rest of the package's floor does not need it."""
    if name == "LLM":
        from bireme.engine.llm import LLM

        return LLM
    if name == "AsyncLLM":
        from bireme.engine.async_llm import AsyncLLM

        return AsyncLLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
