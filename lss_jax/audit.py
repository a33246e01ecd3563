"""What the compiler made of a training step: `python -m lss_jax.audit --config configs/default.py`."""

import argparse
import json
from pathlib import Path

from lss_jax import cli
from lss_jax.config.schema import from_dict
from lss_jax.config.units import parse_size
from lss_jax.inspection.audit import audit_step, json_of, problems, text_of
from lss_jax.inspection.topology import FORMS, capacity_of
from lss_jax.runtime import distributed

DISAGREES = 1  # exit code of --check


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lss_jax.audit",
        description="Compile a config's training step, without allocating the model, and print what the compiler made "
        "of it beside what this project's formulas predict: collectives, memory, operations.",
        epilog=f"{cli.OVERRIDES} Compiling for a TPU or GPU that is not there takes its package: "
        'pip install "jax[tpu]" or "jax[cuda13]".',
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="for example configs/default.py")
    parser.add_argument("--topology", metavar="T", help=f"compile for these devices: {FORMS} (default: those at hand)")
    parser.add_argument("--memory", metavar="SIZE", help="of a device, as in 16GiB (default: known for TPUs and GPUs)")
    parser.add_argument("--json", metavar="OUT", help="also write everything there, for programs")
    parser.add_argument(
        "--check",
        action="store_true",
        help=f"exit with {DISAGREES} where the program and its prediction differ, or it does not fit",
    )
    arguments, values = cli.parse(parser, lambda arguments: cli.load_config_file(arguments.config))
    config = from_dict(values)
    room = parse_size(arguments.memory) if arguments.memory else None
    if not arguments.topology:
        distributed.start()
    result = audit_step(config, arguments.topology)
    room = room or capacity_of(result.mesh.devices.flat[0])
    print(text_of(result, room))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(json_of(result, room), indent=2) + "\n")
    return DISAGREES if arguments.check and problems(result, room) else 0


if __name__ == "__main__":
    cli.run(main)
