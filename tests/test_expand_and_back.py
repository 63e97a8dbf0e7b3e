"""Compact, expanded, compact again: nothing is lost on the way."""

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from serving import ADAPTERS, ALL, adapter, assert_updates, update
from support import ADAPTER, assert_adapters_equal, refused, run

from lorapack import Adapter, Factors, Pointer, expand_adapter, read_adapter, write_adapter
from lorapack.core.adapter import size
from lorapack.engines import NAMES
from lorapack.pack.equal import share_equal

WORDS = ["q_proj", "q", "layers", "0", "10", "lora_A_like", "été", "block", "proj_q", "x.q_proj"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@st.composite
def adapters(draw):
    """Modules with names that end like one another, shared in groups or private, of any type, shape and scale."""
    names = draw(
        st.lists(
            st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map(".".join), min_size=1, max_size=7, unique=True
        )
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    scales = st.floats(0.01, 100) | st.floats(-100, -0.01) | st.integers(1, 64).map(float)
    pool, modules = {}, {}
    while names:
        members = [names.pop() for _ in range(draw(st.integers(1, len(names))))]
        rank, d_in, d_out = (draw(st.integers(1, 6)) for _ in range(3))
        kind = draw(st.sampled_from(["linear", "linear", "conv", "embedding"])) if len(members) == 1 else "linear"
        shapes = (rank, d_in, 3, 2), (d_out, rank, 1, 1)
        a, b = (torch.randn(s if kind == "conv" else s[:2], generator=generator) for s in shapes)
        name = f"shared.{members[0]}" if len(members) > 1 else members[0]
        pool[name] = Factors(a.to(draw(st.sampled_from(DTYPES))), b.to(draw(st.sampled_from(DTYPES))), kind)
        modules |= {member: Pointer(name, draw(scales)) for member in members}
    carried = {"base_model.model.head.weight": torch.randn(2, 3, generator=generator)} if draw(st.booleans()) else {}
    config = {"peft_type": "LORA", "use_rslora": draw(st.booleans()), "base_model_name_or_path": "owner/base"}
    return Adapter(config, pool, modules, carried)


def groups(found):
    return {frozenset(members) for members in found.groups.values()}


def assert_same(found, source):
    assert_adapters_equal(found, source)
    assert groups(found) == groups(source) and size(found) == size(source)
    assert all(found.factors(module).kind == source.factors(module).kind for module in source.modules)


@settings(max_examples=40, deadline=None)
@given(adapters())
def test_compact_expanded_compact_is_the_same_adapter(source):
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_adapter(source, place / "compact")
        first = read_adapter(place / "compact")
        expand_adapter(first, place / "expanded")
        expanded = read_adapter(place / "expanded")
        assert not expanded.groups
        write_adapter(share_equal(expanded), place / "again")
        again = read_adapter(place / "again")
        assert_same(first, source)
        assert_same(again, source)
        assert again.config["base_model_name_or_path"] == "owner/base"
        assert_same(share_equal(again), source)


@pytest.mark.parametrize("engine", NAMES)
@pytest.mark.parametrize("name", ["one rank and scale", "ranks and scales differ", "shared", "bfloat16", "rsLoRA"])
def test_back_from_an_engine_the_zeros_are_gone_and_the_updates_are_there(engine, name, tmp_path):
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 4}')
    source = ADAPTERS[name]
    expand_adapter(source, tmp_path / "out", engine, base=tmp_path)
    found = share_equal(read_adapter(tmp_path / "out"))
    assert found.modules.keys() == source.modules.keys()
    assert all(found.factors(m).rank == source.factors(m).rank for m in source.modules)
    assert_updates({m: update(found, m) for m in found.modules}, source)


def test_groups_with_one_scale_come_back_from_every_engine(tmp_path):
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 4}')
    plain = adapter(ALL, ranks=(3,))
    members = [m for m in ALL if m.endswith("o_proj")]
    pool = {**plain.pool, "shared.o": plain.pool[members[0]]}
    pool = {name: factors for name, factors in pool.items() if name not in members}
    source = plain.with_pool(pool, {**plain.modules, **{m: Pointer("shared.o", 2.0) for m in members}})
    for engine in NAMES:
        expand_adapter(source, tmp_path / engine, engine, base=tmp_path)
        assert_same(share_equal(read_adapter(tmp_path / engine)), source)


def test_pairs_that_differ_in_one_bit_or_in_type_are_not_the_same():
    one = Factors(torch.ones(2, 3), torch.ones(4, 2))
    other = Factors(torch.ones(2, 3), torch.ones(4, 2).nextafter(torch.tensor(2.0)))
    halves = torch.ones(4, 2).half()
    half, typed = Factors(torch.ones(2, 3), halves), Factors(torch.ones(2, 3), halves.view(torch.bfloat16))
    zero = Factors(torch.ones(2, 3), torch.zeros(4, 2))
    minus = Factors(torch.ones(2, 3), -torch.zeros(4, 2))
    pool = {"a": one, "b": other, "c": half, "d": typed, "e": zero, "f": minus, "g": one}
    found = share_equal(Adapter({}, pool, {name: Pointer(name, 1.0) for name in pool}, {}))
    assert groups(found) == {frozenset("ag")}


def test_the_command_undoes_expand(tmp_path):
    source = ADAPTERS["shared"]
    plain = {m: p for m, p in source.modules.items() if p.core is None}
    source = source.with_pool({p.factors: source.pool[p.factors] for p in plain.values()}, plain)
    write_adapter(source, tmp_path / "compact")
    assert run("expand", tmp_path / "compact", "-o", tmp_path / "expanded").returncode == 0
    before = size(read_adapter(tmp_path / "expanded")).parameters
    done = run("compact", tmp_path / "expanded", "-o", tmp_path / "again")
    assert done.returncode == 0, done.stderr
    after = size(source).parameters
    assert done.stdout == f"Wrote {tmp_path / 'again'}: {after:,} LoRA parameters of {before:,}\n"
    assert_same(read_adapter(tmp_path / "again"), source)
    assert "exists" in refused(run("compact", ADAPTER, "-o", tmp_path / "again"))


def test_an_adapter_of_nothing_but_zeros_is_refused(tmp_path):
    write_adapter(
        Adapter({}, {"a": Factors(torch.zeros(1, 2), torch.zeros(3, 1))}, {"a": Pointer("a", 1.0)}, {}), tmp_path / "in"
    )
    assert "nothing but zeros" in refused(run("compact", tmp_path / "in", "-o", tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    assert load_file(tmp_path / "in" / "adapter_model.safetensors")
