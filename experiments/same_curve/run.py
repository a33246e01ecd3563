"""The same loss curve on two meshes: `configs/enwik8.py`, scaled down, on the first 4 MB of enwik8.

    head -c 4000000 enwik8 > enwik8-first-4MB
    python -m experiments.same_curve.run --data enwik8-first-4MB

Trains twice from the same seed, with data=2, seq=4 and with data=1, seq=1, evaluates both on the whole validation
split, and compares all logged losses. Takes about ten minutes on two cores. Writes `results.json` and `results.md`
beside this file.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from experiments.commands import command, on_cpu, options
from lss_jax.storage.metrics import read_records

MESHES = [(2, 4), (1, 1)]
SCALED_DOWN = {
    "model.layers": 4,
    "model.width": 128,
    "model.heads": 4,
    "model.dtype": "float32",
    "model.remat": "none",
    "attention.layout": "contiguous",
    "attention.kernel": "dense",
    "attention.regather": "false",
    "data.seq_len": 256,
    "data.batch_size": 16,
    "optim.steps": 600,
    "optim.learning_rate": 2e-3,
    "optim.warmup_steps": 50,
    "eval_every": 200,
    "log_every": 20,
}
HERE = Path(__file__).parent


def run(data: str, workdir: Path, groups: int, seq: int) -> tuple[str, list[dict], float]:
    """Trains and evaluates on one mesh: the command, the records, and bits per byte on the whole validation split."""
    overrides = {"data.path": data, "mesh.data": groups, "mesh.seq": seq, **SCALED_DOWN}
    arguments, devices = ["--config", "configs/enwik8.py", *options(overrides)], groups * seq
    command("train", *arguments, "--workdir", workdir, devices=devices)
    evaluate = [sys.executable, "-m", "lss_jax.evaluate", "--workdir", str(workdir)]
    printed = subprocess.run(evaluate, env=on_cpu(devices), check=True, stdout=subprocess.PIPE, text=True).stdout
    shown = f"JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES={devices} python -m lss_jax.train {' '.join(arguments)}"
    return shown, read_records(workdir / "metrics.jsonl"), float(printed.split()[-2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="FILE", help="the first 4,000,000 bytes of enwik8")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        runs = [run(arguments.data, Path(scratch) / f"{d}x{s}", d, s) for d, s in MESHES]
    first, second = ([r["loss"] for r in records if r["split"] == "train"] for _, records, _ in runs)
    results = {
        "meshes": [f"data={d}, seq={s}" for d, s in MESHES],
        "commands": [command.replace(arguments.data, "enwik8-first-4MB") for command, _, _ in runs],
        "valid_bits_per_byte": [bits for _, _, bits in runs],
        "train_losses": [first, second],
        "largest_relative_difference": max(abs(a - b) / b for a, b in zip(first, second, strict=True)),
    }
    lines = ["| mesh | validation, bits per byte |", "| --- | --- |"]
    lines += [f"| {m} | {b:.4f} |" for m, b in zip(results["meshes"], results["valid_bits_per_byte"], strict=True)]
    lines.append("")
    lines.append(
        f"Largest relative difference of the {len(first)} logged training losses: "
        f"{results['largest_relative_difference']:.1e}."
    )
    (HERE / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (HERE / "results.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
