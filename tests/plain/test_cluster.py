"""`cluster.toml`: what is written comes back, what is described by hand is read, what is wrong is named."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bireme.cluster.file import dumps, loads, read_cluster, write_cluster
from bireme.cluster.topology import (
    Cluster,
    Curve,
    Device,
    Group,
    Link,
    Measurement,
    Node,
    Point,
    Product,
)
from bireme.config import DTYPE_BYTES
from bireme.errors import ConfigError

PAGE = Path(__file__).parents[2] / "docs" / "cluster-file.md"
BY_HAND = PAGE.read_text(encoding="utf-8").partition("```toml\n")[2].partition("```")[0]

positive = st.floats(min_value=1e-12, max_value=1e18)
counts = st.integers(1, 2**62)
texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
names = st.text(
    st.characters(exclude_categories=("Cs",), exclude_characters="/"), min_size=1, max_size=8
)
dtypes = st.sampled_from(list(DTYPE_BYTES))


@st.composite
def curves(draw: st.DrawFn) -> Curve:
    sizes = sorted(draw(st.sets(counts, max_size=3)))
    spread = st.one_of(st.just(()), st.tuples(positive, positive))
    return tuple(Point(size, draw(positive), *draw(spread)) for size in sizes)


products = st.builds(Product, dtype=dtypes, in_features=counts, out_features=counts, curve=curves())
devices = st.builds(
    Device,
    name=names,
    kind=st.sampled_from(["cpu", "cuda"]),
    model=texts,
    memory_bytes=counts,
    num_threads=st.none() | counts,
    flop_per_s=st.dictionaries(dtypes, positive),
    memory_bytes_per_s=st.none() | positive,
    launch=curves(),
    memory_read=curves(),
    memory_copy=curves(),
    page_cache_read=curves(),
    products=st.lists(products, max_size=2).map(tuple),
)


def unique(named: st.SearchStrategy[object]) -> st.SearchStrategy[tuple[object, ...]]:
    by_name = st.lists(named, min_size=1, max_size=2, unique_by=lambda one: one.name)  # type: ignore[attr-defined]
    return by_name.map(tuple)


nodes = st.builds(
    Node,
    name=names,
    cpu=texts,
    num_cores=st.none() | counts,
    memory_bytes=st.none() | counts,
    empty_step=curves(),
    devices=unique(devices),
)
measurements = st.builds(
    Measurement,
    date=st.datetimes(timezones=st.just(UTC)),
    versions=st.dictionaries(texts, texts, max_size=2),
    elapsed_s=positive,
    load_average=st.floats(0, 100),
    is_quick=st.booleans(),
)


@st.composite
def clusters(draw: st.DrawFn) -> Cluster:
    made = draw(unique(nodes))
    known = [f"{node.name}/{device.name}" for node in made for device in node.devices]  # type: ignore[attr-defined]
    if len(known) < 2:
        return Cluster(measured=draw(st.none() | measurements), nodes=made)  # type: ignore[arg-type]
    some = st.lists(st.sampled_from(known), min_size=2, unique=True).map(tuple)
    links = st.builds(
        Link, between=some, transport=texts, latency_s=positive, bytes_per_s=positive, send=curves()
    )
    groups = st.builds(Group, devices=some, all_reduce=curves())
    return Cluster(
        measured=draw(st.none() | measurements),
        nodes=made,  # type: ignore[arg-type]
        links=tuple(draw(st.lists(links, max_size=2))),
        groups=tuple(draw(st.lists(groups, max_size=2))),
    )


@given(clusters())
@settings(max_examples=60, deadline=None)
def test_what_is_written_comes_back(cluster: Cluster) -> None:
    assert loads(dumps(cluster)) == cluster


def test_a_file_comes_back(tmp_path: Path) -> None:
    measured = Measurement(
        date=datetime(2026, 1, 2, tzinfo=UTC), versions={}, elapsed_s=1.0, load_average=0.0
    )
    device = Device(name='a "b"\n', kind="cpu", memory_bytes=1)
    cluster = Cluster(measured=measured, nodes=(Node(name="ü\x7f", devices=(device,)),))
    write_cluster(tmp_path / "cluster.toml", cluster)
    assert read_cluster(tmp_path / "cluster.toml") == cluster


def test_a_cluster_is_described_by_hand() -> None:
    cluster = loads(BY_HAND)
    assert cluster.measured is None
    assert [device.name for device in cluster.nodes[0].devices] == ["gpu0", "gpu1"]
    assert cluster.nodes[0].devices[0].flop_per_s == {"bfloat16": 990e12}
    assert cluster.links[0].send == (Point(1024, 5e-6), Point(1_000_000, 8e-6))
    assert cluster.links[1].bytes_per_s == 25e9


@pytest.mark.parametrize(
    ("right", "wrong", "told"),
    [
        ("format_version = 1\n", "", "format_version is missing; this version reads 1"),
        ("format_version = 1", "format_version = 2", "format_version is 2; this version reads 1"),
        ("format_version = 1", "format_version 1", "this is no TOML: .*line 1"),
        ("[[links]]", "[[link]]", "there is no key link; did you mean links"),
        ("memory_bytes =", "memory =", r"nodes\[0\].devices\[0\] has no key memory; did you mean"),
        ("memory_bytes =", "zz =", "has no key zz; the keys are name, kind, model, memory_bytes"),
        ('"left"', "7", r"nodes\[0\].name: Expected `str`, got `int`"),
        ('name = "left"', "", r"nodes\[0\]: Object missing required field `name`"),
        ('"cuda"', '"tpu"', r"nodes\[0\].devices\[0\]: kind 'tpu' is not known; use cpu, cuda"),
        ("bfloat16 =", "int3 =", "dtype 'int3' is not known; use float32, float16, bfloat16"),
        ("80_000_000_000", "0", "memory_bytes=0 must be a finite number above 0"),
        ("5e-6\n", "inf\n", r"links\[0\]: latency_s=inf must be a finite number above 0"),
        ("1_000_000, 8e-6", "8, 8e-6", "send has size 8 behind 1024; sizes must rise"),
        ("[1024, 5e-6]", "[1024]", r"links\[0\].send\[0\]"),
        ("[1024, 5e-6]", "1024", r"links\[0\].send\[0\]: Expected `array`, got `int`"),
        ('"gpu1"', '"gpu0"', "devices of node left: gpu0 is there twice"),
        ('"right"', '"left"', "nodes: left is there twice"),
        ('"right"', '"a/b"', "name 'a/b' must be some text without a /"),
        ('["left", "right"]', '["left"]', "a link joins left; name two or more, each once"),
        (
            '["left", "right"]',
            '["left", "gpu1"]',
            "a link names gpu1, .*; use left, right, left/gpu0",
        ),
    ],
)
def test_what_is_wrong_is_named_with_what_would_be_right(
    tmp_path: Path, right: str, wrong: str, told: str
) -> None:
    path = tmp_path / "mine.toml"
    assert right in BY_HAND
    path.write_text(BY_HAND.replace(right, wrong, 1))
    with pytest.raises(ConfigError, match=rf"^\S+mine.toml: .*{told}") as caught:
        read_cluster(path)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.toml cannot be read: No such file"):
        read_cluster(tmp_path / "nothing.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"binary\.toml is no text in UTF-8"):
        read_cluster(tmp_path / "binary.toml")
