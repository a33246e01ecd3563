"""The guide's commands, as they stand, one after the other."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.grid
def test_the_commands_of_the_guide(tmp_path):
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / "own_llama.md").read_text(), re.DOTALL)
    assert len(blocks) == 5
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment.pop("XLA_FLAGS")  # of the tests, for programs that are compiled and hardly run
    script = "set -e\n" + "\n".join(blocks)
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the opposite of hot is cold" in done.stdout
    for said in ("bits/byte", "runs/llama-hf: LlamaForCausalLM, float32", "runs/tuned-hf: LlamaForCausalLM"):
        assert said in done.stdout
    for folder in ("llama-hf", "extended-hf", "tuned-hf"):
        files = {file.name for file in (tmp_path / "runs" / folder).iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= files
