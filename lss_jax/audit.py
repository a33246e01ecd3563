"""Compile a training step and compare it with predictions: `python -m lss_jax.audit --config configs/default.py`."""

import argparse
import json
from pathlib import Path

from lss_jax import cli
from lss_jax.config.units import parse_size
from lss_jax.inspection.audit import audit_step, json_of, problems, text_of
from lss_jax.inspection.topology import FORMS, capacity_of, cpu_devices_of
from lss_jax.runtime import distributed

DISAGREES = 1  # exit code of --check


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lss_jax.audit",
        description="Compile a config's training step, without allocating the model, and print what the compiler made "
        "of it beside what this project's formulas predict: collectives, memory, operations.",
        epilog=f"{cli.OVERRIDES} Compiling for a TPU or GPU that this machine does not have takes its package: "
        'pip install "jax[tpu]" or "jax[cuda13]".',
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="for example configs/default.py")
    parser.add_argument("--topology", metavar="T", help=f"compile for these devices: {FORMS} (default: this machine's)")
    parser.add_argument("--memory", metavar="SIZE", help="per device, as in 16GiB (default: known for TPUs and GPUs)")
    parser.add_argument("--json", metavar="OUT", help="also write everything to this file")
    parser.add_argument(
        "--check",
        action="store_true",
        help=f"exit with {DISAGREES} where the program and its prediction differ, or it does not fit",
    )
    arguments, config = cli.parse(parser, cli.config_of_file)
    room = parse_size(arguments.memory) if arguments.memory else None
    if arguments.topology:
        distributed.start_on_cpu(cpu_devices_of(arguments.topology))
    else:
        distributed.start()
    result = audit_step(config, arguments.topology)
    room = room or capacity_of(result.mesh.devices.flat[0])
    print(text_of(result, room))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(json_of(result, room), indent=2) + "\n")
    return DISAGREES if arguments.check and problems(result, room) else 0


if __name__ == "__main__":
    cli.run(main)
