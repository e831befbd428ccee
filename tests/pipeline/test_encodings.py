"""JPEG and passed-through payloads: read by others, stated in the index, and normalised one way only."""

import io
import json
import subprocess
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from pipeline import paths
from pipeline.data.audit import decode, open_image, to_pixels
from pipeline.data.examine import Form, read_pixels
from pipeline.data.index import Preparation, load_index
from pipeline.data.listing import list_images
from pipeline.data.writer import Sample, encode_jpeg, write_shards
from pipeline.runtime.files import load_json
from pipeline.shard import main
from tests.image_files import GOOD, cut


def _smooth(width: int, height: int, channels: int = 3) -> np.ndarray:
    rng = np.random.default_rng(width)
    image = Image.fromarray(rng.integers(0, 256, (7, 6, 3), dtype=np.uint8)).resize((width, height))
    return np.asarray(image if channels == 3 else image.convert("L")).reshape(height, width, channels)


def _records(folder: Path) -> list[dict[str, object]]:
    import webdataset

    urls = [str(folder / shard.name) for shard in load_index(folder).shards]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the peer's own
        return list(webdataset.WebDataset(urls, shardshuffle=False))


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_shards_are_read_by_webdataset_and_tar(tmp_path: Path, channels: int) -> None:
    images = [_smooth(16, 16, channels) for _ in range(5)]
    samples = (Sample(image, place % 2) for place, image in enumerate(images))
    form = {"image_size": 16, "channels": channels, "classes": ("a", "b"), "shard_images": 3}
    index = write_shards(tmp_path / "s", samples, encoding="jpeg", jpeg_quality=90, **form)  # type: ignore[arg-type]
    encoder = f"simplejpeg {simplejpeg.__version__}, quality 90, 4:4:4"
    assert (index.encoding, index.preparation) == ("jpeg", Preparation(encoder=encoder))
    records = _records(tmp_path / "s")
    assert [record["cls"] for record in records] == [b"0", b"1", b"0", b"1", b"0"]
    for record, image in zip(records, images, strict=True):
        data = record["jpg"]
        assert isinstance(data, bytes)
        found = np.asarray(Image.open(io.BytesIO(data))).reshape(16, 16, channels)
        assert np.abs(found.astype(int) - image).mean() < 6
        assert data == encode_jpeg(image, 90)
    listed = subprocess.run(["tar", "-tf", tmp_path / "s" / "00001.tar"], capture_output=True, text=True, check=True)
    assert listed.stdout.split()[:3] == ["00000003.cls", "00000003.jpg", "00000003.json"]
    assert len(encode_jpeg(images[0], 40)) < len(encode_jpeg(images[0], 90))


def test_original_bytes_pass_through_with_label_path_and_suffix(
    workspace: Path, set_shard: Callable[..., None]
) -> None:
    sources = {}
    for place, (name, make, _, _) in enumerate(GOOD):
        path = workspace / "images" / f"class {place % 2}" / name
        path.parent.mkdir(exist_ok=True)
        make(path)
        sources[f"{path.parent.name}/{name}"] = path.read_bytes()
    cut("PNG", 0.5)(workspace / "images" / "class 0" / "cut.png")
    big = workspace / "images" / "class 1" / "large.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (99, 98, 3), dtype=np.uint8)).save(big)
    sources["class 1/large.png"] = big.read_bytes()
    set_shard(encoding="original", image_size=8, channels=3, resize_filter="lanczos", crop="none")
    main()
    index = load_index(paths.SHARDS)
    assert (index.encoding, index.image_size, index.channels) == ("original", 8, 3)
    assert index.preparation == Preparation("lanczos", "none", "")
    records = _records(paths.SHARDS)
    assert len(records) == len(sources) == index.num_images
    for number, record in enumerate(records):
        meta = json.loads(record["json"])  # type: ignore[arg-type]
        suffix = meta["path"].rpartition(".")[2].lower()
        assert record["__key__"] == f"{number:08d}"
        assert record[suffix] == sources[meta["path"]]
        assert record["cls"] == meta["class"].removeprefix("class ").encode()
        offset, size, shard, label, _ = index.samples[number].tolist()
        data = (paths.SHARDS / index.shards[shard].name).read_bytes()[offset : offset + size]
        assert (data, label) == (sources[meta["path"]], int(meta["class"].removeprefix("class ")))
    for shard in index.shards:
        subprocess.run(["tar", "-tf", paths.SHARDS / shard.name], check=True, capture_output=True)
    assert load_json(paths.SHARDS / "index.json")["preparation"]["resize_filter"] == "lanczos"


