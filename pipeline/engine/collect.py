"""One pass over a set of images on all ranks: moments of their features, and some of the features themselves.

The images come from shards or straight from a sampler, as uint8 both ways, and are never held together: memory does not
grow with their number.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from ddpm_core.frechet import Moments
from pipeline.data.index import ShardIndex
from pipeline.data.store import ShardSource, ShardStore
from pipeline.engine.features import Extractor
from pipeline.errors import UserError
from pipeline.runtime.files import whole_file
from pipeline.runtime.topology import Topology

ImageReader = Callable[[NDArray[np.int64]], tuple[Tensor, Tensor]]
"""(b,) ids -> (b, c, h, w) uint8 images on any device, and (b,) int64 labels, -1 for none."""

MOST_KEPT = 10_000
_MOST_VECTOR_PX = 16
_SAVE_SECONDS = 60.0
_ROWS = ("ids", "features", "labels", "vectors")


@dataclass(frozen=True)
class FeatureSet:
    """What is known of a set of images after one pass.

    Attributes:
        moments: `all` and each subset, float64, of every image, complete on every rank.
        ids: (k,) int64, sorted, of the images whose rows are kept: evenly spread over the set. This and all below is
            complete on the main rank; the others have their own share.
        features: (k, dim) float32.
        labels: (k,) int64, -1 for none.
        vectors: (k, d) float32 pixels as :func:`to_vectors` gives them.
        logits: (k, classes) float64 where the extractor is one whose classes an Inception score is made of.
    """

    moments: dict[str, Moments]
    ids: Tensor
    features: Tensor
    labels: Tensor
    vectors: Tensor
    logits: Tensor | None

    @property
    def num_images(self) -> int:
        """Of the whole set, kept or not."""
        return self.moments["all"].n


def shard_reader(index: ShardIndex, source: ShardSource | None = None) -> ImageReader:
    """The images of a shard set by number; `source` as for :class:`ShardStore`."""
    store = ShardStore(index, source)

    def read(ids: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        images, labels = store.read(ids)
        return torch.from_numpy(images), torch.from_numpy(labels)

    return read


def sampler_reader(
    sampler: Callable[[Tensor], Tensor], labels: Callable[[Tensor], Tensor | None], device: torch.device
) -> ImageReader:
    """The images that a sampler makes of seeds, nothing stored: `sampler_reader(sampler, sampler.labels, device)`."""

    def read(ids: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        seeds = torch.from_numpy(ids).to(device)
        classes = labels(seeds)
        return sampler(seeds), torch.full_like(seeds, -1) if classes is None else classes

    return read


def spread(num_images: int, most: int) -> NDArray[np.int64]:
    """At most `most` ids, evenly spread over the set, first and last among them.

    Example:
        >>> spread(10, 4).tolist(), spread(3, 4).tolist()
        ([0, 3, 6, 9], [0, 1, 2])
    """
    return np.unique(np.linspace(0, num_images - 1, min(most, num_images)).astype(np.int64))


def to_vectors(images: Tensor) -> Tensor:
    """(b, c, h, w) uint8 -> (b, d) float32 pixels in [0, 1] on the CPU.

    Images above 16 px are averaged down to 16 px: enough to tell classes and copies, and small enough to compare all
    with all.
    """
    pixels = images.cpu().float() / 255
    if images.shape[-1] > _MOST_VECTOR_PX:
        pixels = functional.adaptive_avg_pool2d(pixels, _MOST_VECTOR_PX)
    return pixels.flatten(1)


def collect_features(
    read: ImageReader,
    num_images: int,
    extractor: Extractor,
    topology: Topology,
    *,
    batch_size: int,
    subsets: Mapping[str, NDArray[np.int64]] | None = None,
    keep: int = MOST_KEPT,
    label: str,
    folder: Path | None = None,
) -> FeatureSet:
    """Features of images 0..num_images-1, each read once by one rank.

    Blocks of `batch_size` ids are dealt to the ranks in turn, as in :func:`pipeline.engine.generate.generate_blocks`:
    the images that a sampler makes of a block are the same for any number of ranks. The order of summing changes the
    last bits of the moments only.

    Args:
        read: the images.
        num_images: at least 2.
        extractor: the feature network.
        topology: the world.
        batch_size: images at once.
        subsets: name -> ids whose moments are wanted beside those of all.
        keep: images, at most, whose rows are kept.
        label: of the progress bar, and in errors.
        folder: where each rank keeps what it has, every minute and at the end, shared by all ranks; it must belong to
            these images, extractor, subsets and batch size. A later call goes on from it, with any number of ranks.

    Raises:
        UserError: fewer than 2 images, features that are not finite, or a rank can't see another's folder.
    """
    if num_images < 2:
        raise UserError(f"{label}: {num_images} images, scores need at least 2: raise their number")
    members = {name: np.zeros(num_images, dtype=bool) for name in subsets or {}}
    for name, chosen in (subsets or {}).items():
        members[name][chosen] = True
    kept = np.zeros(num_images, dtype=bool)
    kept[spread(num_images, keep)] = True
    share = _Share({name: Moments(extractor.dim) for name in ("all", *members)})
    done = set() if folder is None else _adopt(share, folder, topology)
    starts = range(0, num_images, batch_size)
    mine = [block for block in range(topology.rank, len(starts), topology.world_size) if block not in done]
    share.reserve(sum(int(kept[starts[block] : starts[block] + batch_size].sum()) for block in mine))
    seen = min(len(done) * batch_size, num_images)
    with tqdm(
        total=num_images, initial=seen, unit="img", disable=None if topology.is_main else True, desc=label
    ) as bar:
        saved = time.monotonic()
        for block in mine:
            ids = np.arange(starts[block], min(starts[block] + batch_size, num_images))
            images, labels = read(ids)
            features = _finite(extractor(images).cpu(), ids, label)
            share.add(block, features, {name: torch.from_numpy(member[ids]) for name, member in members.items()})
            keep_row = torch.from_numpy(kept[ids])
            vectors = to_vectors(images[keep_row.to(images.device)])
            rows = (torch.from_numpy(ids)[keep_row], features[keep_row], labels.cpu()[keep_row], vectors)
            share.append(dict(zip(_ROWS, rows, strict=True)))
            if folder is not None and time.monotonic() - saved > _SAVE_SECONDS:
                share.save(folder, topology)
                saved = time.monotonic()
            bar.update(min(len(ids) * topology.world_size, num_images - bar.n))
    if folder is not None and mine:
        share.save(folder, topology)
    moments = {name: over_ranks(one, topology) for name, one in share.moments.items()}
    if moments["all"].n != num_images:
        raise UserError(
            f"{label}: features of {moments['all'].n} images of {num_images}: PIPELINE_STATE must be a folder shared "
            "by all nodes"
        )
    return _gather(share, moments, extractor, topology)


def over_ranks(moments: Moments, topology: Topology) -> Moments:
    """The moments of all ranks together."""
    return Moments.from_tensors(*(topology.sum_(tensor) for tensor in moments.to_tensors()))


def _finite(features: Tensor, ids: NDArray[np.int64], label: str) -> Tensor:
    if not bool(features.isfinite().all()):
        raise UserError(
            f"{label}: features of the images {ids[0]} to {ids[-1]} are not finite: are the images, or the weights of "
            "the extractor, damaged? Make or fetch them again"
        )
    return features


@dataclass
class _Share:
    """What one rank has seen: its blocks, their moments, and the rows that are kept, in the order of coming."""

    moments: dict[str, Moments]
    blocks: list[int] = field(default_factory=list)
    rows: dict[str, Tensor] = field(default_factory=dict)
    filled: int = 0
    room: int = 0
    adopted: list[Path] = field(default_factory=list)

    def reserve(self, count: int) -> None:
        """Room for so many more rows, taken once, so that no list of parts is ever joined."""
        self.room = self.filled + count
        for name, rows in self.rows.items():
            self.rows[name] = torch.cat((rows, rows.new_empty((count, *rows.shape[1:]))))

    def append(self, rows: Mapping[str, Tensor]) -> None:
        """Keep rows; what comes first says how wide each kind is."""
        count = len(rows["ids"])
        for name, values in rows.items():
            if name not in self.rows:
                self.rows[name] = values.new_empty((self.room, *values.shape[1:]))
            self.rows[name][self.filled : self.filled + count] = values
        self.filled += count

    def add(self, block: int, features: Tensor, members: Mapping[str, Tensor]) -> None:
        """Take in a block's features; `members`: name of a subset -> which of them are in it."""
        self.moments["all"].add(features)
        for name, member in members.items():
            self.moments[name].add(features[member])
        self.blocks.append(block)

    def save(self, folder: Path, topology: Topology) -> None:
        """Keep all of it on the disk, whole, in the place of what it was made from."""
        tensors = {"blocks": torch.tensor(self.blocks)}
        tensors |= {f"rows.{name}": rows[: self.filled] for name, rows in self.rows.items()}
        for name, moments in self.moments.items():
            tensors |= dict(zip(_moment_names(name), moments.to_tensors(), strict=True))
        own = folder / f"rank-{topology.rank:05d}.safetensors"
        with whole_file(own) as aside:
            save_file(tensors, aside)
        for path in self.adopted:
            if path != own:
                path.unlink(missing_ok=True)
        self.adopted = []


