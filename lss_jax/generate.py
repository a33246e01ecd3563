"""Continue prompts with a trained model: `python -m lss_jax.generate --workdir DIR --prompt TEXT`."""

import argparse
import codecs
import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lss_jax import cli
from lss_jax.config.schema import ConfigError, from_dict
from lss_jax.config.units import shown_size
from lss_jax.generation.generate import check, generation_of
from lss_jax.generation.sampling import Sampling
from lss_jax.runtime import distributed
from lss_jax.storage.workdir import saved_config
from lss_jax.training.setup import mesh_of


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lss_jax.generate",
        description="Goes on from prompts, byte by byte, with a run's newest checkpoint.",
        epilog=f"{cli.OVERRIDES} The config is the run's own; another mesh gives the same texts.",
        allow_abbrev=False,
    )
    parser.add_argument("--workdir", required=True, metavar="DIR", help="of a training run")
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    parser.add_argument("--prompt-file", action="append", default=[], metavar="FILE", help="the same, from a file")
    parser.add_argument("--tokens", type=int, default=100, metavar="N", help="bytes to add to each (default: 100)")
    parser.add_argument(
        "--temperature", type=float, default=1.0, metavar="T", help="default: 1; 0 takes the likeliest byte"
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest bytes (default: all)")
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="from those that make up probability P (default: 1)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default: 0)")
    cli.add_launch(parser)
    arguments, values = cli.parse(parser, lambda arguments: ConfigDict(saved_config(Path(arguments.workdir))))
    config, workdir = from_dict(values), Path(arguments.workdir)
    prompts = [os.fsencode(text) for text in arguments.prompt] + [_contents(Path(f)) for f in arguments.prompt_file]
    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed)
    check(config, workdir, prompts, arguments.tokens, sampling)
    with cli.start(arguments, config):
        mesh = mesh_of(config, jax.devices())
        step, generation = generation_of(config, workdir, mesh, prompts, arguments.tokens, sampling)
        _tell(f"devices  {_devices(mesh)}")
        _tell(f"model    {workdir}, step {step}")
        _tell(f"cache    {shown_size(generation.cache_bytes)} per device, as compiled")
        show(generation, prompts)
    return 0


def _contents(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"--prompt-file={path} cannot be read ({error.strerror}); give a file") from error


def _devices(mesh: Mesh) -> str:
    sizes = " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    return f"{mesh.size} {mesh.devices.flat[0].platform}, mesh {sizes}"


def show(generation: Iterable[list[bytes]], prompts: Sequence[bytes]) -> None:
    """Prints the first text as it grows, and the others, which grow beside it, behind it."""
    decoders = [codecs.getincrementaldecoder("utf-8")(errors="replace") for _ in prompts]
    texts = [decoder.decode(prompt) for decoder, prompt in zip(decoders, prompts, strict=True)]
    _print(_title(0, prompts) + texts[0])
    started, count = time.perf_counter(), 0
    for new in generation:
        pieces = [decoder.decode(byte) for decoder, byte in zip(decoders, new, strict=True)]
        _print(pieces[0])
        texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
        count += sum(map(len, new))
    seconds = time.perf_counter() - started
    ends = [decoder.decode(b"", final=True) + "\n" for decoder in decoders]
    _print(ends[0])
    for row in range(1, len(prompts)):
        _print(_title(row, prompts) + texts[row] + ends[row])
    _tell(f"speed    {count / seconds:,.1f} tokens/s, the prompt included")


def _title(row: int, prompts: Sequence[bytes]) -> str:
    return f"--- {row + 1} of {len(prompts)}\n" if len(prompts) > 1 else ""


def _print(text: str) -> None:
    if distributed.is_first():
        print(text.encode(sys.stdout.encoding, "replace").decode(sys.stdout.encoding), end="", flush=True)


def _tell(line: str) -> None:
    """Beside the text, so that a pipe gets the text alone."""
    if distributed.is_first():
        print(line, file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
