"""Fetch CUTLASS's headers from its package into plugins/build/cutlass, where the build finds them.

With them the library multiplies 8-bit integers by Hopper's warpgroup instructions. Prints the directory.
"""

from __future__ import annotations

from pathlib import Path

from wheel_headers import Headers

CUTLASS = Headers("nvidia-cutlass==4.2.0.0", "cutlass_library/source/include/", "cutlass/cutlass.h")

if __name__ == "__main__":
    print(CUTLASS.fetch(Path(__file__).parents[1] / "build" / "cutlass"))
