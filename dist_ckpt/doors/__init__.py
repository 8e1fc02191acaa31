"""Weights out to the formats of others, checkpoints of others in, averages of several."""
