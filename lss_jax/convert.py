"""Bring a model in or out: `python -m lss_jax.convert --from-hf DIR --workdir W`, `--workdir W --to-hf DIR`."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from lss_jax import cli
from lss_jax.config.loading import load_config_file, set_keys
from lss_jax.config.schema import Config, ConfigError
from lss_jax.huggingface.exporting import DTYPES
from lss_jax.huggingface.families import FAMILIES
from lss_jax.huggingface.folder import CONFIG, read_config
from lss_jax.huggingface.keys import LONGEST, our_keys
from lss_jax.huggingface.run import export_run, import_run
from lss_jax.models import parameter_count
from lss_jax.runtime import distributed
from lss_jax.training.setup import validate


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lss_jax.convert",
        description="Make a run of a Hugging Face folder, which trains on, is evaluated and generates; or make such a "
        f"folder of a run. Families: {', '.join(FAMILIES)}.",
        epilog=f"{cli.OVERRIDES} The folder's config.json decides the shape of the model.",
        allow_abbrev=False,
    )
    parser.add_argument("--workdir", required=True, metavar="DIR", help="of the run that is made, or exported")
    ways = parser.add_mutually_exclusive_group(required=True)
    ways.add_argument("--from-hf", metavar="DIR", help="a folder with config.json and *.safetensors")
    ways.add_argument("--to-hf", metavar="DIR", help="the folder to be made")
    parser.add_argument(
        "--config", default="configs/base.py", metavar="FILE", help="--from-hf: all else (default: configs/base.py)"
    )
    parser.add_argument("--family", choices=FAMILIES, help="--to-hf: default: the first that has such models")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="--to-hf: of the tensors (default: float32)")
    cli.add_launch(parser)
    arguments, config = cli.parse(parser, _config)
    workdir = Path(arguments.workdir)
    with cli.start(arguments, config):
        if arguments.from_hf:
            _check(config)
            model = import_run(Path(arguments.from_hf), workdir, config)
            said = f"{workdir}: a run at step 0, with {parameter_count(model):,} parameters"
        else:
            family = export_run(config, workdir, Path(arguments.to_hf), arguments.family, arguments.dtype)
            said = f"{arguments.to_hf}: {FAMILIES[family].architecture}, {arguments.dtype}"
        if distributed.is_first():
            print(said)
    return 0


def _config(arguments: argparse.Namespace) -> ConfigDict:
    """The run's config: that of `--workdir`, or `--config` with the keys of the folder."""
    if arguments.to_hf:
        return cli.config_of_run(arguments)
    config, folder = load_config_file(arguments.config), Path(arguments.from_hf)
    theirs = read_config(folder)
    set_keys(config, _extended(our_keys(theirs, folder / CONFIG), config, theirs))
    return config


def _extended(keys: dict[str, Any], config: ConfigDict, theirs: dict[str, Any]) -> dict[str, Any]:
    """The folder's keys; where the config scales rotary positions, with a scaling that extends the folder's context.

    Raises:
      ConfigError: the folder's positions are scaled in another way already.
    """
    wanted, already = config.model.rope_scaling, keys.get("model.rope_scaling", "none")
    if wanted == "none" or "model.rope_scaling" not in keys:
        return keys
    if already not in ("none", wanted):
        raise ConfigError(
            f"--config has model.rope_scaling={wanted!r}, and --from-hf is scaled by {already!r} with a factor of "
            f"{keys['model.rope_factor']} already; use a --config without scaling, and raise that by "
            f"--config.model.rope_factor"
        )
    original = keys.get("model.rope_original") or theirs.get(LONGEST, config.model.rope_original)
    return keys | {
        "model.rope_scaling": wanted,
        "model.rope_factor": config.model.rope_factor * keys.get("model.rope_factor", 1.0),
        "model.rope_original": original if wanted in ("yarn", "llama3") else 0,
    }


def _check(config: Config) -> None:
    """Checks all that does not depend on devices: the run may be for others."""
    mesh = dataclasses.replace(config.mesh, data=1, seq=1, model=1)
    validate(dataclasses.replace(config, mesh=mesh), 1)


if __name__ == "__main__":
    cli.run(main)
