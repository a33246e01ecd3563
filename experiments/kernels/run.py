"""Fused attention kernels: that they compile, and on devices that have one, their errors and their time.

    python -m experiments.kernels.run --topology gpu:h100:8 --topology tpu:v5p:2x2x2    # compiled; without such devices
    python -m experiments.kernels.run                                                   # on the devices at hand

Claim: forward and backward compile for NVIDIA GPUs and TPUs inside `shard_map` with `check_vma=True`, for either dtype
and for narrow and wide heads; on such a device outputs and gradients equal those of dense attention, in less time than
"blockwise" takes. Committed: the compiled results. The kernels have not run on a GPU or a TPU yet.
Cost: two minutes. Compiling for absent devices takes pip install "jax[cuda13]" or "jax[tpu]".
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lss_jax import cli
from lss_jax.attention.mask import causal
from lss_jax.attention.placement import fused_on
from lss_jax.attention.setting import Setting
from lss_jax.attention.strategies import make_attend
from lss_jax.inspection.topology import cpu_devices_of, devices_of
from lss_jax.parallel.dropout import Dropout
from lss_jax.parallel.layout import Layout
from lss_jax.parallel.mesh import SEQ, make_mesh, sharded_axes, without_unsharded
from lss_jax.runtime import distributed

HERE = Path(__file__).parent
ROUNDS = 5


class Case(NamedTuple):
    """One layer of attention: tokens per segment, heads, head width, dtype, dropout."""

    l: int
    heads: int
    kv_heads: int
    K: int
    dtype: str
    rate: float  # dropout


CASES = [
    Case(1024, 8, 8, 64, "bfloat16", 0.0),
    Case(2048, 4, 1, 128, "bfloat16", 0.1),
    Case(1000, 2, 1, 256, "bfloat16", 0.1),
    Case(348, 8, 2, 64, "float32", 0.1),
    Case(1024, 2, 1, 128, "float32", 0.0),
    Case(1024, 2, 1, 256, "float32", 0.1),
]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.kernels.run", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--topology", action="append", metavar="T", help="compile for T, such as gpu:h100:8; repeatable"
    )
    arguments = parser.parse_args()
    if arguments.topology:
        distributed.start_on_cpu(max(map(cpu_devices_of, arguments.topology)))
        rows = [row for topology in arguments.topology for row in compiled_rows(topology)]
        report(rows, "compiled")
    else:
        distributed.start()
        report(measured_rows(), "measured")
    return 0


def compiled_rows(topology: str):
    devices = devices_of(topology)
    mesh = make_mesh((1, len(devices), 1), devices)
    for case in CASES:
        compiled = program(case, mesh, fused_on(mesh)).lower(*arguments_of(case, mesh)).compile()
        yield {
            **described(case, topology, fused_on(mesh)),
            "temporary memory, MB": compiled.memory_analysis().temp_size_in_bytes / 1e6,
        }


def measured_rows():
    """Relative errors against dense attention in float32, and time over that of "blockwise", on the devices at hand."""
    mesh = make_mesh((1, len(jax.devices()), 1))
    kernel = fused_on(mesh)
    if kernel is None:
        print("these devices have no fused kernel; comparing the blockwise one")
    for case in CASES:
        arrays = random_arrays(case, mesh)
        with jax.default_matmul_precision("highest"):
            wide = [x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for x in arrays]
            right = jax.device_get(program(case, mesh, "dense")(*wide))
        runs = {
            name: program(case, mesh, name).lower(*arrays).compile() for name in {kernel or "blockwise", "blockwise"}
        }
        found = jax.device_get(runs[kernel or "blockwise"](*arrays))
        seconds = {name: fastest(run, arrays) for name, run in runs.items()}
        errors = {
            name: float(np.abs(a.astype(np.float32) - b).max() / np.abs(b).max())
            for name, a, b in zip(("o", "dq", "dk", "dv"), found, right, strict=True)
        }
        yield {
            **described(case, mesh.devices.flat[0].device_kind, kernel or "blockwise"),
            **errors,
            "time / blockwise": seconds[kernel or "blockwise"] / seconds["blockwise"],
        }


def program(case: Case, mesh: Mesh, kernel: str | None):
    """LSS attention, causal, zigzag, forward and backward: global `q, k, v, do` and positions to `o, dq, dk, dv`."""
    assert kernel
    layout = Layout("zigzag", mesh.shape[SEQ])
    axis = SEQ if SEQ in sharded_axes(mesh) else None
    setting = Setting(axis, layout, layout, kernel, 512, 512, regather=False, interpret=False, approximation=None)

    def on_device(q_BlHK, k_BlGK, v_BlGK, do_BlHK, position_l):
        dropout = Dropout(case.rate, jnp.uint32(0), jnp.arange(1), position_l, 0) if case.rate else None
        attend = partial(make_attend("lss", causal(position_l), setting), dropout=dropout)
        o_BlHK, transpose = jax.vjp(attend, q_BlHK, k_BlGK, v_BlGK)
        return o_BlHK, *transpose(do_BlHK)

    x_spec, sequence_spec = (without_unsharded(spec, mesh) for spec in (P(None, SEQ), P(SEQ)))
    return jax.jit(
        jax.shard_map(on_device, mesh=mesh, in_specs=(*[x_spec] * 4, sequence_spec), out_specs=(x_spec,) * 4)
    )


def arguments_of(case: Case, mesh: Mesh) -> list[jax.ShapeDtypeStruct]:
    """Shapes and shardings of `q, k, v, do` and positions for one sequence."""
    L = case.l * mesh.shape[SEQ]
    heads = (case.heads, case.kv_heads, case.kv_heads, case.heads)
    x_sharding, sequence = (NamedSharding(mesh, without_unsharded(spec, mesh)) for spec in (P(None, SEQ), P(SEQ)))
    arrays = [jax.ShapeDtypeStruct((1, L, count, case.K), case.dtype, sharding=x_sharding) for count in heads]
    return [*arrays, jax.ShapeDtypeStruct((L,), "int32", sharding=sequence)]


def random_arrays(case: Case, mesh: Mesh) -> list[jax.Array]:
    *shapes, positions = arguments_of(case, mesh)
    random = np.random.default_rng(0)
    arrays = [jax.device_put(random.standard_normal(x.shape, np.float32).astype(x.dtype), x.sharding) for x in shapes]
    natural = Layout("zigzag", mesh.shape[SEQ]).positions(positions.shape[0])
    return [*arrays, jax.device_put(natural, positions.sharding)]


def fastest(run: Any, arrays: list[jax.Array]) -> float:
    """Seconds of the fastest of some runs, after a warm-up run."""
    jax.block_until_ready(run(*arrays))
    seconds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        jax.block_until_ready(run(*arrays))
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def described(case: Case, where: str, kernel: str | None) -> dict[str, Any]:
    return {"where": where, "kernel": kernel, **case._asdict()}


def report(rows, kind: str) -> None:
    """Prints rows as they come, then writes all of them to `KIND.json` and `KIND.md`."""
    done = []
    for row in rows:
        print(row, flush=True)
        done.append(row)
    (HERE / f"{kind}.json").write_text(json.dumps(done, indent=2) + "\n")
    lines = ["| " + " | ".join(done[0]) + " |", "| " + " | ".join("---" for _ in done[0]) + " |"]
    for row in done:
        cells = (f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values())
        lines.append("| " + " | ".join(cells) + " |")
    command = "python -m experiments.kernels.run"
    (HERE / f"{kind}.md").write_text(
        f"{kind.capitalize()} by `{command}`, jax {jax.__version__}:\n\n" + "\n".join(lines) + "\n"
    )


if __name__ == "__main__":
    cli.run(main)
