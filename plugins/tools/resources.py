"""Reads what ptxas says about each kernel: registers, shared memory, stack and spills.

A compiler launcher: `resources.py nvcc ...` runs the compiler, keeps the report beside the object as
`OBJECT.resources.json`, and fails the compilation when a kernel keeps registers in memory.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

_KERNEL = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
_MEMORY = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")
_FAILING_WARNINGS = re.compile(r"C75(?:08|10)")  # ignored setmaxnreg, serialized wgmma


def parse(log: str) -> list[dict[str, int | str]]:
    """Return one record per kernel and architecture of a ptxas log."""
    records: list[dict[str, int | str]] = []
    for line in log.splitlines():
        if kernel := _KERNEL.search(line):
            records.append({"kernel": kernel[1], "architecture": kernel[2]})
        elif records and (memory := _MEMORY.search(line)):
            stack, stores, loads = map(int, memory.groups())
            records[-1].update(stack_bytes=stack, spill_store_bytes=stores, spill_load_bytes=loads)
        elif records and (used := _USED.search(line)):
            records[-1].update(registers=int(used[1]), shared_bytes=int(used[2] or 0))
    return records


def complaints(records: list[dict[str, int | str]], log: str) -> list[str]:
    """Return what must not be shipped: spills, and Hopper instructions that were not used as written."""
    found = [
        f"{record['kernel']} ({record['architecture']}) keeps registers in memory: "
        f"{record['spill_store_bytes']} bytes spilled, {record['spill_load_bytes']} loaded back, "
        f"stack frame of {record['stack_bytes']}"
        for record in records
        if any(record.get(key) for key in ("spill_store_bytes", "spill_load_bytes", "stack_bytes"))
    ]
    return found + [line for line in log.splitlines() if _FAILING_WARNINGS.search(line)]


def main(command: list[str]) -> int:
    """Run the compiler and judge its report."""
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    records = parse(done.stderr)
    sys.stderr.write(
        "\n".join(
            line
            for line in done.stderr.splitlines()
            if "ptxas info" not in line and line.strip() and "bytes stack frame" not in line
        )
    )
    if done.returncode != 0 or "-o" not in command or not records:
        return done.returncode
    output = Path(command[command.index("-o") + 1])
    found = complaints(records, done.stderr)
    if found:
        output.unlink(missing_ok=True)
        print("\n".join(found), file=sys.stderr)
        return 1
    output.with_name(output.name + ".resources.json").write_text(json.dumps(records, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
