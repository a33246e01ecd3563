"""Rounding errors of attention against float64, on 1 to 64 devices, for every strategy, in bfloat16 and float32.

    python -m experiments.numerics.run

One layer of causal attention, forward and backward pass, L=2048, 64 heads of 16 (Ulysses needs a head for each of 64
devices), zigzag, on 1 to 64 simulated devices. The reference is written by hand in NumPy, in float64, from the same
inputs, rounded to the dtype first. An error is the root mean square of the difference over that of the reference; the
largest difference, over the same, is beside it in `results.json`. Blocks are of 16 queries and 16 keys for every N, the
length of a chunk on 64 devices: the kernel then computes the same sums for every N, and only the strategy differs.

The claim to test: LSS, which computes the softmax in one pass over the gathered keys, has an error that does not depend
on N, and ring attention, which computes it in N steps, has one that grows with N. The tables report what holds here:
the largest error over all N over the smallest, and the N whose results equal those of one device bit for bit. Takes
about six minutes on two cores. Writes `results.json`, `results.md` and `errors.png` beside this file.
"""

import argparse
import json
import os
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from matplotlib.figure import Figure

from lss_jax.attention.mask import causal
from lss_jax.attention.setting import Setting
from lss_jax.attention.strategies import EXACT, make_attend
from lss_jax.parallel.layout import Layout
from lss_jax.parallel.mesh import SEQ, make_mesh, without_unsharded
from lss_jax.runtime import distributed

DEVICES = (1, 2, 4, 8, 16, 32, 64)
LENGTH, HEADS, WIDTH = 2048, 64, 16
BLOCK = 16  # queries, and keys: a chunk of zigzag on 64 devices
DTYPES = ("bfloat16", "float32")
ARRAYS = ("o", "dq", "dk", "dv")
HERE = Path(__file__).parent


def inputs(dtype: str, length: int) -> list[np.ndarray]:
    """Random `q, k, v, do` in natural order, `[1, L, H, K]`, rounded to `dtype`."""
    random = np.random.default_rng(0)
    return [random.standard_normal((1, length, HEADS, WIDTH)).astype(jnp.dtype(dtype)) for _ in range(4)]


def exact(arrays_1LHK: list[np.ndarray]) -> list[np.ndarray]:
    """The reference: `o, dq, dk, dv`, `[L, H, K]`, in float64."""
    q_LHK, k_LHK, v_LHK, do_LHK = (x[0].astype(np.float64) for x in arrays_1LHK)
    results = [np.empty_like(q_LHK) for _ in ARRAYS]
    future_LL = np.triu(np.ones((len(q_LHK), len(q_LHK)), bool), 1)
    scale = WIDTH**-0.5
    for head in range(HEADS):
        q_LK, k_LK, v_LK, do_LK = (x[:, head] for x in (q_LHK, k_LHK, v_LHK, do_LHK))
        s_LL = q_LK @ k_LK.T * scale
        s_LL[future_LL] = -np.inf
        p_LL = np.exp(s_LL - s_LL.max(1, keepdims=True))
        p_LL /= p_LL.sum(1, keepdims=True)
        o_LK = p_LL @ v_LK
        ds_LL = p_LL * (do_LK @ v_LK.T - (o_LK * do_LK).sum(1, keepdims=True)) * scale
        for result, x_LK in zip(results, (o_LK, ds_LL @ k_LK, ds_LL.T @ q_LK, p_LL.T @ do_LK), strict=True):
            result[:, head] = x_LK
    return results


def computed(strategy: str, devices: int, arrays_1LHK: list[np.ndarray]) -> list[np.ndarray]:
    """A strategy's `o, dq, dk, dv` in natural order, `[L, H, K]`, with its rounding, as float64."""
    layout = Layout("zigzag", devices)
    mesh = make_mesh((1, devices, 1), jax.devices()[:devices])
    spec, spec_l = without_unsharded(P(None, SEQ), mesh), without_unsharded(P(SEQ), mesh)
    axis = SEQ if devices > 1 else None
    setting = Setting(
        axis, layout, layout, "blockwise", BLOCK, BLOCK, regather=False, interpret=True, approximation=None
    )
    position_L = layout.positions(arrays_1LHK[0].shape[1])

    @partial(jax.shard_map, mesh=mesh, in_specs=(spec, spec, spec, spec_l), out_specs=spec)
    def attention(q_1lHK, k_1lHK, v_1lHK, position_l):
        return make_attend(strategy, causal(position_l), setting)(q_1lHK, k_1lHK, v_1lHK)

    @jax.jit
    def forward_and_backward(q_1LHK, k_1LHK, v_1LHK, do_1LHK):
        o_1LHK, vjp = jax.vjp(lambda q, k, v: attention(q, k, v, position_L), q_1LHK, k_1LHK, v_1LHK)
        return o_1LHK, *vjp(do_1LHK)

    sharded = [jax.device_put(x[:, position_L], NamedSharding(mesh, spec)) for x in arrays_1LHK]
    natural_L = np.argsort(position_L)
    return [np.asarray(x).astype(np.float64)[0, natural_L] for x in forward_and_backward(*sharded)]