def test_the_default_preparation_is_not_spelled_out(workspace: Path, set_shard: Callable[..., None]) -> None:
    """So that an index from before the choice, and its hash, stay what they were."""
    Image.new("L", (8, 8)).save(workspace / "images" / "1.png")
    main()
    assert "preparation" not in load_json(paths.SHARDS / "index.json")
    assert load_index(paths.SHARDS).preparation == Preparation()
    set_shard(encoding="png")
    main()
    assert load_index(paths.SHARDS).preparation.encoder.startswith("Pillow ")


def test_a_passed_through_file_that_changes_while_the_stage_runs_is_noticed(
    workspace: Path, set_shard: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline import shard
    from pipeline.errors import UserError

    path = workspace / "images" / "1.png"
    noise = np.random.default_rng(0).integers(0, 256, (99, 99, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    set_shard(encoding="original")
    plan = shard.plan

    def change(*arguments: object) -> object:
        Image.fromarray(noise[::-1]).save(path)
        return plan(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(shard, "plan", change)
    with pytest.raises(UserError, match=r"images/1\.png changed while the stage ran; run again"):
        main()
    assert not paths.SHARDS.exists()


@pytest.mark.parametrize("size", [(16, 16), (17, 31), (1, 1), (200, 133)])
@pytest.mark.parametrize("subsampling", [0, 1, 2, None])
@pytest.mark.parametrize("progressive", [False, True])
def test_the_fast_way_gives_pillows_pixels(
    tmp_path: Path, size: tuple[int, int], subsampling: int | None, progressive: bool
) -> None:
    image = Image.fromarray(_smooth(*size))
    path = tmp_path / "a.jpg"
    if subsampling is None:
        image.convert("L").save(path, progressive=progressive)
    else:
        image.save(path, subsampling=subsampling, progressive=progressive, quality=80)
    fast = decode(path.read_bytes())
    assert isinstance(fast, np.ndarray)
    slow = open_image(path)
    assert np.array_equal(fast, np.asarray(slow).reshape(fast.shape))
    for channels in (1, 3):
        assert np.array_equal(to_pixels(fast, 16, channels), to_pixels(slow, 16, channels))


def test_what_is_not_plain_goes_the_careful_way(tmp_path: Path) -> None:
    image, path = Image.fromarray(_smooth(20, 10)), tmp_path / "a.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(path, exif=exif)
    turned = decode(path.read_bytes())
    assert isinstance(turned, Image.Image)
    assert turned.size == (10, 20)
    image.save(path, xmp=b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>')
    turned = decode(path.read_bytes())
    assert isinstance(turned, Image.Image)
    assert turned.size == (10, 20)
    image.convert("CMYK").save(path)
    assert isinstance(decode(path.read_bytes()), Image.Image)


@pytest.mark.parametrize("resize_filter", ["bicubic", "lanczos", "bilinear", "box"])
def test_filter_and_crop_reach_the_pixels(workspace: Path, set_shard: Callable[..., None], resize_filter: str) -> None:
    from pipeline.data.store import ShardStore

    pixels = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(workspace / "images" / "1.png")
    for crop, box in (("center", (10, 0, 40, 30)), ("none", (0, 0, 50, 30))):
        set_shard(image_size=8, channels=3, resize_filter=resize_filter, crop=crop)
        main()
        index = load_index(paths.SHARDS)
        expected = Image.fromarray(pixels).crop(box).resize((8, 8), Image.Resampling[resize_filter.upper()])
        assert np.array_equal(ShardStore(index).read(np.array([0]))[0][0].transpose(1, 2, 0), np.asarray(expected))
        assert (index.preparation.resize_filter, index.preparation.crop) == (resize_filter, crop)
    form = Form(8, 3, "raw", 95, resize_filter, "none")
    (found,) = list_images("images").images
    assert np.array_equal(read_pixels(Path("images", found.path).read_bytes(), form)[0], np.asarray(expected))


def test_tars_hold_nothing_but_plain_files(workspace: Path) -> None:
    Image.new("L", (8, 8)).save(workspace / "images" / "1.png")
    main()
    with tarfile.open(paths.SHARDS / "00000.tar") as tar:
        assert all(member.isreg() and "/" not in member.name and member.name.count(".") == 1 for member in tar)
