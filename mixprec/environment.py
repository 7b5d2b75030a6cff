"""What libraries read from the environment when they are imported, set in one place.

Import this before torch, transformers, datasets or wandb.
"""

import os

# The report's condition: transformers' own RMSNorm, not a kernel from the hub. models.py asserts it.
os.environ["USE_HUB_KERNELS"] = "0"
# Tokenizing happens in this process and in auto-round's; the forked one must not wait for threads.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Hydra would print and exit by itself; sweep.main() turns its errors into one line.
os.environ.setdefault("HYDRA_FULL_ERROR", "1")
# A bar for each of sixty small files that are converted once.
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
# auto-round prints some thirty lines a scoring below that.
os.environ.setdefault("AR_LOG_LEVEL", "WARNING")
# Where auto-round puts what it moves out of memory; by default a folder wherever it is run.
os.environ.setdefault("AR_WORK_SPACE", os.path.join(".cache", "auto_round"))
