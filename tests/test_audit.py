"""The audit: what it reads in compiled programs, what it says of them, and that it sees what is wrong."""

import json
import subprocess
import sys
from typing import Any

import jax
import pytest
from helpers import model_on, sampled

from lss_jax.attention import lss
from lss_jax.audit import DISAGREES
from lss_jax.inspection import contract, hlo, operations
from lss_jax.inspection.audit import HOST, audited, json_of, problems, text_of
from lss_jax.inspection.topology import devices_of
from lss_jax.models.recompute import waiting
from lss_jax.parallel.mesh import make_mesh
from lss_jax.parallel.scopes import GRADIENTS, LOSS
from lss_jax.training.step import trace_train_step

LAYERS = 3

GPU = """
ENTRY %main (p: f32[8]) -> f32[64] {
  %p = f32[8]{0} parameter(0)
  %ag = (f32[8]{0}, f32[64]{0}) all-gather-start(%p), replica_groups={{0,1},{2,3}}, metadata={op_name="f/attention/x"}
  %ar = f32[8]{0} all-reduce-start(%p), replica_groups=[2,2]<=[2,2]T(1,0), config={"is_sync":true}
  %done = f32[8]{0} all-reduce-done(%ar)
  ROOT %out = f32[64]{0} all-gather-done(%ag)
}
"""
TPU = """
%cond (s: (s32[], bf16[4,6])) -> pred[] {
  %s = (s32[], bf16[4,6]{1,0}) parameter(0)
  %constant.7 = s32[]{:T(128)} constant(5)
  %i = s32[] get-tuple-element(%s), index=0
  ROOT %lt = pred[] compare(%i, %constant.7), direction=LT
}

%taken (a: bf16[4,6], b: s32[]) -> bf16[6] {
  %a = bf16[4,6]{1,0} parameter(0)
  %b = s32[] parameter(1)
  %ds = bf16[1,6]{1,0} dynamic-slice(%a, %b, %b), dynamic_slice_sizes={1,6}
  ROOT %bitcast = bf16[6]{0} bitcast(%ds)
}

%body (s: (s32[], bf16[4,6])) -> (s32[], bf16[4,6]) {
  %s = (s32[], bf16[4,6]{1,0}) parameter(0)
  %x = bf16[4,6]{1,0} get-tuple-element(%s), index=1
  %ar = bf16[4,6]{1,0:T(4,128)(2,1)} all-reduce(%x), replica_groups={{0,1,2,3}}
  %mine = bf16[6]{0} fusion(%ar, %i), kind=kLoop, calls=%taken, metadata={op_name="jit(f)/transpose(jvp())/attention/x"}
  ROOT %t = (s32[], bf16[4,6]{1,0}) tuple(%i, %x)
}

%all-reduce-scatter.1 (input: f32[4,6]) -> f32[2,6] {
  %input = f32[4,6]{1,0} parameter(0)
  %sum = f32[4,6]{1,0:T(4,128)} all-reduce(%input), replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}
  %first = f32[1,6]{1,0} dynamic-slice(%sum, %c, %c), dynamic_slice_sizes={1,6}
  %second = f32[1,6]{1,0} dynamic-slice(%sum, %d, %c), dynamic_slice_sizes={1,6}
  ROOT %own = f32[2,6]{1,0} concatenate(%first, %second), dimensions={0}
}

ENTRY %main (p: f32[4,6]) -> f32[2,6] {
  %p = f32[4,6]{1,0} parameter(0)
  %loop = (s32[], bf16[4,6]{1,0}) while(%init), condition=%cond, body=%body
  %cp = (f32[6]{0}, f32[6]{0}, u32[]) collective-permute-start(%p), source_target_pairs={{0,0},{1,3},{3,1}}
  %cpd = f32[6]{0} collective-permute-done(%cp)
  ROOT %rs = f32[2,6]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1, metadata={op_name="jit(f)/regions/y"}
}
"""