def measure(strategy: str, sizes: list[int], arrays_1LHK: list[np.ndarray], references_LHK: list[np.ndarray]) -> dict:
    """The errors of one strategy and dtype for every N, and whether its bits equal those of the first N."""
    dtype = str(arrays_1LHK[0].dtype)
    result: dict = {"strategy": strategy, "dtype": dtype, "devices": sizes, "rms": {}, "largest": {}, "same_bits": {}}
    runs = [computed(strategy, devices, arrays_1LHK) for devices in sizes]
    for index, name in enumerate(ARRAYS):
        size = rms(references_LHK[index])
        differences = [run[index] - references_LHK[index] for run in runs]
        result["rms"][name] = [rms(difference) / size for difference in differences]
        result["largest"][name] = [float(np.abs(difference).max()) / size for difference in differences]
        result["same_bits"][name] = [bool((run[index] == runs[0][index]).all()) for run in runs]
    return result


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(x**2)))


def spread(errors: list[float]) -> float:
    return max(errors) / min(errors)


def table(results: list[dict]) -> str:
    sizes = results[0]["devices"]
    lines = [
        f"| dtype | array | strategy | {' | '.join(f'N={size}' for size in sizes)} | max / min | bits equal to N=1 |",
        "| --- " * (len(sizes) + 5) + "|",
    ]
    for dtype in DTYPES:
        for array in ARRAYS:
            for result in (result for result in results if result["dtype"] == dtype):
                errors = result["rms"][array]
                same = [str(size) for size, same in zip(sizes, result["same_bits"][array], strict=True) if same]
                cells = [f"{error:.3e}" for error in errors] + [f"{spread(errors):.4f}"]
                bits = "all N" if len(same) == len(sizes) else f"N={', '.join(same)}"
                lines.append(f"| {dtype} | {array} | {result['strategy']} | {' | '.join(cells)} | {bits} |")
    return "\n".join(lines)


def verdict(result: dict) -> str:
    """The claim against the figures of one strategy and dtype: the spread over N, and the error on the largest N."""
    devices, errors_of = result["devices"], result["rms"]
    worst = max(map(spread, errors_of.values()))
    growth = ", ".join(f"{array} {errors[-1] / errors[0]:.3f}" for array, errors in errors_of.items())
    return (
        f"- {result['strategy']}, {result['dtype']}: max / min over N at most {worst:.3f}; "
        f"error for N={devices[-1]} over N={devices[0]}: {growth}"
    )


def plot(results: list[dict]) -> None:
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    axes = figure.subplots(2, 4, sharex=True)
    styles = {"lss": "o-", "ring": "s--", "ulysses": "^:"}
    for result in results:
        for axis, array in zip(axes[DTYPES.index(result["dtype"])], ARRAYS, strict=True):
            strategy = result["strategy"]
            axis.plot(result["devices"], result["rms"][array], styles[strategy], label=strategy, markersize=4)
            axis.set_title(f"{array}, {result['dtype']}", fontsize=9)
            axis.set_xscale("log", base=2)
            axis.tick_params(labelsize=7)
    for axis in axes.flat:
        axis.set_ylim(0, 1.2 * axis.dataLim.y1)
    for axis in axes[1]:
        axis.set_xlabel("devices")
    for row in axes:
        row[0].set_ylabel("relative RMS error")
    axes[0, 0].legend(fontsize=7)
    figure.savefig(HERE / "errors.png", dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="+", default=DEVICES, help=f"sizes N (default: {DEVICES})")
    parser.add_argument("--length", type=int, default=LENGTH, help=f"tokens L (default: {LENGTH})")
    arguments = parser.parse_args()
    os.environ.setdefault("JAX_NUM_CPU_DEVICES", str(max(arguments.devices)))
    jax.config.update("jax_num_cpu_devices", int(os.environ["JAX_NUM_CPU_DEVICES"]))  # JAX has read it by now
    distributed.start()
    results = []
    for dtype in DTYPES:
        arrays_1LHK = inputs(dtype, arguments.length)
        references_LHK = exact(arrays_1LHK)
        for strategy in EXACT:
            results.append(measure(strategy, list(arguments.devices), arrays_1LHK, references_LHK))
            print(verdict(results[-1]), flush=True)
    print(table(results))
    verdicts = "\n".join(map(verdict, results))
    (HERE / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (HERE / "results.md").write_text(f"{table(results)}\n\n{verdicts}\n")
    plot(results)


if __name__ == "__main__":
    main()
