"""Experiments: each module has `get_config() -> refine_af.config.Experiment`."""
