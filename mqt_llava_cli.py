"""What the program `mqt-llava` starts. It is no part of the package, whose import takes seconds: Ctrl-C is answered in them, too."""

import sys


def main():
    try:
        from mqt_llava.cli import main
    except KeyboardInterrupt:
        sys.exit(130)  # 128 + SIGINT, as shells have it
    main()
