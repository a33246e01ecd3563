"""From raw text to a model that `transformers` loads, as a user would do it, beside a byte-level model of equal size.

    head -c 4000000 enwik8 > enwik8-first-4MB
    pip install -r requirements-oracles.txt
    python -m experiments.own_llama.run --data enwik8-first-4MB

Trains a tokenizer of 4,096 tokens on the text, encodes it, and trains a Llama-class model on 2 x 4 simulated devices:
to the middle, then, resumed, to the end. Evaluates it, exports it, loads it with `transformers`, and lets both write on
greedily. Then trains a model of bytes with as many parameters for as long, by the sum of its steps' seconds. Takes
about 20 minutes on two cores. Writes `results.json` and `results.md` beside this file.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from experiments.commands import on_cpu, options
from lss_jax.models import build_model, parameter_count
from lss_jax.storage.metrics import read_records
from lss_jax.storage.workdir import load_config

HERE = Path(__file__).parent
VOCAB, STEPS, TOKENS = 4096, 700, 48
PROMPT = "The history of "
MESH = {"mesh.data": 2, "mesh.seq": 4, "log_every": 10, "checkpoint_every": 350, "eval_every": 350}
OF_TOKENS = {"model.vocab": VOCAB, "model.layers": 4, "model.width": 128, "model.mlp_width": 352}
OF_BYTES = {"model.vocab": 256, "model.layers": 6, "model.width": 128, "model.mlp_width": 400, "data.seq_len": 512}


class Commands:
    """Runs the project's commands, and remembers them."""

    def __init__(self, scratch: Path, data: Path):
        self.lines: list[str] = []
        self._scratch, self._data = scratch, data
        self._environment = on_cpu(8)

    def __call__(self, module: str, *arguments: object) -> str:
        """The output of `python -m lss_jax.MODULE ARGUMENTS`."""
        words = ["-m", f"lss_jax.{module}", *map(str, arguments)]
        line = shlex.join(["python", *words])
        line = line.replace(str(self._data), "enwik8-first-4MB").replace(f"{self._scratch}/", "")
        self.lines.append(line)
        print(f"$ {line}", flush=True)
        command = [sys.executable, *words]
        return subprocess.run(command, env=self._environment, check=True, stdout=subprocess.PIPE, text=True).stdout


def seconds_of(workdir: Path) -> list[float]:
    """The seconds of each logged stretch of training, per step."""
    return [record["step_seconds"] for record in read_records(workdir / "metrics.jsonl") if record["split"] == "train"]


def bits_of(run: Commands, workdir: Path, split: str) -> float:
    """Bits per byte on a whole split, as `evaluate` prints them."""
    return float(run("evaluate", "--workdir", workdir, "--split", split).split()[-2])


def their_text(folder: Path) -> tuple[str, int]:
    """What `transformers` writes on, greedily, and the number of the parameters it counts."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        found = model.generate(ids, max_new_tokens=TOKENS, do_sample=False)
    return str(tokenizer.decode(found[0], skip_special_tokens=True)), model.num_parameters()


def of_tokens(run: Commands, scratch: Path, data: Path) -> dict[str, Any]:
    """The whole way with a tokenizer; returns what is to be told."""
    tokenizer, encoded, workdir = scratch / "tokenizer.json", scratch / "enwik8.tokens", scratch / "tokens"
    run("tokenize", "--train", VOCAB, "--out", tokenizer, data)
    said = run("tokenize", "--tokenizer", tokenizer, "--out", encoded, data)
    data_keys = {"data.source": "text", "data.path": encoded, "data.tokenizer": tokenizer}
    train = ["--config", "configs/small_llama.py", "--workdir", workdir, *options({**OF_TOKENS, **MESH, **data_keys})]
    started = time.perf_counter()
    stopped(run, [*train, *options({"optim.steps": STEPS})], workdir)
    run("train", *train, *options({"optim.steps": STEPS}))
    wall = time.perf_counter() - started
    ours = run(
        *("generate", "--workdir", workdir, "--prompt", PROMPT, "--tokens", TOKENS, "--temperature", 0)
    ).removesuffix("\n")
    run("convert", "--workdir", workdir, "--to-hf", scratch / "exported")
    theirs, counted = their_text(scratch / "exported")
    return {
        "encoded": said.strip().replace(f"{scratch}/", "").splitlines(),
        "valid": bits_of(run, workdir, "valid"),
        "test": bits_of(run, workdir, "test"),
        "parameters": parameter_count(build_model(load_config(workdir))),
        "parameters_counted_by_transformers": counted,
        "steps": STEPS,
        "seconds": sum(seconds_of(workdir)) * MESH["log_every"],
        "wall_seconds": wall,
        "our_text": ours,
        "their_text": theirs,
        "same_text": ours == theirs,
    }


def stopped(run: Commands, train: list[Any], workdir: Path) -> None:
    """Trains until the first checkpoint, and interrupts the run, as Ctrl-C does."""
    import signal

    words = [sys.executable, "-m", "lss_jax.train", *map(str, train)]
    process = subprocess.Popen(words, env=on_cpu(8), stdout=subprocess.DEVNULL)
    while process.poll() is None and not (workdir / "checkpoints" / str(MESH["checkpoint_every"])).is_dir():
        time.sleep(1)
    process.send_signal(signal.SIGINT)
    process.wait()


def of_bytes(run: Commands, scratch: Path, data: Path, seconds: float) -> dict[str, Any]:
    """A model of bytes with as many parameters, trained for as many seconds."""
    workdir, data_keys = scratch / "bytes", {"data.source": "text", "data.path": data}
    train = ["--config", "configs/small_llama.py", *options({**OF_BYTES, **MESH, **data_keys})]
    run("train", *train, "--workdir", scratch / "timed", *options({"optim.steps": 60}))
    per_step = sorted(seconds_of(scratch / "timed"))[len(seconds_of(scratch / "timed")) // 2]
    steps = max(round(seconds / per_step / 10) * 10, 10)
    run("train", *train, "--workdir", workdir, *options({"optim.steps": steps}))
    return {
        "valid": bits_of(run, workdir, "valid"),
        "test": bits_of(run, workdir, "test"),
        "parameters": parameter_count(build_model(load_config(workdir))),
        "steps": steps,
        "seconds": sum(seconds_of(workdir)) * MESH["log_every"],
    }


def row(name: str, found: dict[str, Any]) -> str:
    counts = f"{found['parameters']:,} | {found['steps']:,} | {found['seconds']:.0f}"
    return f"| {name} | {counts} | {found['valid']:.4f} | {found['test']:.4f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="FILE", type=Path, help="the first 4,000,000 bytes of enwik8")
    data = parser.parse_args().data
    with tempfile.TemporaryDirectory() as folder:
        run = Commands(Path(folder), data)
        tokens = of_tokens(run, Path(folder), data)
        of_text = of_bytes(run, Path(folder), data, tokens["seconds"])
    results = {"tokens": tokens, "bytes": of_text, "commands": run.lines}
    lines = [
        "| model | parameters | steps | seconds of steps | validation, bits per byte | test |",
        "| --- | --- | --- | --- | --- | --- |",
        row(f"of {VOCAB:,} tokens", tokens),
        row("of bytes", of_text),
        "",
        *tokens["encoded"],
        "",
        f"ours:   {tokens['our_text']!r}",
        f"theirs: {tokens['their_text']!r}",
        f"the same text: {tokens['same_text']}",
    ]
    (HERE / "results.json").write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    (HERE / "results.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
