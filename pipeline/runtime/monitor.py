"""How loaded this machine is."""

from __future__ import annotations

import resource
import sys

import psutil

CLOCK = "system/cpu_utilization_percentage"  # its step counts the samples


class LoadMonitor:
    """Load of this machine, under MLflow's own names, which its UI shows in the tab "System metrics"."""

    def __init__(self) -> None:
        psutil.cpu_percent()  # the first call has nothing to compare with
        self._process = psutil.Process()
        self._network = psutil.net_io_counters()

    def sample(self) -> dict[str, float]:
        """Values since the last call, by name."""
        memory = psutil.virtual_memory()
        values = {
            CLOCK: psutil.cpu_percent(),
            "system/system_memory_usage_megabytes": memory.used / 1e6,
            "system/system_memory_usage_percentage": memory.percent,
            "system/process_memory_megabytes": self._process.memory_info().rss / 1e6,
        }
        if self._network and (network := psutil.net_io_counters()):
            values["system/network_receive_megabytes"] = (network.bytes_recv - self._network.bytes_recv) / 1e6
            values["system/network_transmit_megabytes"] = (network.bytes_sent - self._network.bytes_sent) / 1e6
        torch = sys.modules.get("torch")
        if torch is None or not hasattr(torch, "cuda") or not torch.cuda.is_initialized():
            return values
        for i in range(torch.cuda.device_count()):
            if not torch.cuda.memory_reserved(i):  # not ours: asking for its memory would open a context there
                continue
            free, total = torch.cuda.mem_get_info(i)
            values[f"system/gpu_{i}_memory_usage_megabytes"] = (total - free) / 1e6
            values[f"system/gpu_{i}_memory_usage_percentage"] = 100 * (total - free) / total
            try:
                values[f"system/gpu_{i}_utilization_percentage"] = torch.cuda.utilization(i)
            except Exception:  # needs nvidia-ml-py, which is not a dependency
                continue
        return values


def peak_memory_gib() -> float:
    """The largest resident memory of this process so far."""
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
