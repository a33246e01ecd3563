"""Compiles one training step for TPUs that are not there and prints its memory per device, as the compiler assigns it.

    python -m experiments.longest.compile --topology tpu:v5p:2x2x2 --config.data.seq_len=1048576

The totals, of the device and of the host, are those of the compiler's own report of its buffers, arguments included:
`memory_analysis` counts the gaps between buffers of different parts of the program as if they added up. One program per
process, for the report is written where `XLA_FLAGS` says when XLA is loaded, and a program that is too large may end
the process.
"""

import argparse
import json
import os
import re
import tempfile
import time
from pathlib import Path

from lss_jax import cli
from lss_jax.inspection.memory import shortfall
from lss_jax.inspection.topology import cpu_devices_of, devices_of
from lss_jax.models import build_model
from lss_jax.runtime import distributed
from lss_jax.training.setup import mesh_of
from lss_jax.training.step import trace_train_step

BUDGET = 80  # GiB per device
TOTAL = re.compile(r"\(color=(\d+)\)\nTotal bytes: (\d+)")
DEVICE, HOST = "0", "5"  # the compiler's numbers of memories


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/llama_8b.py", metavar="FILE")
    parser.add_argument("--topology", default="tpu:v5p:2x2x2", help="the devices to compile for (default: %(default)s)")
    parser.add_argument("--devices", type=int, metavar="N", help="the first N of them (default: all)")
    arguments, config = cli.parse(parser, cli.config_of_file)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XLA_FLAGS"] = f"--xla_dump_to={folder} --xla_dump_hlo_as_text"
        distributed.start_on_cpu(cpu_devices_of(arguments.topology))
        mesh = mesh_of(config, devices_of(arguments.topology)[: arguments.devices])
        lowered = trace_train_step(build_model(config, mesh), mesh).lower()
        started = time.perf_counter()
        options = {"xla_tpu_max_hbm_size_mib": BUDGET * 1024}
        try:
            analysis = lowered.compile(compiler_options=options).memory_analysis()
        except Exception as error:  # what the compiler raises
            print(json.dumps({"too large": shortfall(error), "seconds": time.perf_counter() - started}))
            return
        (report,) = Path(folder).glob("*jit_train_step*memory-usage-report.txt")
        sizes = {HOST: 0} | {memory: int(size) for memory, size in TOTAL.findall(report.read_text())}
        assert analysis is not None
        state, seconds = analysis.argument_size_in_bytes, time.perf_counter() - started
        print(json.dumps({"device": sizes[DEVICE], "host": sizes[HOST], "state": state, "seconds": seconds}))


if __name__ == "__main__":
    main()
