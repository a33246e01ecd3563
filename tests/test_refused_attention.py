"""What attention on global arrays refuses: one clear error each, before anything is compiled."""

import re
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import mesh_of
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lss_jax
from lss_jax.attention.strategies import EXACT
from lss_jax.config.schema import ConfigError
from lss_jax.parallel.mesh import SEQ

pytestmark = pytest.mark.usefixtures("strict_ranks")
B, K = 2, 8
attention = lss_jax.dot_product_attention


X = np.zeros((B, 48, 6, K), np.float32)
WRONG_ARRAYS = {
    "query (6, 8), key (6, 8), value (6, 8): each is [..., L, heads, K], of three": [X[0, 0]] * 3,
    "value (2, 48, 6, 4): queries may differ from keys in length and heads alone, and values in nothing": [
        X,
        X,
        X[..., :4],
    ],
    "key (1, 48, 6, 8), value (1, 48, 6, 8): queries may differ from": [X, X[1:], X[1:]],
    "(2, 0, 6, 8): nothing to attend to; every dimension must be at least 1": [X[:, :0]] * 3,
    "of dtype int32 together; give float32 or bfloat16 or float16": [np.int32(X)] * 3,
    "heads=6 is not divisible by kv_heads=4; each key/value head serves equally many query heads: use kv_heads=6 or": [
        X,
        X[:, :, :4],
        X[:, :, :4],
    ],
}
WRONG_OPTIONS = {
    "strategy='lsss' is not known; choose one of 'lss', 'ring', 'ulysses'": {"strategy": "lsss"},
    "layout='striped' is not known; choose one of 'contiguous', 'zigzag'": {"layout": "striped"},
    "kernel='cudnn' is not known; choose one of 'auto', 'blockwise'": {"kernel": "cudnn"},
    "kernel='triton' is for NVIDIA GPUs of compute capability 8.0 or more, and these devices are cpu; use kernel=": {
        "kernel": "triton"
    },
    "block_keys=0 must be at least 1": {"block_keys": 0},
    "block_queries=8.0 is of type float; give a value of type int": {"block_queries": 8.0},
    "implementation='cudnn' is refused, since it would see one device's keys alone; use implementation=None, and": {
        "implementation": "cudnn"
    },
    "query_seq_lengths of shape (3,) and dtype int32 must be one integer for each row of the batch, which": {
        "query_seq_lengths": np.zeros(3, np.int32)
    },
    "key_value_seq_lengths of shape (2,) and dtype float32 must be one integer": {
        "key_value_seq_lengths": np.zeros(2, np.float32)
    },
    "mask is of dtype float32; give booleans, or numbers that are added to the scores as bias": {
        "mask": np.zeros((1, 1, 48, 48), np.float32)
    },
    "bias is of dtype bool; give floating-point numbers, or booleans as mask": {"bias": np.zeros((1, 1, 48, 48), bool)},
    "mask of shape (2, 1, 48, 47) does not broadcast to (2, 6, 48, 48): rows, query heads, queries, keys, each as": {
        "mask": np.ones((B, 1, 48, 47), bool)
    },
    "bias of shape (1, 1, 1, 1, 48) does not broadcast to (2, 6, 48, 48)": {"bias": np.ones((1, 1, 1, 1, 48))},
    "kernel='triton' reads no mask array and no bias; use kernel='auto', which is 'blockwise' then": {
        "bias": np.ones(48),
        "kernel": "triton",
    },
    "prefix=-1 must be at least 0": {"prefix": -1, "is_causal": True},
    "prefix=3 has no use with is_causal=False, under which all is seen anyway; use prefix=0": {"prefix": 3},
    "local_window_size=-1 must be one number or (left, right), each at least 0; for a side without a bound, give": {
        "local_window_size": -1
    },
    "local_window_size=(1, 2, 3) must be one number or (left, right)": {"local_window_size": (1, 2, 3)},
    "local_window_size=0.5 must be one number or (left, right)": {"local_window_size": 0.5},
    "intervals: end is of dtype float32; give positions as integers": {"intervals": (0, np.float32(5))},
    "intervals: start and end of shapes (47,) and () do not broadcast to (2, 48), which the queries have before": {
        "intervals": (np.zeros(47, int), 5)
    },
    "intervals: end of shape (48,) could be of the 48 queries or of the 48 rows of the batch; give [1, L] for": {
        "rows": 48,
        "intervals": (0, np.full(48, 5)),
    },
    "shapes () and (3, 2, 48) do not broadcast to (2, 48)": {"intervals": (0, np.zeros((3, 2, 48), int))},
    'heads=6 is not divisible by seq=4, which strategy="ulysses" needs; use heads=8 or strategy="lss"': {
        "strategy": "ulysses"
    },
    'heads=6 is not divisible by seq=2 times model=2, which strategy="ulysses" needs; use heads=8': {
        "strategy": "ulysses",
        "mesh": (1, 2, 2),
    },
    'kernel=\'dense\' cannot take keys as they come by, which strategy="ring" needs; use kernel="blockwise"': {
        "strategy": "ring",
        "kernel": "dense",
    },
    "kv_heads=6 is not divisible by head_groups=4; use head_groups=6 or another divisor": {"head_groups": 4},
    "kv_heads=6 is not divisible by head_groups=6 times model=2; use head_groups=1": {
        "head_groups": 6,
        "mesh": (1, 2, 2),
    },
    "regather=True has no use with strategy='ring', which saves nothing of other devices; use regather=False": {
        "strategy": "ring",
        "regather": True,
    },
    "mesh=None is no jax.sharding.Mesh; give one, as of jax.make_mesh((jax.device_count(),), ('seq',))": {"mesh": None},
    "axes=('data', 'context', 'model') do not name axes of this mesh, which has 'data', 'seq', 'model'; give its": {
        "axes": ("data", "context", "model")
    },
    "axes=('data', 'seq', 'seq') do not name axes of this mesh": {"axes": ("data", "seq", "seq")},
    "axes=('dat', 'seq', None) do not name axes of this mesh": {"axes": ("dat", "seq", None)},
}