def test_the_forms_of_gpus_are_read():
    gather, reduce = hlo.collectives(GPU)
    assert gather[:3] == ("all-gather", 64, 256) and gather.asynchronous and gather.place == "attention forward"
    assert reduce[:3] == ("all-reduce", 8, 32) and not reduce.asynchronous and reduce.group == (0, 2)
    assert gather.axes({"data": 2, "seq": 2, "model": 1}) == ("seq",)
    assert reduce.axes({"data": 2, "seq": 2, "model": 1}) == ("data",)


def test_the_forms_of_tpus_are_read():
    """A reduce-scatter as an all-reduce and a slice, in a loop of whose length only the condition knows, and fused.

    The fused one takes its share in two slices.
    """
    in_loop, permute, fused = hlo.collectives(TPU)
    assert in_loop[:3] == ("reduce-scatter", 6, 12) and in_loop.times == 5 and in_loop.place == "attention backward"
    assert permute[:3] == ("collective-permute", 6, 24) and permute.asynchronous and permute.group == (1, 3)
    assert fused[:3] == ("reduce-scatter", 12, 48) and fused.group == (0, 4) and fused.place == "regions forward"


def test_a_sum_that_somebody_needs_whole_stays_a_sum():
    text = TPU.replace("tuple(%i, %x)", "tuple(%i, %ar)")
    assert hlo.collectives(text)[0][:3] == ("all-reduce", 24, 48)


def test_off_tpus_a_slice_of_a_sum_is_no_scatter():
    text = TPU.replace("{1,0:T(4,128)(2,1)}", "{1,0}")
    assert hlo.collectives(text)[0][:3] == ("all-reduce", 24, 48)


QWEN3 = {"model__positions": "rope", "model__qk_norm": True, "model__heads": 8, "model__head_width": 12}
VARIANTS = {
    "dense": ((2, 4), {"attention__kernel": "dense"}),
    "remat": ((2, 4), {"model__remat": "block", "model__kv_heads": 2}),
    "hybrid, vocabulary": ((2, 2, 2), {"model__remat": "block", "model__vocab_parallel": True}),
    "ulysses, microbatches": ((1, 4), {"attention__strategy": "ulysses", "optim__accumulate": 2}),
    "ring, padded": ((2, 3), {"attention__strategy": "ring", "data__seq_len": 47}),
    "qwen 3, recomputed in tiles": ((1, 4), {**QWEN3, "model__remat": "block", "model__tile": 8}),
    "qwen 3, ring, head groups": ((1, 2, 2), {**QWEN3, "attention__strategy": "ring", "attention__head_groups": 2}),
    "qwen 3, tiles": ((1, 4), {**QWEN3, "model__tile": 8}),
    "muon, grouped queries": ((2, 4), {"optim__name": "muon", "model__kv_heads": 2}),
}


@pytest.mark.parametrize(
    "variant", sampled(VARIANTS, ["dense", "hybrid, vocabulary", "ring, padded", "qwen 3, recomputed in tiles"])
)
def test_operations_outside_attention_are_as_predicted(variant):
    sizes, changes = VARIANTS[variant]
    model, mesh = model_on(*sizes, model__layers=LAYERS, **changes)
    assert operations.traced(trace_train_step(model, mesh).jaxpr) == operations.outside_attention(model, mesh)


def test_operations_of_attention_follow_the_mask():
    """Blocks of 16 by 16 of 512 tokens on 4 devices, in zigzag: whole, half and a diagonal of them."""
    size = {"data__seq_len": 512, "attention__block_queries": 16, "attention__block_keys": 16}
    flops = {window: operations.attention(*model_on(1, 4, attention__window=window, **size)) for window in (0, 16)}
    dense = operations.attention(*model_on(1, 4, attention__kernel="dense", **size))
    blocks = 32  # in a row, of which a causal mask leaves 16.5 on average and a window of 16 at most two
    assert flops[0] / dense == pytest.approx((blocks + 1) / 2 / blocks)
    assert flops[16] / dense <= 2 / blocks


def test_what_stays_on_the_device_though_it_should_wait_on_the_host_is_reported():
    model, mesh = model_on(1, 8, model__remat="offload")
    result = audited(model, mesh)
    assert problems(result, None) == [] and result.memory[HOST] == result.predicted_memory[HOST] == 0, "as on CPUs"
    result = result._replace(predicted_memory={**result.predicted_memory, HOST: 3 * 2**20})
    assert problems(result, None) == [
        "host memory: 0.00 MiB in the program, 3.00 MiB predicted: what should wait there stays on the devices"
    ]


