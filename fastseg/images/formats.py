"""Formats of pictures: those that folders are searched for, and those that cannot be read."""

from __future__ import annotations

from PIL import Image

# Formats that hold photographs and that Pillow reads. Folders are searched for these.
IMAGE_SUFFIXES = {
    *(".apng", ".avif", ".bmp", ".dib", ".gif", ".j2c", ".j2k", ".jfif", ".jp2", ".jpc", ".jpe"),
    *(".jpeg", ".jpf", ".jpg", ".jpx", ".mpo", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga"),
    *(".tif", ".tiff", ".webp"),
}

RAW = "a camera's raw file"
HEIF = "HEIF"
# What pillow-heif, which is optional, reads.
HEIF_SUFFIXES = {".heic", ".heics", ".heif", ".heifs", ".hif"}
# Formats that hold photographs and that Pillow does not read.
UNREADABLE = {
    **dict.fromkeys(HEIF_SUFFIXES, HEIF),
    ".avci": "HEIF of H.264",
    **dict.fromkeys([".jxr", ".wdp"], "JPEG XR"),
    ".exr": "OpenEXR",
    ".jxl": "JPEG XL",
    **dict.fromkeys([".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf"], RAW),
    **dict.fromkeys([".iiq", ".kdc", ".mef", ".mos", ".mrw", ".nef", ".nrw", ".orf"], RAW),
    **dict.fromkeys([".pef", ".raf", ".rw2", ".rwl", ".sr2", ".srf", ".srw", ".x3f"], RAW),
}
# Many raw files are TIFFs, of which Pillow would give the thumbnail.
RAW_SUFFIXES = {suffix for suffix, name in UNREADABLE.items() if name == RAW}

CONVERT = "convert to JPEG, PNG or TIFF first"
INSTALL_HEIF = "for HEIF `pip install pillow-heif`"

# First bytes, of what people take for pictures: where they are, and what the file is.
_CONTENTS = [
    *((4, b"ftyp" + brand, HEIF) for brand in (b"hei", b"hev", b"mif1", b"msf1")),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\0\0\0\x0cJXL ", "JPEG XL"),
    (0, b"%PDF", "PDF"),
    (0, b"<svg", "SVG"),
    (0, b"<?xml", "XML, maybe SVG"),
]
_NO_PICTURES = [
    (b"version https://git-lfs", "a Git LFS pointer and not the picture: run `git lfs pull`"),
    (b"<!doctype html", "a web page and not a picture"),
    (b"<html", "a web page and not a picture"),
]


def why_unreadable(start: bytes, suffix: str) -> str:
    """Why Pillow knows nothing of a file: what it is by its first 64 bytes, or by its suffix."""
    if not start:
        return "an empty file"
    for beginning, what in _NO_PICTURES:
        if start.lstrip().lower().startswith(beginning):
            return what
    for place, beginning, name in _CONTENTS:
        if start[place:].startswith(beginning):
            return cannot_read(name)
    return cannot_read(UNREADABLE[suffix]) if suffix in UNREADABLE else "no image that Pillow knows"


def cannot_read(name: str) -> str:
    if name == HEIF and not heif_is_readable():
        return f"{name}, which fastseg cannot read: {CONVERT}, or {INSTALL_HEIF}"
    return f"{name}, which fastseg cannot read: {CONVERT}"


def heif_is_readable() -> bool:
    """Return whether Pillow reads HEIF: it does where pillow-heif is installed."""
    if HEIF not in Image.OPEN:
        try:
            import pillow_heif
        except ImportError:
            return False
        pillow_heif.register_heif_opener()
    return True


def is_searched_for(suffix: str) -> bool:
    """Return whether files of a suffix, in lower case, are pictures to find in folders."""
    return suffix in IMAGE_SUFFIXES or (suffix in HEIF_SUFFIXES and heif_is_readable())
