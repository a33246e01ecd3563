"""Names of what attention leaves for the backward pass, for the policies that choose what is saved and what is not."""

COMMUNICATED = "attention_communicated"  # keys and values from other devices: saved, or communicated once more
ATTENDED = "attention_output"  # the output and its log-sum-exp: with these saved, scores are recomputed only in blocks
