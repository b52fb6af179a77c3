"""This machine and what is installed on it. Standard library only."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path


GROUPS = Path("/sys/fs/cgroup")


def cores() -> int:
    """CPU cores that this process may use, of which a container's share may be a part."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(there, _cores_of_group() or there)


def _cores_of_group() -> int | None:
    """Cores whose time a container or job may take (Linux), rounded up; None where nothing limits it."""
    try:
        quota, period = (GROUPS / "cpu.max").read_text().split()
    except (OSError, ValueError):  # cgroup v1
        try:
            quota, period = ((GROUPS / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        except OSError:
            return None
    try:
        share = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):  # "max" is no number
        return None
    return math.ceil(share) if share > 0 else None  # -1 is no limit


def memory_left_in_group() -> int | None:
    """Bytes that a container or job may still take (Linux, cgroup v2); None where nothing limits it."""
    try:
        limit, used = (int((GROUPS / f"memory.{name}").read_text()) for name in ("max", "current"))
        facts = dict(line.split() for line in (GROUPS / "memory.stat").read_text().splitlines())
        return max(limit - used + int(facts["inactive_file"]), 0)  # files that were read make room
    except (OSError, ValueError, KeyError):  # "max" is no number
        return None


def processor_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def version_of(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def versions_of(distributions: Iterable[str]) -> dict[str, str]:
    """Of those that are installed."""
    found = {name: version_of(name) for name in distributions}
    return {name: version for name, version in found.items() if version is not None}
