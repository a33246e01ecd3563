"""The parts of a training step, as names on the way to an operation (`jax.named_scope`), by which a program is read."""

ATTENTION, REGIONS, POOLING = "attention", "regions", "pooling"
CROSS_ATTENTION = "cross attention"  # to the keys and values of another sequence
LOSS, MASK = "loss", "mask"
POSITIONS, GRADIENTS, OPTIMIZER = "positions", "gradients", "optimizer"
WEIGHTS = "weights"  # gathered from their shares, and the gradients scattered to them
ELSEWHERE = "elsewhere"  # none of these, or the compiler has lost the name

PLACES = (CROSS_ATTENTION, ATTENTION, REGIONS, POOLING, LOSS, MASK, POSITIONS, GRADIENTS, OPTIMIZER, WEIGHTS)
BY_PASS = (CROSS_ATTENTION, ATTENTION, REGIONS, WEIGHTS)  # told apart by forward and backward pass
