"""Which bases are coding: an encoder with a label per base, on annotated genomes of your own, or of a package on PyPI.

    pip install pyrodigal && python -m experiments.genomes.example --out genomes
    python -m lss_jax.train --config configs/genes.py

For contigs of your own in a GenBank file, of which whole ones are held out: --config.data.path=CONTIGS and, empty,
--config.data.valid_path= --config.data.test_path= --config.data.annotation=.

Reproduces: nothing; experiments/genomes measures such models beside open reading frames.
Cost: about 0.8 seconds of CPU time per step (measured over the first 200 steps, on one device and two busy cores).
Expected: the whole run has not been measured. With optim.steps=200, mesh.seq=1 and the contigs of experiments/genomes:
F1 of coding bases (Dice coding) 0.885 on the first 16 validation batches (measured); calling all coding is 0.862.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.task = "token_labels"
    config.log_every = 20
    config.eval_every = 0
    config.mesh.data = 1
    config.mesh.seq = -1
    config.attention.window = 64  # codons are near: with all bases in view it takes longer to find them
    config.model.family = "encoder"
    config.model.classes = 2  # other, coding
    config.model.vocab = 5
    config.model.layers = 3
    config.model.width = 64
    config.model.heads = 4
    config.model.positions = "rope"
    config.data.source = "fasta"
    config.data.path = "genomes/train.fna"
    config.data.valid_path = "genomes/valid.fna"
    config.data.test_path = "genomes/test.fna"
    config.data.annotation = "genomes/genes.gff"
    config.data.tokenizer = "bases"
    config.data.reverse_complement = True
    config.data.seq_len = 512
    config.data.batch_size = 16
    config.optim.name = "muon"
    config.optim.steps = 600
    config.optim.learning_rate = 8e-3
    config.optim.warmup_steps = 20
    config.optim.beta1 = 0.95
    config.optim.beta2 = 0.99
    return config