@pytest.mark.parametrize("message", WRONG_ARRAYS)
def test_arrays_that_do_not_go_together_are_one_clear_error(message):
    with pytest.raises(ConfigError) as error:
        attention(*WRONG_ARRAYS[message], mesh=mesh_of(1, 2))
    assert message in str(error.value)


@pytest.mark.parametrize("message", WRONG_OPTIONS)
def test_options_that_cannot_work_are_one_clear_error(message):
    options = {"mesh": (1, 4, 1), **WRONG_OPTIONS[message]}
    if options["mesh"]:
        options["mesh"] = mesh_of(*options["mesh"])
    x = np.zeros((options.pop("rows", B), 48, 6, K), np.float32)
    with pytest.raises(ValueError) as error:
        attention(x, x, x, **options)
    assert message in str(error.value)


def test_all_problems_are_told_at_once():
    with pytest.raises(ConfigError) as error:
        attention(X, X, X, mesh=mesh_of(1, 4), strategy="ulysses", block_keys=0, head_groups=4)
    found = [line.partition("=")[0] for line in str(error.value).splitlines()]
    assert found == ["block_keys", "kv_heads", "heads"]


GUIDE = (Path(__file__).parents[1] / "docs" / "own_model.md").read_text()
REFUSED = re.findall(r"^\| `(.*)` \| (.*) \|$", GUIDE, re.MULTILINE)


@pytest.mark.parametrize(("call", "why"), REFUSED)
def test_the_guide_says_what_is_refused_and_why(call, why):
    mesh = mesh_of(2, 2)
    names = {
        "jax": jax,
        "P": P,
        "mesh": mesh,
        "attend": partial(attention, mesh=mesh),
        "layer": lss_jax.attention_fn(mesh),
        "x": jnp.asarray(X),
        "x48": jnp.zeros((48, 48, 6, K)),
        "lengths48": jnp.full(48, 5),
        "numbers": jnp.zeros((1, 1, 48, 48)),
        "symbols": jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, 48, 6, 8"), jnp.float32),
        "elsewhere": jax.device_put(X, jax.devices()[7]),
    }
    with pytest.raises(ConfigError) as error:
        eval(call, names)
    assert why in str(error.value)


