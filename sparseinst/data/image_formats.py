"""List the image formats that are read; `read_image`, folders and ``--help`` share this list.

Pillow's other formats are left out: EPS starts Ghostscript; ICO, ICNS and BLP hold a second image, whose size the
header does not declare; the rest does not hold photographs.
"""

# Pillow's name of each format, and the suffixes of its files.
FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"),
    "BMP": (".bmp",),
    "DIB": (".dib",),
    "GIF": (".gif",),
    "AVIF": (".avif", ".avifs"),
    "MPO": (".mpo",),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "QOI": (".qoi",),
    "SGI": (".sgi", ".rgb", ".rgba", ".bw"),
    "SUN": (".ras", ".sr"),
    "PCX": (".pcx",),
    # TGA has no signature, so it is tried last.
    "TGA": (".tga", ".icb", ".vda", ".vst"),
}
IMAGE_SUFFIXES = tuple(sorted(suffix for suffixes in FORMATS.values() for suffix in suffixes))
# Images that other programs read; a folder's files with these suffixes are named, and not read.
UNREAD_SUFFIXES = (
    ".arw", ".cr2", ".cr3", ".dcm", ".dds", ".dng", ".emf", ".eps", ".exr", ".fits", ".hdr", ".heic", ".heif", ".icns",
    ".ico", ".jxl", ".nef", ".pcd", ".pfm", ".pic", ".psd", ".svg", ".wmf", ".xcf",
)  # fmt: skip
