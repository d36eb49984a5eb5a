"""What every test runs under: no network, one thread a process (two cores are shared by many), no progress bars."""

from __future__ import annotations

import atexit
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, here and in processes that tests start


@atexit.register
def _close_llama_cpp_null_files() -> None:
    """llama-cpp-python leaves two handles on the null device open, which is a warning, and so an error, at the end."""
    utilities = sys.modules.get("llama_cpp._utils")
    if utilities is not None:
        utilities.outnull_file.close()
        utilities.errnull_file.close()