def test_the_guide_lists_what_is_refused():
    assert len(REFUSED) >= 18


def test_local_arrays_are_refused():
    mesh = mesh_of(1, 2)
    by_sequence = {"in_specs": P(None, SEQ), "out_specs": P(None, SEQ)}
    said = r"this is inside a shard_map; call it outside, or .*attention\.strategies\.make_attend"
    with pytest.raises(ConfigError, match=said):
        jax.shard_map(lambda x: attention(x, x, x, mesh=mesh), mesh=mesh, **by_sequence)(X)


def test_forward_mode_is_refused():
    def attend(q):
        return attention(q, X, X, mesh=mesh_of(1, 2))

    x = jnp.asarray(X)
    with pytest.raises(ConfigError, match=r"forward-mode .* is refused, .*; use jax.grad or jax.vjp, of which a jvp"):
        jax.jvp(attend, (x,), (x,))
    for late in (lambda: jax.jvp(jax.jit(attend), (x,), (x,)), lambda: jax.linearize(attend, x)[1](x)):
        with pytest.raises(TypeError, match=r"forward-mode autodiff \(jvp\)"):  # when our code has long been left
            late()


@pytest.mark.parametrize("name", ["is_causal", "local_window_size", "prefix"])
def test_what_decides_on_the_program_cannot_be_traced(name):
    with pytest.raises(
        ConfigError, match=rf"{name} is traced, and decides .* \(static_argnames='{name}' of jax.jit\), or"
    ):
        jax.jit(lambda value: attention(X, X, X, mesh=mesh_of(1, 2), **{name: value}))(1)


@pytest.mark.parametrize("strategy", EXACT)
@pytest.mark.parametrize("shape", ["b, 16, 8, 8", "2, l, 8, 8"])
def test_sizes_that_are_symbols_are_refused(strategy, shape):
    x = jax.ShapeDtypeStruct(jax.export.symbolic_shape(shape), jnp.float32)
    program = jax.jit(lambda x: attention(x, x, x, mesh=mesh_of(2, 2), strategy=strategy))
    with pytest.raises(ConfigError, match=r"a size that is a symbol is refused, .*; export one program per size"):
        jax.export.export(program)(x)


@pytest.mark.parametrize(("axis_type", "axes"), [(AxisType.Explicit, None), (AxisType.Auto, "data")])
def test_vmap_over_an_axis_that_shards_the_batch_is_refused(axis_type, axes):
    mesh = jax.make_mesh((2, 4), ("data", SEQ), axis_types=(axis_type,) * 2)
    x = jax.device_put(np.zeros((2, B, 48, 6, K), np.float32), NamedSharding(mesh, P("data", None, SEQ)))
    attend = jax.vmap(lambda x: attention(x, x, x, mesh=mesh), spmd_axis_name=axes)
    with pytest.raises(
        ConfigError, match=r"vmap maps over an axis that the mesh shards .*; call it without vmap, since"
    ):
        attend(x)


def test_arrays_on_other_devices_are_refused():
    there = [jax.device_put(X, device) for device in jax.devices()[2:5]]
    with pytest.raises(ConfigError) as error:
        attention(*there, mesh=mesh_of(1, 2))
    said = (
        "query is on 1 device(s), cpu:2 for one, which are not the 2 of the mesh; place it there first, as by jax.dev"
    )
    assert said in str(error.value) and len(str(error.value).splitlines()) == 3


@pytest.mark.parametrize("how", ["query", "jax.set_mesh"])
def test_another_mesh_with_explicit_axes_is_refused(how):
    other = jax.make_mesh((8,), (SEQ,))
    x = jax.device_put(X, NamedSharding(other, P(None, SEQ))) if how == "query" else X
    context = jax.set_mesh(other) if how == "jax.set_mesh" else nullcontext()
    with context, pytest.raises(ConfigError) as error:
        attention(x, X, X, mesh=mesh_of(2, 4))
    said = (
        f"{how} is on a mesh of {{'seq': 8}}, and mesh is of {{'data': 2, 'seq': 4, 'model': 1}}; give the same to both"
    )
    assert said in str(error.value)
