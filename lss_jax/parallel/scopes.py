"""The parts of a training step, as names on the way to an operation (`jax.named_scope`), by which a program is read."""

ATTENTION, REGIONS, POOLING = "attention", "regions", "pooling"
LOSS, MASK = "loss", "mask"
POSITIONS, GRADIENTS, OPTIMIZER = "positions", "gradients", "optimizer"
WEIGHTS = "weights"  # gathered from their shares, and the gradients scattered to them
PATCHES = "patches"  # of a hierarchy, from each chunk to the next
ELSEWHERE = "elsewhere"  # none of these, or the compiler has lost the name

PLACES = (ATTENTION, REGIONS, POOLING, LOSS, MASK, PATCHES, POSITIONS, GRADIENTS, OPTIMIZER, WEIGHTS)
BY_PASS = (ATTENTION, REGIONS, WEIGHTS)  # whose collectives are told apart by forward and backward pass