def test_the_text_and_the_json_tell_the_same():
    result = audited(*model_on(2, 4, model__layers=LAYERS))
    text, values = text_of(result, 2**30), json_of(result, 2**30)
    assert text.splitlines()[-1] == "all as predicted" and "of 1.00 GiB: fits" in text
    assert json.loads(json.dumps(values)) == values and values["problems"] == []
    assert values["collectives"]["compiled"][1]["times"] == LAYERS
    assert f"{values['operations']['attention']:,} by the blocks" in text
    (shortfall,) = problems(result, 1000)
    assert shortfall.startswith("it does not fit: ")


def test_a_second_gather_is_seen(monkeypatch):
    """Keys and values each for themselves, and one after the other."""
    real = lss.all_gather

    def one_by_one(kv_2BGlK, axis):
        both = real(kv_2BGlK, axis)
        return real(kv_2BGlK + 0 * both[0], axis)

    monkeypatch.setattr(lss, "all_gather", one_by_one)
    result = audited(*model_on(1, 8, model__layers=LAYERS))
    assert any("attention forward: all-gather over seq: 6 with" in problem for problem in problems(result, None))


def test_gradients_may_stay_apart_where_they_are_large():
    line = contract.Line(GRADIENTS, "all-reduce", ("data",))

    def of(times, elements, place=GRADIENTS):
        return {line._replace(place=place): contract.Total(times, elements, 4 * elements, 0)}

    large = contract.LARGE + 1
    assert contract.disagreements(of(2, large), of(1, large)) == []
    assert contract.disagreements(of(contract.VECTORS + 1, large), of(1, large))
    assert contract.disagreements(of(2, large - 1), of(1, large - 1))
    assert contract.disagreements(of(2, large + 1), of(1, large))
    assert contract.disagreements(of(2, large, LOSS), of(1, large, LOSS))


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "lss_jax.audit", "--config", "configs/default.py", *arguments],
        capture_output=True,
        text=True,
    )


def test_the_command_checks_and_writes(tmp_path):
    mesh = ["--config.mesh.data=1", "--config.mesh.seq=4", "--topology", "cpu:4"]
    small = ["--config.model.layers=1", "--config.data.seq_len=32", *mesh]
    done = command(*small, "--check", "--json", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stderr
    assert "4 cpu, mesh data=1 x seq=4 x model=1" in done.stdout
    assert json.loads((tmp_path / "out.json").read_text())["problems"] == []
    assert command(*small, "--check", "--memory", "1MiB").returncode == DISAGREES


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "tpu:v9:2x2"], "topology 'tpu:v9:2x2' is unknown; write it like"),
        pytest.param(["--memory", "much"], "--memory=much is no size", marks=pytest.mark.grid),
        pytest.param(["--topology", "cpu:6", "--config.mesh.seq=4"], "mesh", marks=pytest.mark.grid),
    ],
)
def test_bad_input_of_the_command_is_one_error(arguments, message):
    done = command(*arguments)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and message in done.stderr
    assert "Traceback" not in done.stderr


IN_GROUPS = {"attention__head_groups": 4, "model__remat": "block"}
ON_TPU: list[tuple[tuple[int, ...], dict[str, Any], int]] = [
    ((1, 8), {}, 2),
    ((1, 1, 8), {}, 8),
    ((2, 2, 2), {}, 10),
    ((1, 8), {"attention__strategy": "ulysses"}, 4),
    ((1, 8), IN_GROUPS, 2 * 4),
    ((1, 8), {**IN_GROUPS, "attention__regather": True, "attention__kernel": "blockwise"}, 3 * 4),
]
LARGE = {
    **{"model__norm": "rms", "model__mlp": "swiglu", "model__bias": False, "model__tied_head": False},
    **{"mesh__shard": "all", "model__tile": 32, "model__remat": "offload", "model__dtype": "bfloat16"},
    **{"attention__head_groups": 2, "attention__regather": True, "model__heads": 8, "model__width": 1024},
}


