"""Narrow windows: devices fetch their neighbours' tokens, and no more, and nothing else changes."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import TOKENS, Case, arrays_of, attended, oracle, seen_by
from contracts import check_contract, compiled_step
from helpers import assert_close, check_against_oracle, model_on, sampled
from jax.sharding import AbstractMesh

from lss_jax import dot_product_attention, make_mesh
from lss_jax.attention.mask import Intervals, bidirectional, documents, neighbours
from lss_jax.attention.nearby import runs_of
from lss_jax.attention.placement import setting_on
from lss_jax.attention.setting import Reach
from lss_jax.attention.traffic import sizes_of
from lss_jax.inspection import contract, hlo
from lss_jax.models import build_model
from lss_jax.parallel.dropout import Dropout
from lss_jax.parallel.hashing import hashed
from lss_jax.tasks import make_task

REACHES = [Reach(0, 0), Reach(4, 0), Reach(3, 2), Reach(0, 5), Reach(13, 0), Reach(20, 0), Reach(10, 11)]


def mask_of(case, by_row=False):
    """What the reach shows of a row's tokens; or, with documents, of its own."""
    position, reach = np.arange(case.length), case.reach
    mask = bidirectional(position, TOKENS) & neighbours(position, reach.before, reach.behind)
    if by_row:
        edge_B1 = np.array([[20], [61]])
        of_document = np.where(position < edge_B1, 0, edge_B1), np.where(position < edge_B1, edge_B1, TOKENS)
        mask &= documents(np.stack(of_document))
    return Intervals(*(np.asarray(x, np.int32) for x in mask))


def check(case, dropout=None):
    """Compares with the dense oracle; with dropout, with what a gather of all keys gives."""
    mask, arrays = mask_of(case, case.by_row), arrays_of(case.length, case.kv_heads)
    found = attended(case, arrays, mask, dropout)._asdict()
    if dropout is None:
        expected = oracle(*arrays, seen_by(mask))
    else:
        expected = attended(dataclasses.replace(case, kernel="blockwise", reach=None), arrays, mask, dropout)
    assert_close(found, expected._asdict(), 1e-5)


LAYOUTS = ("contiguous", "zigzag")
CASES = [
    *(
        Case("lss", layout, seq=seq, kv_heads=2, reach=reach, by_row=True)
        for layout in LAYOUTS
        for seq in (2, 3, 8)
        for reach in REACHES
    ),
    *(
        Case("lss", layout, seq=seq, kv_heads=2, kernel=kernel, reach=reach)
        for layout in LAYOUTS
        for seq, reach in ((3, Reach(3, 2)), (8, Reach(13, 0)))
        for kernel in ("dense", "mosaic")
    ),
]
SAMPLE = [
    Case("lss", "contiguous", seq=8, kv_heads=2, reach=Reach(20, 0), by_row=True),
    Case("lss", "zigzag", seq=8, kv_heads=2, reach=Reach(10, 11), by_row=True),
    Case("lss", "zigzag", seq=3, kv_heads=2, kernel="dense", reach=Reach(3, 2)),
    Case("lss", "zigzag", seq=8, kv_heads=2, kernel="mosaic", reach=Reach(13, 0)),
]


@pytest.mark.parametrize("case", sampled(CASES, SAMPLE), ids=str)
def test_attention_equals_the_oracle(case):
    check(case)


@pytest.mark.parametrize("kernel", sampled(["blockwise", "dense", "mosaic"], ["blockwise", "mosaic"]))
def test_the_same_weights_are_dropped(kernel):
    dropout = Dropout(0.4, hashed(7, 1), np.arange(2), np.arange(96), 0)
    check(Case("lss", "zigzag", seq=8, kv_heads=2, kernel=kernel, reach=Reach(13, 0)), dropout)


def test_keys_fetched_once_more_in_the_backward_pass():
    check(Case("lss", "zigzag", seq=3, kv_heads=2, regather=True, reach=Reach(6, 4)))


WINDOW = {"attention__window": 7, "data__seq_len": 93}
VARIANTS = {
    "causal": {},
    "contiguous": {"attention__layout": "contiguous"},
    "over several chunks": {"attention__window": 20},
    "documents, microbatches": {"data__separator": "a", "optim__accumulate": 2},
    "fetched again": {"attention__regather": True, "model__remat": "block"},
    "groups": {"attention__head_groups": 2, "model__kv_heads": 4},
    "offload": {"model__remat": "offload"},
    "dropout": {"model__dropout": 0.1},
}
MESHES = [(1, 8, 1), (2, 4, 1), (2, 2, 2), (1, 3, 1)]
IN_TURN = [(MESHES[(turn + half) % 4], name) for turn, name in enumerate(VARIANTS) for half in (0, 1)]
OF_CONTRACT = [((1, 8, 1), "over several chunks"), ((2, 4, 1), "fetched again"), *IN_TURN]
OF_MODELS = [
    ((1, 8, 1), "over several chunks"),
    ((2, 2, 2), "fetched again"),
    *((sizes, name) for sizes, name in IN_TURN if name != "dropout"),
]


