"""Sequence-parallel attention: one file per strategy, one interface, to be read side by side.

A strategy maps this device's `q_BlHK, k_BlGK, v_BlGK` to its rows `o_BlHK`, inside `shard_map`; `mask` gives each local
query its interval of natural key positions, and `axis` is the mesh axis that cuts the sequence, or None.
"""

from lss_jax.attention.dense import dense_attention
from lss_jax.attention.lss import lss_attention

STRATEGIES = {"lss": lss_attention, "dense": dense_attention}
