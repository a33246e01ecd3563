"""The cost of a generated token with a cache sharded over N devices, against recomputing its whole prefix.

    python -m experiments.decode.run

For prompts of several lengths and for N devices: tokens per second from the cache, the cache's bytes per device (read
off the compiled program), tokens per second by recomputing (each is a prefill and one step), and the ratio of the two.
All programs of one length take turns in one process; a figure is the median over the rounds. Simulated devices share
the cores, and each repeats the work on replicated weights: compare lengths, and the two ways on one mesh.

The claim: as prompts get longer, the time of a token does not grow faster than the cache. The last column is the growth
of the time over the growth of the cache, since the shortest length: at most 1. Takes two to three minutes on two cores
(`--tiny`: seconds, as a trial, and writes nothing). Writes `results.json` and `results.md` beside this file.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import jax
import numpy as np

from configs import base
from lss_jax.config.schema import from_dict
from lss_jax.generation.decode import Generation
from lss_jax.generation.sampling import Sampling
from lss_jax.models import build_model
from lss_jax.parallel.mesh import make_mesh
from lss_jax.runtime import distributed
from lss_jax.training.setup import validate
from lss_jax.training.state import param_shardings

DEVICES = (1, 2, 4, 8)
LENGTHS = (1024, 4096, 16384)  # of the prompt
TOKENS = 32
MODEL = {"model.layers": 2, "model.positions": "rope", "data.seq_len": 1024, "mesh.data": 1}
HERE = Path(__file__).parent


def generation(devices: int, length: int, tokens: int) -> Generation:
    """Generation with random parameters, since its cost does not depend on them."""
    values = base.get_config()
    values.update_from_flattened_dict({**MODEL, "mesh.seq": devices})
    config = from_dict(values)
    mesh, model = make_mesh(validate(config, devices), jax.devices()[:devices]), build_model(config)
    placed = param_shardings(model, mesh)
    params = jax.jit(lambda: model.init(jax.random.key(0)), out_shardings=placed)()
    prompt = np.random.default_rng(0).integers(0, 256, length).astype(np.uint8).tobytes()
    return Generation(config, mesh, params, [prompt], tokens, Sampling(1.0, None, 1.0, seed=0))


def seconds_per_token(text: Generation) -> tuple[float, float]:
    """Seconds by recomputing the prefix, as for the first token, and from the cache, the median of the other tokens."""
    times, last = [], time.perf_counter()
    for _ in text:
        now = time.perf_counter()
        times.append(now - last)
        last = now
    return times[0], statistics.median(times[1:])


def measure(length: int, devices: tuple[int, ...], tokens: int, rounds: int) -> list[dict]:
    texts = {count: generation(count, length, tokens) for count in devices}
    times: dict[int, list[tuple[float, float]]] = {count: [] for count in devices}
    for _ in range(rounds):
        for count, text in texts.items():
            times[count].append(seconds_per_token(text))
    return [
        {
            "length": length,
            "devices": count,
            "rounds": rounds,
            "cache_bytes_per_device": text.cache_bytes,
            "seconds_cached": statistics.median(cached for _, cached in times[count]),
            "seconds_recomputed": statistics.median(recomputed for recomputed, _ in times[count]),
            "recomputed_over_cached": statistics.median(recomputed / cached for recomputed, cached in times[count]),
        }
        for count, text in texts.items()
    ]


def add_growth(results: list[dict]) -> None:
    """Adds the growth of a token's time over that of the cache, since the shortest length on the same devices."""
    for result in results:
        first = next(one for one in results if one["devices"] == result["devices"])
        time_growth, cache_growth = (
            result[name] / first[name] for name in ("seconds_cached", "cache_bytes_per_device")
        )
        result["time_growth_over_cache_growth"] = time_growth / cache_growth


def table(results: list[dict]) -> str:
    lines = [
        "| prompt | devices | cache per device | tokens/s, cached | tokens/s, recomputed | cached / recomputed "
        "| growth of time / growth of cache |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        lines.append(
            f"| {result['length']:,} | {result['devices']} | {result['cache_bytes_per_device']:,} B "
            f"| {1 / result['seconds_cached']:,.1f} | {1 / result['seconds_recomputed']:,.2f} "
            f"| {result['recomputed_over_cached']:,.1f} | {result['time_growth_over_cache_growth']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="timed generations on each mesh (default: 3)")
    parser.add_argument("--tiny", action="store_true", help="two meshes and two short lengths, as a trial")
    arguments = parser.parse_args()
    distributed.start()
    lengths, devices, tokens = ((64, 128), (1, 2), 4) if arguments.tiny else (LENGTHS, DEVICES, TOKENS)
    results: list[dict] = []
    for length in lengths:
        results += measure(length, devices, tokens, arguments.rounds)
        add_growth(results)
        print(table(results[-len(devices) :]), flush=True)
    if not arguments.tiny:
        (HERE / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        (HERE / "results.md").write_text(table(results) + "\n")


if __name__ == "__main__":
    main()
