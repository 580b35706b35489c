"""What the driver's error numbers, the XIDs, say of a GPU. Pure.

After NVIDIA's catalogue, https://docs.nvidia.com/deploy/xid-errors/analyzing-xid-catalog.html, which says for each
number what it means and what is to be done. Kubernetes' device plugin of NVIDIA leaves a GPU in use after the same
application errors (https://github.com/NVIDIA/k8s-device-plugin).
"""

from __future__ import annotations

from collections.abc import Mapping

APPLICATION: Mapping[int, str] = {
    13: "an exception in a kernel of the program's",
    31: "a program touched memory that it does not have",
    43: "a program's fault made the GPU stop its work",
    45: "a program's work was cleaned away, mostly after it ended",
    68: "an exception in the video decoder",
    109: "a program took too long to make way for another",
}
"""What a program has done: it fails, the next one finds the GPU as good as new."""

HARDWARE: Mapping[int, str] = {
    46: "the GPU stopped processing",
    48: "a memory error that cannot be corrected",
    61: "its microcontroller halted",
    62: "its microcontroller halted",
    63: "a broken row of its memory was marked to be replaced",
    64: "a broken row of its memory cannot be replaced",
    74: "an error of the link between GPUs (NVLink)",
    79: "the GPU has fallen off the bus",
    94: "a memory error that cannot be corrected, kept to one program",
    95: "a memory error that cannot be corrected, and may have reached others",
    119: "its system processor (GSP) does not answer",
    120: "an error of its system processor (GSP)",
    140: "memory errors that cannot be corrected",
}
"""What is wrong with the GPU itself or with what it is plugged into."""


def is_application(xid: int) -> bool:
    """Whether the GPU is not to blame."""
    return xid in APPLICATION


def is_hardware(xid: int) -> bool:
    """Whether nothing should run on the GPU after it. What is in neither list is told of, and changes nothing."""
    return xid in HARDWARE


def describe_xid(xid: int) -> str:
    """In words."""
    meaning = HARDWARE.get(xid) or APPLICATION.get(xid) or "see NVIDIA's catalogue of XIDs"
    return f"XID {xid}: {meaning}"
