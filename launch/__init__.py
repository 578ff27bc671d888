"""The programs: `python -m refine_af.launch.NAME`, the only layer that reads flags."""

import os

# transformers is used for its tokenizers; that PyTorch is not there is as it should be.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