def _moment_names(name: str) -> tuple[str, str, str]:
    return f"{name}.n", f"{name}.total", f"{name}.outer"


def _adopt(share: _Share, folder: Path, topology: Topology) -> set[int]:
    """Take over what an earlier pass left of this rank's, and that of ranks which are no more; returns the blocks that
    are done on any rank. A file whose blocks are all in a larger one is what that was made from."""
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[Path, dict[str, Tensor]] = {}
    for path in sorted(folder.glob("rank-*.safetensors")):
        try:
            found[path] = load_file(path)
        except (SafetensorError, OSError):
            continue  # its blocks are made again
    topology.barrier()  # from here on files change
    done: set[int] = set()
    for path, tensors in sorted(found.items(), key=lambda item: -len(item[1]["blocks"])):
        blocks = set(tensors["blocks"].tolist())
        if blocks & done:
            continue
        done |= blocks
        if int(path.stem.removeprefix("rank-")) % topology.world_size != topology.rank:
            continue
        share.adopted.append(path)
        share.blocks += tensors["blocks"].tolist()
        for name, moments in share.moments.items():
            moments.merge(Moments.from_tensors(*(tensors[key] for key in _moment_names(name))))
        share.reserve(len(tensors["rows.ids"]))
        share.append({name: tensors[f"rows.{name}"] for name in _ROWS})
    return done


def _gather(share: _Share, moments: dict[str, Moments], extractor: Extractor, topology: Topology) -> FeatureSet:
    """The kept rows of all ranks on the main one, sorted by id."""
    empty = {"ids": torch.int64, "labels": torch.int64}
    rows = {}
    for name in _ROWS:
        own = share.rows.pop(name, torch.empty((0,), dtype=empty.get(name, torch.float32)))[: share.filled]
        rows[name] = topology.gather(own)
    order = rows["ids"].argsort()
    ids, features, labels, vectors = (rows.pop(name)[order] for name in _ROWS)
    logits = extractor.logits(features) if extractor.name.startswith("inception") and topology.is_main else None
    return FeatureSet(moments, ids, features, labels, vectors, logits)
