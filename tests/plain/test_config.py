"""Settings say what was wrong, with both numbers and the remedy."""

from __future__ import annotations

from typing import Any

import pytest

from bireme.config import (
    EngineConfig,
    ParallelConfig,
    check_settings,
    format_bytes,
    parse_bytes,
    parse_ints,
)
from bireme.errors import ConfigError, RequestError
from bireme.sampling_params import SamplingParams


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("4096B", 4096),
        ("16MiB", 16 << 20),
        ("24 GB", 24 * 10**9),
        ("1.5GiB", 3 << 29),
        ("2k", 2000),
    ],
)
def test_sizes_are_read_with_si_and_binary_prefixes(text: str, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "lots", "-1", "3 parsecs", "1e3", "24", "24 "])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="write it like 16MiB"):
        parse_bytes(text)


def test_sizes_are_printed_with_binary_prefixes() -> None:
    assert [format_bytes(n) for n in (12, 2048, 5 << 20, 3 << 30)] == [
        "12 B",
        "2.0 KiB",
        "5.0 MiB",
        "3.00 GiB",
    ]


def test_lists_of_numbers_are_read_and_bounded() -> None:
    assert parse_ints("3,2", "widths") == (3, 2)
    assert parse_ints("1,0", "devices", least=0) == (1, 0)
    with pytest.raises(ConfigError, match="holds 0; the smallest is 1"):
        parse_ints("3,0", "widths")
    with pytest.raises(ConfigError, match="not a whole number"):
        parse_ints("two", "widths")


def test_a_width_and_a_number_of_stages_make_equal_stages() -> None:
    assert ParallelConfig.of(2, 3).widths == (2, 2, 2)
    assert ParallelConfig.of((3, 2)).widths == (3, 2)
    assert ParallelConfig.of(2, layers_per_stage=(3, 5)).widths == (2, 2)
    assert str(ParallelConfig.of(2, 2)) == "tp 2 x pp 2"
    assert str(ParallelConfig.of((3, 2))) == "tp 3,2 (pp 2)"


def test_contradicting_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match="names 2 stages, but pipeline_parallel_size is 3"):
        ParallelConfig.of((3, 2), 3)
    with pytest.raises(ConfigError, match="names 3 stages, but there are 2"):
        ParallelConfig.of(1, 2, (1, 1, 1))
    with pytest.raises(ConfigError, match="names 1 devices for 2 ranks"):
        EngineConfig(parallel=ParallelConfig.of(2), devices=(0,))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"dtype": "int3"}, "dtype 'int3' is not known; use auto, float32, float16, bfloat16"),
        ({"device": "gpu"}, "device 'gpu' is not known; use auto, cpu, cuda"),
        ({"load_format": None}, "load_format None is not known; use auto, dummy"),
        ({"max_num_seqs": "8"}, "max_num_seqs='8' must be a whole number"),
        ({"max_num_seqs": True}, "max_num_seqs=True must be a whole number"),
        ({"max_num_seqs": None}, "max_num_seqs=None must be a whole number"),
        ({"max_num_batched_tokens": 0}, "max_num_batched_tokens=0 must be at least 1"),
        ({"block_size": 2.0}, "block_size=2.0 must be a whole number"),
        ({"max_model_len": 0}, "max_model_len=0 must be at least 1"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"memory_limit_bytes": "12MiB"}, "memory_limit_bytes='12MiB' must be a whole number"),
        ({"memory_limit_bytes": 0}, "memory_limit_bytes=0 must be at least 1"),
        ({"gpu_memory_utilization": 1.1}, "gpu_memory_utilization=1.1 must be .* at most 1"),
        ({"step_timeout_s": 0}, "step_timeout_s=0 must be a number above 0, at most 1e"),
        ({"step_timeout_s": "3"}, "step_timeout_s='3' must be a number above 0"),
        ({"start_timeout_s": float("nan")}, "start_timeout_s=nan must be a number above 0"),
        ({"start_timeout_s": float("inf")}, "start_timeout_s=inf must be a number above 0"),
        ({"devices": (-1,)}, "devices=-1 must be at least 0"),
        ({"devices": "0"}, "devices='0' must be a tuple of whole numbers"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused_where_they_are_made(
    settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        EngineConfig(**settings)


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ((2.5,), "tensor_parallel_size=2.5 must be a whole number"),
        ((0,), "tensor_parallel_size=0 must be at least 1"),
        (((3, "2"),), "tensor_parallel_size='2' must be a whole number"),
        (((),), "names no stage"),
        ((1, "2"), "pipeline_parallel_size='2' must be a whole number"),
        ((1, 0), "pipeline_parallel_size=0 must be at least 1"),
        ((1, 2, (3, 5.0)), "layers_per_stage=5.0 must be a whole number"),
    ],
    ids=str,
)
def test_sizes_that_cannot_be_are_refused(sizes: tuple[Any, ...], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ParallelConfig.of(*sizes)


def test_an_unknown_setting_is_refused_with_the_closest_one() -> None:
    check_settings(["dtype", "pool"], ["pool"])
    with pytest.raises(ConfigError, match="no setting max_num_sequences; the closest one is max_n"):
        check_settings(["dtype", "max_num_sequences"], [])
    with pytest.raises(ConfigError, match="no setting parallel; the closest one is pipeline_par"):
        check_settings(["parallel"], ["pipeline_parallel_size"])


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": "1"},
        {"top_p": 0.0},
        {"top_p": float("nan")},
        {"top_p": None},
        {"top_k": -1},
        {"top_k": 2**63},
        {"top_k": 4.0},
        {"max_tokens": 0},
        {"max_tokens": -5},
        {"max_tokens": 2.0},
        {"seed": -1},
        {"seed": True},
        {"stop_token_ids": "ab"},
        {"stop_token_ids": 3},
    ],
)
def test_impossible_sampling_is_refused_by_name(settings: dict[str, object]) -> None:
    with pytest.raises(RequestError, match=next(iter(settings))):
        SamplingParams(**settings)  # type: ignore[arg-type]
