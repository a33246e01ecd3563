"""Continue prompts, or answer them, with a trained model: `python -m lss_jax.generate --workdir DIR --prompt TEXT`."""

import argparse
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import jax
from jax.sharding import Mesh

from lss_jax import cli
from lss_jax.config.schema import ConfigError
from lss_jax.config.units import shown_size
from lss_jax.generation.beams import PENALTY, Beams
from lss_jax.generation.generate import beginnings, check, generation_of
from lss_jax.generation.sampling import Sampling
from lss_jax.generation.streaming import streamed
from lss_jax.runtime import distributed
from lss_jax.training.setup import mesh_of


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lss_jax.generate",
        description="Continue prompts, token by token, with a run's newest checkpoint, or have it answer sources.",
        epilog=f"{cli.OVERRIDES} The config is the run's own; another mesh gives the same texts.",
        allow_abbrev=False,
    )
    parser.add_argument("--workdir", required=True, metavar="DIR", help="of a training run")
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    parser.add_argument("--prompt-file", action="append", default=[], metavar="FILE", help="the same, from a file")
    parser.add_argument("--tokens", type=int, default=100, metavar="N", help="how many to add to each (default: 100)")
    parser.add_argument(
        "--temperature", type=float, default=1.0, metavar="T", help="default: 1; 0 takes the likeliest token"
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="sample from the K likeliest tokens (default: all)")
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="from those with total probability P (default: 1)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: 0)")
    parser.add_argument(
        "--beams", type=int, metavar="N", help="for an encoder-decoder: the likeliest text of a search with N beams"
    )
    parser.add_argument(
        "--length-penalty", type=float, metavar="A", help=f"with --beams: favours long texts (default: {PENALTY})"
    )
    cli.add_launch(parser)
    arguments, config = cli.parse(parser, cli.config_of_run)
    workdir = Path(arguments.workdir)
    prompts = [os.fsencode(text) for text in arguments.prompt] + [_contents(Path(f)) for f in arguments.prompt_file]
    choice = choice_of(arguments)
    check(config, workdir, prompts, arguments.tokens, choice)
    with cli.start(arguments, config):
        mesh = mesh_of(config, jax.devices(), trains=False)
        step, generation = generation_of(config, workdir, mesh, prompts=prompts, tokens=arguments.tokens, choice=choice)
        _note(f"devices  {_devices(mesh)}")
        _note(f"model    {workdir}, step {step}")
        _note(f"cache    {shown_size(generation.cache_bytes)} per device, as compiled")
        show(generation, beginnings(config, prompts))
    return 0


def choice_of(arguments: argparse.Namespace) -> Sampling | Beams:
    """How tokens are chosen; refuses options that have no use together."""
    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed)
    if arguments.beams is None:
        if arguments.length_penalty is not None:
            raise ConfigError(
                f"--length-penalty={arguments.length_penalty} has no use without --beams, which compares texts; add "
                f"that, or leave it out"
            )
        return sampling
    if sampling != Sampling(1.0, None, 1.0, seed=0):
        raise ConfigError(
            f"--beams={arguments.beams} searches for the likeliest text, and samples nothing; leave out --temperature, "
            f"--top-k, --top-p and --seed"
        )
    return Beams(arguments.beams, PENALTY if arguments.length_penalty is None else arguments.length_penalty)


def _contents(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"--prompt-file={path} cannot be read ({error.strerror}); give a file") from error


def _devices(mesh: Mesh) -> str:
    sizes = " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    return f"{mesh.size} {mesh.devices.flat[0].platform}, mesh {sizes}"


def show(generation: Iterable[list[bytes]], prompts: Sequence[bytes]) -> None:
    """Prints the texts as they are generated, and the speed."""
    count = 0

    def counted() -> Iterator[list[bytes]]:
        nonlocal count
        for new in generation:
            count += sum(map(bool, new))  # a row that has ended adds nothing
            yield new

    started = time.perf_counter()
    for text in streamed(counted(), prompts):
        if distributed.is_first():
            print(text.encode(sys.stdout.encoding, "replace").decode(sys.stdout.encoding), end="", flush=True)
    seconds = time.perf_counter() - started
    _note(f"speed    {count / seconds:,.1f} tokens/s, the prompt included")


def _note(line: str) -> None:
    """Prints a line to stderr, so that a pipe gets the text alone."""
    if distributed.is_first():
        print(line, file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
