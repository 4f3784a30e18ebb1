"""The entry point of the `mqt-llava` program.

It is outside the package, whose import loads torch. Where this module is loaded, `mqt_llava` imports its model when it is used, so that
help is shown at once. Ctrl-C is answered during imports, too.
"""

import logging
import sys


def main():
    # transformers imports torchao if it is installed, and torchao logs what it could not load
    for library in ("torchao", "torch.utils._pytree"):
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        from mqt_llava.cli import main
    except KeyboardInterrupt:
        sys.exit(130)  # 128 + SIGINT, as shells report it
    main()
