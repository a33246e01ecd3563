"""Names of what the backward pass may find saved, for the policies that choose what is saved and what is not."""

COMMUNICATED = "attention_communicated"  # keys and values from other devices
ATTENDED = "attention_output"  # the output and its log-sum-exp: with these saved, scores are recomputed only in blocks
REGION_OUTPUT = "region_output"  # a part: no larger than the layer's input, and cheaper to save than to sum once more
GATHERED = "gathered_weight"  # gathered once more in the backward pass, and never saved
