"""What a run ran on, and what it used: facts for tags, figures for curves. Linux alone."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pipeline.system.process import named_gpus

_PACKAGES = ("torch", "numpy", "mlflow", "dvc", "prefect")


def facts(device: str) -> dict[str, str]:
    """Hardware and software, as tags `hardware.<fact>` and `environment.<name>`.

    Args:
        device: `cpu` or `cuda`; the GPU is named where it is used.
    """
    import psutil  # which `make gpu` does without

    found = {
        "hardware.cpu": processor(),
        "hardware.cores": str(len(os.sched_getaffinity(0))),
        "hardware.memory_gib": f"{psutil.virtual_memory().total / 2**30:.1f}",
        "environment.platform": platform.platform(),
        "environment.python": platform.python_version(),
    }
    for package in _PACKAGES:
        try:
            found[f"environment.{package}"] = version(package)
        except PackageNotFoundError:
            continue
    if device == "cuda":
        found["hardware.gpu"] = _ask_gpu("name") or "unknown"
    return found


class Usage:
    """What the machine does and what a training has cost, from one point of the curves to the next.

    Percentages and memory are the whole machine's, under the names of MLflow's own system
    metrics; of the GPUs the first one's. CPU hours are this process's and GPU hours all ranks', on
    top of what earlier starts of the same run had used.
    """

    def __init__(self, device: str, before: Mapping[str, float], ranks: int = 1) -> None:
        self._gpu, self._ranks = device == "cuda", ranks
        self._before = {key: before.get(key, 0.0) for key in ("train/cpu_hours", "train/gpu_hours")}
        self._began = time.monotonic()
        import psutil

        psutil.cpu_percent()  # from now on it tells what has been used since the last call

    def sample(self) -> dict[str, float]:
        """The figures since the last call, as metrics."""
        import psutil

        memory = psutil.virtual_memory()
        used = memory.total - memory.available
        figures = {
            "system/cpu_utilization_percentage": psutil.cpu_percent(),
            "system/system_memory_usage_megabytes": used / 1e6,
            "system/system_memory_usage_percentage": 100 * used / memory.total,
            "train/cpu_hours": self._before["train/cpu_hours"] + time.process_time() / 3600,
        }
        if self._gpu:
            hours = self._ranks * (time.monotonic() - self._began) / 3600  # a GPU each
            figures["train/gpu_hours"] = self._before["train/gpu_hours"] + hours
            busy_percent, _, used_mib = _ask_gpu("utilization.gpu,memory.used").partition(", ")
            if busy_percent.isdigit() and used_mib.isdigit():  # a GPU may not tell
                figures["system/gpu_0_utilization_percentage"] = float(busy_percent)
                figures["system/gpu_0_memory_usage_megabytes"] = int(used_mib) * 2**20 / 1e6
        return figures


def _ask_gpu(what: str) -> str:
    """The answer of nvidia-smi about the one GPU that we train on; empty where it gives none."""
    named = named_gpus()
    if named == []:
        return ""
    gpu = named[0] if named else "0"
    command = ["nvidia-smi", "-i", gpu, f"--query-gpu={what}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def processor() -> str:
    """The CPU's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
