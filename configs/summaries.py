"""An encoder-decoder that summarizes abstracts of papers in a sentence, from the 100 papers of the package aclsum.

    pip install aclsum==0.1.2 rouge-score==0.1.2
    JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=8 python -m lss_jax.train --config=configs/summaries.py --workdir=/tmp/papers
    JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=8 python -m lss_jax.evaluate --workdir=/tmp/papers --rouge --split=test

Reproduces: nothing of the paper's, which names the summarization of documents as future work.
Cost: measured with Python 3.11 on two CPU cores that had much else to do (8 simulated devices): 13:12 minutes, and
11:30 minutes of CPU time, to train; 21 seconds to evaluate.
Expected: 2.32 bits per byte on the validation split; on the test split ROUGE-1/2/L of 21.3/7.2/20.3 (with --beams=4:
24.4/9.1/21.8), beside 20.2/4.3/13.5 for the first three sentences. A model from scratch learns little from 100 papers:
it says much the same of each of them, and one training summary given for all scores higher (27.7/10.4/24.5).
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.task = "sequence_to_sequence"
    config.mesh.data, config.mesh.seq = 2, -1
    config.model.family = "encoder_decoder"
    config.model.vocab = 257  # bytes and a start token
    config.model.layers = 2
    config.model.width = 64
    config.model.heads = 4
    config.model.positions = "rope"
    config.model.dropout = 0.1
    config.data.source = "aclsum"
    config.data.prompt_field = "abstract"  # or "document": the introduction and the conclusion too
    config.data.answer_field = "outcome"  # or "challenge", "approach"
    config.data.source_len = 1024
    config.data.seq_len = 224
    config.data.batch_size = 16
    config.optim.steps = 400
    config.optim.learning_rate = 3e-3
    config.eval_every = 100
    return config
