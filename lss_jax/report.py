"""A page about a run, or several side by side: `python -m lss_jax.report --workdir DIR`."""

import argparse
from pathlib import Path

from lss_jax import cli
from lss_jax.config.schema import ConfigError
from lss_jax.reports.run_page import compiled, report
from lss_jax.reports.runs import check_comparable, read_runs
from lss_jax.runtime import distributed
from lss_jax.storage.workdir import write_whole


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lss_jax.report",
        description="Write one HTML page about a run: curves, throughput, what the compiler made of its training step, "
        "and its config; with --compare about several runs on the same data, and what differs. It needs no server and "
        "fetches nothing.",
        allow_abbrev=False,
    )
    parser.add_argument("--workdir", required=True, metavar="DIR", help="of a training run")
    parser.add_argument("--compare", nargs="+", default=[], metavar="DIR", help="other runs")
    parser.add_argument("--out", metavar="FILE", help="where to write it (default: report.html in the workdir)")
    arguments = parser.parse_args()
    distributed.start()
    runs = read_runs([Path(workdir) for workdir in (arguments.workdir, *arguments.compare)])
    check_comparable(runs)
    out = Path(arguments.out or runs[0].workdir / "report.html")
    written = report(runs, [compiled(run.config) for run in runs])
    try:
        write_whole(out, written)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written ({error.strerror}); choose another --out") from error
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    cli.run(main)
