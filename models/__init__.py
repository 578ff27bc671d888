"""Flax ports of decoders, their parts, and conversion; they know nothing of the pipeline."""
