"""``python -m learned_optim.kernels``: builds the library in place, and prints its status."""

from __future__ import annotations

import sys

from learned_optim.kernels import _build, status


def main() -> int:
    if not _build.switched_off():
        try:
            print(f"built by {_build.build()}")
        except (_build.BuildError, OSError) as error:
            print(error, file=sys.stderr)
    print(status())
    return 0 if status().startswith(("compiled", "off")) else 1


if __name__ == "__main__":
    sys.exit(main())
