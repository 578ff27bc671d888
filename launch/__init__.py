"""The programs: `python -m refine_af.launch.NAME`, the only layer that reads flags."""
