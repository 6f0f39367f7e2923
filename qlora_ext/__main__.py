"""`python -m qlora_ext` prints what was built and what runs; with arguments it is `qlora-ext`."""

import sys

from .cli import INSTALL, main, missing_packages, print_build_info

if __name__ == "__main__":
    if len(sys.argv) > 1:
        main()
    else:
        print_build_info()
        if missing_packages():
            print(f"the commands (quantize, merge, inspect, estimate, chat) need: {INSTALL}")
        else:
            print("commands: python -m qlora_ext --help")
