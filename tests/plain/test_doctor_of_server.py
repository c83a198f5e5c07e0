"""What is kept of a server that is watched for long."""

from __future__ import annotations

from bireme.doctor.from_server import Samples, keep

GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")


def moment(value: float) -> Samples:
    """A thousand samples of others among those that are looked at of each."""
    others = [(f"bucket_{index}", {"le": str(index)}, value) for index in range(1000)]
    return [*others, *((name, {}, value) for name in GAUGES)]


def test_only_the_first_and_the_last_moment_are_kept_whole() -> None:
    moments = [moment(0.0)]
    for value in range(1, 100):
        keep(moments, moment(float(value)))
    assert len(moments) == 100
    assert (moments[0], moments[-1]) == (moment(0.0), moment(99.0))
    for value, between in enumerate(moments[1:-1], 1):
        assert list(between) == [(name, {}, float(value)) for name in GAUGES]
