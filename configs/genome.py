"""A small model of the next base, on a genome: FASTA or GenBank files of your own, or those of a package on PyPI.

    pip install pyrodigal && python -m experiments.genomes.example --out genomes
    python -m lss_jax.train --config configs/genome.py

For your own: --config.data.path=TRAIN --config.data.valid_path=STRAIN --config.data.test_path=SPECIES.

Reproduces: nothing; experiments/genomes measures such models beside k-mers.
Cost: measured on two CPU cores that were busy with other work (8 simulated devices): 187 seconds of CPU time.
Expected: there, 1.982 bits per base on the first 16 validation batches, a contig of another species; by bases before
from 2.01 after 3 or 4 to 1.98 (measured). Little can be known of the next base: experiments/genomes.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.log_every = 20
    config.eval_every = 0
    config.sample_prompt = "ATGACCGAAATC"
    config.mesh.data = 1
    config.mesh.seq = -1
    config.model.vocab = 5
    config.model.layers = 2
    config.model.width = 64
    config.model.heads = 2
    config.model.positions = "rope"
    config.data.source = "fasta"
    config.data.path = "genomes/train.fna"
    config.data.valid_path = "genomes/valid.fna"
    config.data.test_path = "genomes/test.fna"
    config.data.tokenizer = "bases"
    config.data.reverse_complement = True
    config.data.seq_len = 1024
    config.data.batch_size = 8
    config.optim.name = "muon"
    config.optim.steps = 200
    config.optim.learning_rate = 8e-3
    config.optim.warmup_steps = 20
    config.optim.beta1 = 0.95
    config.optim.beta2 = 0.99
    return config
