"""Recognise files that cannot be read as images by their first bytes, and suggest a fix."""

import re

HEAD = 4096  # bytes that are enough to tell

CONVERT = "save it as a JPEG or PNG first"
EXPORT = "it is a drawing of lines: export it as a PNG in the size that you want"
DEVELOP = "develop it into a JPEG or TIFF first"
FRAME = "save one of its frames as a PNG first"
UNPACK = "unpack it first"
NOT_PIXELS = "give the image itself"

_ISO = rb"....ftyp(?:%b)"
KINDS: tuple[tuple[bytes, str, str], ...] = (
    (_ISO % b"hei[cxms]|hev[cxms]|mif1|msf1", "a HEIC image", CONVERT),
    (_ISO % b"avi[fs]", "an AVIF image that this build of Pillow cannot read", CONVERT),
    (_ISO % b"crx ", "a camera's raw file", DEVELOP),
    (_ISO % rb"iso.|mp4.|avc1|M4V.|qt  |3g..", "a video", FRAME),
    (rb"\xff\x0a|\0\0\0\x0cJXL ", "a JPEG XL image", CONVERT),
    (rb"BPG\xfb", "a BPG image", CONVERT),
    (rb"v/1\x01", "an OpenEXR image", CONVERT),
    (rb"#\?RADIANCE|#\?RGBE", "a Radiance HDR image", CONVERT),
    (rb"gimp xcf", "a GIMP project", CONVERT),
    (rb"SIMPLE  =", "a FITS image", CONVERT),
    (rb"II\*\0....CR|FUJIFILMCCD-RAW|IIU\0|II[RT][OS]|MMOR", "a camera's raw file", DEVELOP),
    (rb"\x1aE\xdf\xa3|RIFF....AVI ", "a video", FRAME),
    (rb"%PDF-", "a PDF", EXPORT),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "a PostScript file", EXPORT),
    (rb"\s*<!doctype html|\s*<html", "a web page, not an image", NOT_PIXELS),
    (rb"\s*<(?:(?:\?xml|!--|!DOCTYPE svg)[^\0]*?<)?svg[\s>]", "an SVG image", EXPORT),
    (rb"version https://git-lfs", "a Git LFS pointer, not the image", "fetch it: git lfs pull"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd", "a compressed file", UNPACK),
    (rb"PK\x03\x04|7z\xbc\xaf|Rar!", "an archive", UNPACK),
)


def describe(head: bytes) -> tuple[str, str] | None:
    """Return what a file is and what to do, as parts of sentences; None if it is unknown.

    `head` is the first HEAD bytes of a file that Pillow does not recognise.
    """
    start = head.removeprefix(b"\xef\xbb\xbf")
    for pattern, name, hint in KINDS:
        if re.match(pattern, start, re.DOTALL | re.IGNORECASE):
            if name == "a HEIC image" and b"avif" in head[:64]:
                continue
            return name, hint
    return None
