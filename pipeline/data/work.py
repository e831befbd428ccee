"""Work on a folder of images that is cut into tasks: over processes, over machines, and over runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pipeline.data.catalogue import Catalogue
from pipeline.data.examine import Files, find_colour
from pipeline.data.listing import Listing
from pipeline.runtime.pool import run_tasks

VARIABLE = "PIPELINE_SHARD_PROCESSES"
FEW = 1000  # files: another process takes longer to start
MOST_IN_A_TASK = 1024  # files, whose work a kill loses
Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Work:
    """A folder of images as it is, and who looks at how much of it: `worker` is (k, n), None for all."""

    raw: str
    listing: Listing
    keys: NDArray[np.bytes_]
    processes: int
    worker: tuple[int, int] | None = None

    def run(self, title: str, function: Callable[[Task], Result], tasks: Sequence[Task], files: int) -> list[Result]:
        """Run tasks in as many processes as so many files are worth, with a bar."""
        processes = min(self.processes, max(1, files // FEW))
        results = run_tasks(function, tasks, processes, variable=VARIABLE)
        return list(tqdm(results, desc=title, total=len(tasks), unit="task", disable=None))

    def complete(
        self, title: str, function: Callable[[Files], int], folder: Path, dtype: np.dtype[np.void]
    ) -> Catalogue:
        """The catalogue in `folder`, after `function` has looked at the files it misses: this worker's part of them."""
        known = Catalogue(folder, dtype)
        missing = known.missing(self.keys)
        if self.worker:
            number, parts = self.worker
            spread = np.frombuffer(self.keys.tobytes(), "<u8")[::2][missing]
            missing = missing[spread % np.uint64(parts) == number]
        print(f"{title}: {len(missing):,} of {len(self.keys):,} files to look at", flush=True)
        if not len(missing):
            return known
        size = min(MOST_IN_A_TASK, max(64, len(missing) // 32))
        tasks = []
        for start in range(0, len(missing), size):
            places = missing[start : start + size]
            names = tuple(self.listing.images[place].path for place in places.tolist())
            tasks.append(Files(self.raw, names, self.keys[places], folder))
        self.run(title, function, tasks, len(missing))
        return Catalogue(folder, dtype)

    def part_of(self, tasks: Sequence[Task]) -> Sequence[Task]:
        """This worker's part of some tasks."""
        return tasks[self.worker[0] :: self.worker[1]] if self.worker else tasks

    def has_colour(self, places: Sequence[int]) -> bool:
        """Whether any of these files has colour; they are decoded until one has."""
        names = [os.path.join(self.raw, self.listing.images[place].path) for place in places]
        tasks = [names[start : start + 64] for start in range(64, len(names), 64)]
        return find_colour(names[:64]) or any(
            run_tasks(find_colour, tasks, min(self.processes, len(names) // FEW), variable=VARIABLE)
        )
