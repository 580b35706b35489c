"""`python -m muai_workers.gpus.present`: names this machine's GPUs; where there is none, says so with status 1."""

from __future__ import annotations

import sys

from muai_workers.gpus.nvml import GpuReader, NoDriverError, count_gpus


def names() -> list[str]:
    """What each GPU is; none where no driver or no library tells."""
    reader = GpuReader([str(number) for number in range(count_gpus())])
    try:
        return [vitals.name or vitals.lost for vitals in reader.read()]
    except NoDriverError:
        return []
    finally:
        reader.close()


def main() -> int:
    """The exit status."""
    found = names()
    for number, name in enumerate(found):
        sys.stdout.write(f"GPU {number}: {name}\n")
    if not found:
        sys.stdout.write("there is no NVIDIA GPU at hand: what needs one is not tried\n")
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())
