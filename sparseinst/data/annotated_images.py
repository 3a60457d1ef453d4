"""Find the image of an annotation file by the names of both."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePath, PurePosixPath

from sparseinst.data.image_formats import IMAGE_SUFFIXES
from sparseinst.data.images import read_image_size
from sparseinst.data.other_formats import list_files


class AnnotatedImages:
    """The images of a folder and its subfolders.

    Attributes:
        root: the folder.
        sizes: each image's (height, width), pixels, sorted by the paths.
    """

    def __init__(self, root: Path, max_pixels: int, masks: Path | None = None):
        """Read the images' headers.

        Args:
            root: the folder.
            max_pixels: larger images are refused.
            masks: where it is a subfolder, its images are left out.
        """
        self.root = root
        paths = list_files(root, IMAGE_SUFFIXES)
        if masks is not None:
            paths = _outside(paths, root, masks)
        self.sizes = {path: read_image_size(path, max_pixels) for path in paths}
        self._paths: dict[PurePosixPath, list[Path]] = {}
        for path in paths:
            relative = path.relative_to(root)
            for name in (relative, relative.with_suffix("")):
                for tail in tails(name):
                    self._paths.setdefault(tail, []).append(path)

    def matches(self, names: Iterable[PurePosixPath]) -> list[Path]:
        """Return the images of the first name that an image has."""
        return next((self._paths[name] for name in names if name in self._paths), [])

    def find(self, names: Iterable[PurePosixPath]) -> Path:
        """Return the image with one of the names, the best first. Raise ValueError where no image or several fit."""
        found = self.matches(names := list(names))
        name = str(names[0])[1:]
        if not found:
            raise ValueError(f"the folder {self.root} has no image {name!r}")
        if len(found) > 1:
            raise ValueError(
                f"the image {name!r} may be {found[0]} or {found[1]}: convert each folder of images alone, or rename "
                "the images"
            )
        return found[0]


def tails(name: PurePath) -> Iterator[PurePosixPath]:
    """Yield /a/b, a/b and b: the name below the folder, which must fit whole, then its ends."""
    parts = PurePosixPath("/", name.as_posix()).parts
    yield from (PurePosixPath(*parts[start:]) for start in range(len(parts)))


def file_names(name: PurePath) -> Iterator[PurePosixPath]:
    """Yield each of `tails` with and without its suffix, because the image may have another one."""
    for tail in tails(name):
        yield from (tail, tail.with_suffix(""))


def mask_names(name: PurePath) -> Iterator[PurePosixPath]:
    """Yield the names that a mask a/b_1 gives its image: a/b_1, a/b, a, then b_1 and b.

    The outer folder precedes the file's name, because the masks of one image may be numbered like other images.
    """
    for tail in tails(name):
        yield from (tail, tail.with_name(tail.name.rsplit("_", 1)[0] or tail.name), *list(tail.parents)[:-1])


def _outside(paths: Sequence[Path], root: Path, masks: Path) -> Sequence[Path]:
    """Return the paths below ``root`` without those below its subfolder ``masks``."""
    root_resolved, masks_resolved = root.resolve(), masks.resolve()
    if root_resolved.is_relative_to(masks_resolved):
        return paths
    return [path for path in paths if masks_resolved not in (root_resolved / path.relative_to(root)).parents]