@pytest.mark.grid
@pytest.mark.parametrize(("sizes", "changes", "per_layer"), ON_TPU)
def test_the_contract_holds_on_a_tpu_topology(sizes, changes, per_layer):
    """Compiled for eight chips that are not here, with the fused kernel unless the changes say otherwise."""
    model, _ = model_on(*sizes, model__layers=LAYERS, model__heads=8, model__width=512, data__seq_len=1024, **changes)
    mesh = make_mesh((*sizes, 1)[:3], devices_of("tpu:v5p:2x2x2"))
    result = audited(model, mesh)
    assert problems(result, None) == []
    assert result.collectives is not None
    of_layers = sum(
        total.times for line, total in result.collectives.items() if line.place.split()[0] in ("attention", "regions")
    )
    assert of_layers == per_layer * LAYERS


@pytest.mark.grid
@pytest.mark.parametrize("changes", [{}, {"model__remat_every": 2, "model__layers": 4}])
def test_large_models_on_a_tpu_topology(changes):
    """Weights in shares, tiles, groups and offload: every collective as predicted, and host memory to the byte."""
    sizes = {"model__layers": LAYERS, "data__seq_len": 8192, "data__batch_size": 2, **LARGE, **changes}
    model, _ = model_on(1, 8, **sizes)
    result = audited(model, make_mesh((1, 8, 1), devices_of("tpu:v5p:2x2x2")))
    assert problems(result, None) == []
    waits = waiting(model.config, result.mesh)
    assert result.memory[HOST] == result.predicted_memory[HOST] == waits > 0


@pytest.mark.grid
@pytest.mark.parametrize("changes", [{"model__remat": "block"}, {"model__remat_every": 2, "model__layers": 4}])
def test_state_in_host_memory_on_a_tpu_topology(changes):
    """Only a layer's weights, gradients and moments are on the device; libtpu copies some of them on the host."""
    sizes = {"model__layers": LAYERS, "data__seq_len": 8192, "data__batch_size": 2, **LARGE, **changes}
    plain, offloaded = (model_on(1, 8, **sizes, optim__offload=offload)[0] for offload in (False, True))
    mesh = make_mesh((1, 8, 1), devices_of("tpu:v5p:2x2x2"))
    result, before = audited(offloaded, mesh), audited(plain, mesh)
    assert problems(result, None) == []
    for name in ("parameters", "optimizer state"):
        assert result.memory[name] == result.predicted_memory[name] < 0.2 * before.memory[name]
    moved = sum(before.memory[name] - result.memory[name] for name in ("parameters", "optimizer state"))
    assert result.predicted_memory[HOST] > waiting(offloaded.config, mesh) + moved
    assert 0.95 < result.memory[HOST] / result.predicted_memory[HOST] < 1.5


@pytest.mark.grid
def test_a_vocabulary_over_all_devices_in_tiles_on_a_tpu_topology():
    """The compiler takes a device's share of the loss's sums in several slices, and loses the place of others."""
    large = {**LARGE, "attention__head_groups": 1, "attention__regather": False, "model__vocab_parallel": True}
    model, _ = model_on(1, 1, 8, model__layers=LAYERS, data__seq_len=8192, data__batch_size=1, **large)
    assert problems(audited(model, make_mesh((1, 1, 8), devices_of("tpu:v5p:2x2x2"))), None) == []


@pytest.mark.grid
def test_a_program_that_does_not_fit_is_told_with_its_sizes():
    model, _ = model_on(
        1, 4, model__layers=2, model__width=512, data__seq_len=2**17, data__batch_size=16, attention__kernel="dense"
    )
    result = audited(model, make_mesh((1, 4, 1), devices_of("tpu:v5e:2x2")))
    text = text_of(result, None)
    assert "does not fit: " in text and "exceed" in text.lower()
    assert "attention forward" in text, "what was predicted stands there all the same"


def test_what_is_predicted_has_no_trace_of_axes_of_one_device():
    model, mesh = model_on(1, 1)
    assert contract.predicted(model, mesh) == {}
    assert len(jax.devices()) == 8
