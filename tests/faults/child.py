"""One process of a run on several meshes, one after the other: `child.py PORT PROCESSES PROCESS OUT CASES`.

Trains each case, counts the tokens that the loader reads (by its audit event), and writes losses and counts to OUT.
"""

import json
import sys
from pathlib import Path

from helpers import small_config

from lss_jax.runtime import distributed
from lss_jax.training.trainer import Trainer

reads: list[int] = []


def note(event: str, arguments: tuple) -> None:
    if event == "lss_jax.read":
        start, stop = arguments
        reads.append(stop - start)


def run(case: dict) -> dict:
    trainer = Trainer(small_config(**case["config"]), Path(case["workdir"]))
    reads.clear()
    found = [(r["step"], r["loss"]) for r in trainer.fit() if r["split"] == "train"]
    trainer.save()
    trainer.close()
    return {"losses": found, "reads": len(reads), "tokens": sum(reads)}


def main() -> None:
    port, processes, process, out, cases = sys.argv[1:]
    sys.addaudithook(note)
    launch = distributed.Launch(f"127.0.0.1:{port}", int(processes), int(process), heartbeat_timeout=60)
    with distributed.start(launch):
        results = [run(case) for case in json.loads(cases)]
    Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
