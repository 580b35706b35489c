"""`python -m muai_workers.demo.build FOLDER`: build the small causal model, in a process that can be interrupted.

Importing torch takes seconds and swallows a Ctrl-C that comes in the middle of it.
"""

import sys
from pathlib import Path

from muai_workers.models.tiny import build_tiny_causal

if __name__ == "__main__":
    build_tiny_causal(Path(sys.argv[1]))