@pytest.mark.parametrize("case", sampled(list(dict.fromkeys(OF_MODELS)), OF_MODELS[:2]), ids=str)
def test_gradient_equals_the_oracle(case):
    sizes, name = case
    check_against_oracle(*sizes, **{**WINDOW, **VARIANTS[name]})


@pytest.mark.parametrize("case", sampled(list(dict.fromkeys(OF_CONTRACT)), OF_CONTRACT[:2]), ids=str)
def test_collectives_of_a_training_step(case):
    sizes, name = case
    check_contract(*sizes, **{**WINDOW, **VARIANTS[name]})
    _, _, found = compiled_step(*sizes, **{**WINDOW, **VARIANTS[name]})
    narrow = name != "over several chunks" or sizes[1] == 8  # of the others' few segments it shows too much
    kinds = {one.kind for one in found if one.place.startswith("attention")}
    assert kinds == ({"collective-permute"} if narrow else {"all-gather", "reduce-scatter"})


def sent(lines, devices):
    """The bytes of attention per device and step: of what a scatter takes, of what all else gives."""
    of_attention = ((line, total) for line, total in lines.items() if line.place.startswith("attention"))
    return sum(total.bytes * (devices if line.kind == "reduce-scatter" else 1) for line, total in of_attention)


@pytest.mark.parametrize(("layout", "on_64_devices"), [("contiguous", 2 / 16), ("zigzag", 3 / 16)])
def test_bytes_are_in_proportion_to_the_window(layout, on_64_devices):
    """At a window of L/16, at most 2/16 of what a gather moves: compiled for 8 devices, predicted for 64.

    Under zigzag a late chunk's neighbours may be late or early chunks. All devices have room for both, where one comes.
    """
    size = {"attention__layout": layout, "data__seq_len": 1024, "data__batch_size": 1}
    moved = {}
    for window in (0, 64):
        _, mesh, found = compiled_step(1, 8, **size, attention__window=window)
        moved[window] = sent(contract.found(found, mesh), 8)
    assert 0 < moved[64] <= 2 / 16 * moved[0]
    for window in (0, 64):
        config = model_on(1, 1, **size, attention__window=window)[0].config
        on_64 = AbstractMesh((1, 64, 1), ("data", "seq", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
        model = build_model(config, on_64)
        moved[window] = sent(contract.predicted(model, on_64), 64)
    assert 0 < moved[64] <= on_64_devices * moved[0]


@pytest.mark.parametrize(
    ("reach", "narrow"), [(Reach(21, 0), True), (Reach(22, 0), False), (Reach(11, 10), True), (None, False)]
)
def test_a_wide_window_is_gathered(reach, narrow):
    """The runs of two chunks take `2 x reach` tokens of others, and a gather 84: the 12 of each of 7 devices."""
    case = Case("lss", "zigzag", seq=8, reach=reach)
    setting = dataclasses.replace(setting_of_case(case), reach=reach)
    assert (runs_of(12, setting) is not None) == narrow


def setting_of_case(case):
    model, mesh = model_on(1, case.seq)
    return dataclasses.replace(setting_on(model.config, mesh), layout=case.order, key_layout=case.order)


def test_a_prefix_and_another_sequence_are_gathered():
    for changes in ({"attention__prefix": 3}, {"attention__window": 0}):
        model, mesh = model_on(1, 8, **{**WINDOW, **changes})
        seen = make_task(model.config).mask_kind
        assert runs_of(sizes_of(model.config, mesh).l, setting_on(model.config, mesh, seen=seen)) is None


@pytest.mark.parametrize(("window", "kind"), [(3, "collective-permute"), (48, "all-gather")])
def test_attention_for_other_models_fetches_neighbours(window, kind):
    mesh, x = make_mesh((1, 8, 1)), jnp.zeros((1, 96, 2, 8))
    attend = jax.jit(partial(dot_product_attention, mesh=mesh, is_causal=True, local_window_size=window))
    found = hlo.collectives(attend.lower(x, x, x).compile().as_text())
    assert {one.kind for one in found} == {kind}


def test_a_dropped_send_is_seen(monkeypatch):
    monkeypatch.setattr(jax.lax, "ppermute", lambda x, _axis, _moves: x)
    with pytest.raises(AssertionError, match="relative error"):
        check(Case("lss", "contiguous", seq=8, kv_heads=2, reach=Reach(6, 0)))


def test_gradients_that_stay_are_seen(monkeypatch):
    real = jax.lax.ppermute
    monkeypatch.setattr(jax.lax, "ppermute", lambda x, axis, moves: real(x, axis, moves) if x.shape[4] == 8 else 0 * x)
    case = Case("lss", "contiguous", seq=8, kv_heads=2, reach=Reach(7, 0))
    mask, arrays = mask_of(case), arrays_of(case.length, case.kv_heads)
    found, expected = attended(case, arrays, mask), oracle(*arrays, seen_by(mask))
    assert_close({"o": found.o, "dq": found.dq}, {"o": expected.o, "dq": expected.dq}, 1e-5)
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(found._asdict(), expected._asdict(), 1e-5)
