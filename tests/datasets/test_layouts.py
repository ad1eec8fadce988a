"""Folders of pictures and masks: what is found, and what is told where nothing is."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from fastseg.datasets.pictures import open_dataset
from fastseg.images.palettes import cityscapes_label_ids, dataset

SIZE = (6, 8)


def save(path, seed=0, labels=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    if labels is None:
        pixels = np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    else:
        Image.fromarray(np.asarray(labels, np.uint8)).save(path)


def labels_of(seed, classes=4):
    return np.random.default_rng(seed).integers(0, classes, SIZE)


def plain(root, names=("a", "b", "c"), images="images", masks="masks"):
    for seed, name in enumerate(names):
        save(root / images / f"{name}.png", seed)
        save(root / masks / f"{name}.png", labels=labels_of(seed))
    return root


def stems(data):
    return [name[0].replace("\\", "/").split("/")[-1].split(".")[0] for name in data.names]


@pytest.mark.parametrize(
    ("images", "masks"),
    [("images", "masks"), ("images", "labels"), ("images", "annotations"), ("img_dir", "ann_dir")],
)
def test_images_and_masks(tmp_path, images, masks):
    root = plain(tmp_path, images=images, masks=masks)
    (root / "classes.txt").write_text("sky\nroad\n\ncar\nbus\n", encoding="utf-8")
    (root / images / ".hidden.png").write_bytes(b"no picture")
    (root / images / "notes.txt").write_text("no picture")
    data = open_dataset(root)
    assert (len(data), stems(data)) == (3, ["a", "b", "c"])
    assert data.classes == ["sky", "road", "car", "bus"]
    assert (data.reduce_labels, data.remarks) == (None, [])
    for index, (image, labels) in enumerate(data):
        assert image.size == SIZE[::-1]
        assert np.array_equal(np.asarray(image), np.asarray(Image.open(data.names[index][0])))
        assert labels.dtype == np.uint8
        assert np.array_equal(labels, labels_of(index))
    image, labels = data[-1]
    assert np.array_equal(labels, labels_of(2))
    assert stems(data.first(2)) == ["a", "b"]
    assert len(list(data.first(2))) == 2


@pytest.mark.parametrize("folder", ["val", "validation"])
def test_splits_below(tmp_path, folder):
    plain(tmp_path, ("train/a", "train/b", f"{folder}/x/c"))
    assert stems(open_dataset(tmp_path)) == ["c"]
    assert stems(open_dataset(tmp_path, "val")) == ["c"]
    assert stems(open_dataset(tmp_path, "train")) == ["a", "b"]
    with pytest.raises(FileNotFoundError, match=f"no split 'test'; there are train, {folder}"):
        open_dataset(tmp_path, "test")


def test_folders_that_are_no_splits(tmp_path):
    plain(tmp_path, ("lund/a", "ulm/a"))
    assert stems(open_dataset(tmp_path)) == ["a", "a"]
    with pytest.raises(FileNotFoundError, match="no split 'val'; there are lund, ulm"):
        open_dataset(tmp_path, "val")


def test_without_a_validation_split(tmp_path):
    plain(tmp_path, ("train/a", "test/b"))
    with pytest.raises(FileNotFoundError, match="no split 'val'; there are test, train"):
        open_dataset(tmp_path)


def cityscapes(root, kinds, labels):
    for split, city, name in (("val", "ulm", "1"), ("val", "bonn", "2"), ("train", "ulm", "3")):
        stem = f"{city}_{name}"
        save(root / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png")
        for kind in kinds:
            save(root / "gtFine" / split / city / f"{stem}_gtFine_{kind}.png", labels=labels[kind])
    return root


def test_cityscapes(tmp_path):
    ids = np.resize(cityscapes_label_ids(), SIZE)
    ids[0] = [0, 4, 5, 6, 9, 10, 29, 30]  # of no class
    train_ids = np.resize(np.arange(19), SIZE)
    train_ids[0] = 255
    labels = {"labelIds": ids, "labelTrainIds": train_ids}
    for folder, kinds in (("both", labels), ("own", ["labelIds"])):
        data = open_dataset(cityscapes(tmp_path / folder, kinds, labels))
        assert stems(data) == ["bonn_2_leftImg8bit", "ulm_1_leftImg8bit"]
        assert data.classes == dataset("cityscapes").names
        assert data.reduce_labels is False
        assert all(np.array_equal(found, train_ids) for _, found in data)
    assert data.remarks == ["no labelTrainIds: labelIds are taken, and made train ids"]
    assert len(open_dataset(tmp_path / "own", "train")) == 1
    (tmp_path / "own/gtFine/val/ulm/ulm_1_gtFine_labelIds.png").unlink()
    with pytest.raises(FileNotFoundError, match="1 of 2 masks are not there: .*ulm_1_gtFine_label"):
        open_dataset(tmp_path / "own")


def test_ade20k(tmp_path):
    for split, names in (("validation", ["ADE_val_1", "ADE_val_2"]), ("training", ["ADE_train_1"])):
        for name in names:
            save(tmp_path / "images" / split / f"{name}.jpg")
            save(tmp_path / "annotations" / split / f"{name}.png", labels=labels_of(1, 151))
    data = open_dataset(tmp_path)
    assert (data.kind, stems(data), data.reduce_labels) == (
        "ADE20K",
        ["ADE_val_1", "ADE_val_2"],
        True,
    )
    assert len(data.classes) == 150
    assert np.array_equal(data[0][1], labels_of(1, 151))  # as they are stored
    assert stems(open_dataset(tmp_path, "train")) == ["ADE_train_1"]


def voc(root):
    for seed, name in enumerate(("2007_1", "2007_2", "2007_3")):
        save(root / "JPEGImages" / f"{name}.jpg", seed)
        mask = Image.fromarray(labels_of(seed, 21).astype(np.uint8))
        mask.putpalette(list(range(256)) * 3)
        (root / "SegmentationClass").mkdir(exist_ok=True)
        mask.save(root / "SegmentationClass" / f"{name}.png")
    save(root / "JPEGImages" / "unlabelled.jpg")
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("2007_3\n2007_1\n")
    (lists / "train.txt").write_text("2007_2\n")
    return root


def test_pascal_voc(tmp_path):
    data = open_dataset(voc(tmp_path))
    assert (data.kind, stems(data)) == ("Pascal VOC", ["2007_3", "2007_1"])
    assert data.classes == dataset("voc").names
    assert np.array_equal(data[0][1], labels_of(2, 21))  # indices of the palette
    assert stems(open_dataset(tmp_path, "train")) == ["2007_2"]
    with pytest.raises(FileNotFoundError, match="test.txt: no such list; there are train, val"):
        open_dataset(tmp_path, "test")
    (tmp_path / "mine.txt").write_text(
        "/JPEGImages/2007_2.jpg /SegmentationClass/2007_2.png\n2007_1"
    )
    assert stems(open_dataset(tmp_path, split_file=tmp_path / "mine.txt")) == ["2007_2", "2007_1"]


def test_lists(tmp_path):
    plain(tmp_path, ("train/a", "val/b", "val/c", "train/d e", "val/d e"))
    save(tmp_path / "elsewhere" / "m.png", labels=labels_of(9))
    file = tmp_path / "list.txt"

    def listed(text, **options):
        file.write_text(text)
        return open_dataset(tmp_path, split_file=file, **options)

    assert stems(listed("c\n\n  a.png \nval/b\nimages/val/d e.png\n")) == ["c", "a", "b", "d e"]
    data = listed("images/val/b.png\telsewhere/m.png\nc")
    assert np.array_equal(data[0][1], labels_of(9))
    assert stems(listed("c\nb", split="val")) == ["c", "b"]
    with pytest.raises(FileNotFoundError, match="1 of its lines name no picture in .*: a"):
        listed("c\na", split="val")
    with pytest.raises(FileNotFoundError, match="2 of its lines name no .*, or several: d e, x"):
        listed("d e\nx\nc")
    with pytest.raises(FileNotFoundError, match="1 of 1 masks are not there: .*none.png"):
        listed("images/val/b.png none.png")
    with pytest.raises(FileNotFoundError, match="absent.txt: cannot be read as a list"):
        open_dataset(tmp_path, split_file=tmp_path / "absent.txt")
    # Pictures and masks in any folders.
    save(tmp_path / "other" / "x" / "p.png")
    save(tmp_path / "other" / "y" / "q.png", labels=labels_of(3))
    file.write_text("x/p.png y/q.png")
    assert np.array_equal(open_dataset(tmp_path / "other", split_file=file)[0][1], labels_of(3))


def test_numbers_of_others(tmp_path):
    save(tmp_path / "images" / "a.png")
    ids = np.resize([7, 8, 33, 0, 255, 34], SIZE)
    save(tmp_path / "masks" / "a.png", labels=ids)
    expected = np.resize([0, 1, 18, 255, 255, 255], SIZE)
    assert np.array_equal(open_dataset(tmp_path, numbers="labelIds")[0][1], expected)
    save(tmp_path / "masks" / "a.png", labels=np.resize([0, 255, 255], SIZE))
    found = open_dataset(tmp_path, numbers="binary")[0][1]
    assert np.array_equal(found, np.resize([0, 1, 1], SIZE))
    with pytest.raises(
        ValueError, match="numbers: expected None or one of labelIds, binary, got 'x'"
    ):
        open_dataset(tmp_path, numbers="x")


@pytest.mark.parametrize(
    ("name", "mode", "dtype"),
    [("a.png", None, np.uint16), ("a.tif", None, np.uint16), ("a.png", "1", np.uint8)],
)
def test_masks_of_other_depths(tmp_path, name, mode, dtype):
    save(tmp_path / "images" / "a.png")
    (tmp_path / "masks").mkdir()
    labels = labels_of(0, 2 if mode else 300)
    image = Image.fromarray(labels.astype(np.uint16))
    if mode:
        image = Image.fromarray(labels.astype(bool))
    image.save(tmp_path / "masks" / name)
    found = open_dataset(tmp_path)[0][1]
    assert np.array_equal(found, labels)
    assert found.dtype == dtype


def test_pictures_are_upright_and_masks_as_stored(tmp_path):
    save(tmp_path / "masks" / "a.png", labels=labels_of(0).T)
    (tmp_path / "images").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", SIZE[::-1]).save(tmp_path / "images" / "a.jpg", exif=exif)
    image, labels = open_dataset(tmp_path)[0]
    assert image.size == SIZE
    assert labels.shape == SIZE[::-1]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "a.png: cannot be read as a picture"),
        (b"no picture", "a.png: cannot be read as a picture"),
        (
            "colours",
            "a.png: expected one label for each pixel.*put the class number of each colour",
        ),
    ],
)
def test_masks_that_cannot_be_read(tmp_path, content, text):
    plain(tmp_path)
    path = tmp_path / "masks" / "a.png"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        save(path)
    data = open_dataset(tmp_path)
    with pytest.raises(ValueError, match=text) as error:
        list(data)
    assert str(error.value).count(str(path)) == 1


def test_pictures_that_cannot_be_read(tmp_path):
    plain(tmp_path)
    (tmp_path / "images" / "b.png").write_bytes(b"no picture")
    data = iter(open_dataset(tmp_path))
    next(data)
    with pytest.raises(ValueError, match="b.png: cannot be read as a picture"):
        next(data)


def test_names_that_do_not_match(tmp_path):
    for index in range(7):
        save(tmp_path / "images" / f"p{index}.png")
        save(tmp_path / "masks" / f"m{index}.png", labels=labels_of(0))
    with pytest.raises(FileNotFoundError) as error:
        open_dataset(tmp_path)
    told = str(error.value)
    assert "names of pictures and of masks do not match" in told
    assert "p4.png and 2 more" in told
    assert "m4.png and 2 more" in told
    assert "--split-file" in told


def test_masks_that_are_missing_or_too_many(tmp_path):
    plain(tmp_path)
    save(tmp_path / "masks" / "extra.png", labels=labels_of(0))
    assert open_dataset(tmp_path).remarks == ["1 masks have no picture and are left out"]
    (tmp_path / "masks" / "b.png").unlink()
    with pytest.raises(FileNotFoundError, match="1 of 3 masks are not there: .*b.png; make them"):
        open_dataset(tmp_path)


def test_masks_as_jpeg(tmp_path):
    save(tmp_path / "images" / "a.jpg")
    save(tmp_path / "masks" / "a.jpg", labels=labels_of(0))
    with pytest.raises(
        FileNotFoundError, match="a.jpg; files of this kind have lost class numbers"
    ):
        open_dataset(tmp_path)


def test_nothing_of_the_kind(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent: expected a folder"):
        open_dataset(tmp_path / "absent")
    (tmp_path / "photos").mkdir()
    with pytest.raises(FileNotFoundError, match="expected images/ and masks/.*found photos"):
        open_dataset(tmp_path)
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    with pytest.raises(FileNotFoundError, match="found no pictures in images/ and masks/"):
        open_dataset(tmp_path)
    with pytest.raises(ValueError, match="image_column, label_column: .* holds no table"):
        open_dataset(tmp_path, image_column="image")


def test_reading_ahead_is_bounded(tmp_path, monkeypatch):
    """One who stops early has read few of many, and leaves no thread."""
    import threading

    from fastseg.datasets import pictures

    data = open_dataset(plain(tmp_path, [f"p{index:02d}" for index in range(40)]))
    read = []
    before = threading.active_count()
    original = pictures.read_picture
    monkeypatch.setattr(
        pictures, "read_picture", lambda source, name: read.append(name) or original(source, name)
    )
    iterator = iter(data)
    for _ in range(3):
        next(iterator)
    iterator.close()
    assert len(read) <= 3 + 4
    assert threading.active_count() == before
    assert [stem for stem in stems(data)] == [f"p{index:02d}" for index in range(40)]
