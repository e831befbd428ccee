"""What a shard set says of its images besides pixels and labels."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from typing import Any

from pipeline.data.index import ShardIndex


def read_meta(index: ShardIndex) -> Iterator[dict[str, Any]]:
    """What the shards say of each image besides pixels and label, in the order of ids."""
    for shard in index.shards:
        with tarfile.open(index.folder / shard.name, "r|") as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    content = tar.extractfile(member)
                    assert content is not None, "a tar of ours holds plain files"
                    yield json.loads(content.read())
