"""What the program `mqt-llava` starts. It is no part of the package, whose import takes seconds: Ctrl-C is answered in them, too."""

import logging
import sys


def main():
    # transformers imports torchao where it is there, and hears what it could not load
    for library in ("torchao", "torch.utils._pytree"):
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        from mqt_llava.cli import main
    except KeyboardInterrupt:
        sys.exit(130)  # 128 + SIGINT, as shells have it
    main()
