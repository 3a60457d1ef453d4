"""The augmentations of SSD (arXiv 1512.02325, section 2.2), with which YOLACT trains: colors, expansion, crop."""

from collections.abc import Callable, Sequence

import numpy as np
from detectron2.data import transforms as T
from detectron2.structures import Boxes, pairwise_iou

# Least IoU of the crop's options, one of which is drawn; None: the whole image, 0: any crop.
_CROP_OPTIONS = (None, 0.1, 0.3, 0.7, 0.9, 0.0)
_CROP_TRIES = 50
_SMALLEST_CROP = 0.3
_LARGEST_EXPANSION = 4.0
_IMAGENET_MEAN_RGB = (123.68, 116.78, 103.94)


def ssd_augmentations(image_format: str, check_iou: bool) -> list[T.Augmentation]:
    """Return the augmentations before the flip. Images become float32; their values are not clipped.

    Args:
        image_format: channel order of the images, "RGB" or "BGR".
        check_iou: see `SSDCrop`.

    Raises:
        ImportError: OpenCV is not installed.
    """
    mean = _IMAGENET_MEAN_RGB if image_format == "RGB" else _IMAGENET_MEAN_RGB[::-1]
    return [SSDColors(image_format), T.RandomApply(Expand(mean), prob=0.5), SSDCrop(check_iou)]


def to_float(image: np.ndarray) -> np.ndarray:
    """Return an image as float32."""
    return image.astype(np.float32)


class SSDColors(T.Augmentation):
    """Change brightness, contrast, saturation and hue, each with probability 0.5.

    Args:
        image_format: channel order of the images, "RGB" or "BGR".

    Raises:
        ImportError: OpenCV is not installed.
    """

    def __init__(self, image_format: str) -> None:
        super().__init__()
        self.image_format = image_format
        try:
            import cv2
        except ImportError as error:
            raise ImportError(
                f"INPUT.SSD.ENABLED needs OpenCV, which cannot be imported ({error}). Install it: "
                "pip install 'sparseinst[headless]', or pip install opencv-python-headless"
            ) from error
        self._to_hsv, self._from_hsv = (
            (cv2.COLOR_RGB2HSV, cv2.COLOR_HSV2RGB) if image_format == "RGB" else (cv2.COLOR_BGR2HSV, cv2.COLOR_HSV2BGR)
        )

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """Draw the changes."""
        brightness = np.random.uniform(-32, 32) if _coin() else 0.0
        # Contrast before or after the colors.
        is_early = _coin()
        contrast = np.random.uniform(0.5, 1.5) if _coin() else 1.0
        saturation = np.random.uniform(0.5, 1.5) if _coin() else 1.0
        hue = np.random.uniform(-18, 18) if _coin() else 0.0
        early, late = (contrast, 1.0) if is_early else (1.0, contrast)
        return T.ColorTransform(self._changed(brightness, early, saturation, hue, late))

    def _changed(
        self, brightness: float, early: float, saturation: float, hue: float, late: float
    ) -> Callable[[np.ndarray], np.ndarray]:
        import cv2

        def change(image: np.ndarray) -> np.ndarray:
            image = (to_float(image) + np.float32(brightness)) * np.float32(early)
            # Of float32 images OpenCV's hue is in degrees, and no value is clipped.
            hsv = cv2.cvtColor(image, self._to_hsv)
            hsv[..., 0] = (hsv[..., 0] + np.float32(hue)) % 360
            hsv[..., 1] *= np.float32(saturation)
            return cv2.cvtColor(hsv, self._from_hsv) * np.float32(late)

        return change


class PadWithColor(T.PadTransform):
    """Pad the image with a color, and masks with 0.

    Args:
        x0, y0, x1, y1: pixels on each side.
        color: of each channel.
    """

    def __init__(self, x0: int, y0: int, x1: int, y1: int, color: Sequence[float]) -> None:
        super().__init__(x0, y0, x1, y1)
        self.color = color

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """Return the padded image (height, width, channels)."""
        height, width = img.shape[:2]
        padded = np.empty((self.y0 + height + self.y1, self.x0 + width + self.x1, img.shape[2]), img.dtype)
        padded[:] = self.color
        padded[self.y0 : self.y0 + height, self.x0 : self.x0 + width] = img
        return padded


class Expand(T.Augmentation):
    """Put the image at a random position on a canvas up to four times as wide and high.

    Args:
        color: of the canvas, one value for each channel.
    """

    def __init__(self, color: Sequence[float]) -> None:
        super().__init__()
        self.color = color

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """Draw the canvas and the position."""
        ratio = np.random.uniform(1, _LARGEST_EXPANSION)
        height, width = image.shape[:2]
        more_x, more_y = int(width * ratio) - width, int(height * ratio) - height
        left, top = (int(np.random.uniform(0, more)) for more in (more_x, more_y))
        return PadWithColor(left, top, more_x - left, more_y - top, self.color)


class SSDCrop(T.Augmentation):
    """Crop to a window with the center of an object, or keep the image.

    The mode is drawn from six: the image as it is, a window whose IoU with an object is at least 0.1, 0.3, 0.7 or 0.9,
    or any window. Sides are 0.3 to 1 of the image's, with a ratio of 0.5 to 2. A mode that fails 50 times is drawn
    anew. The augmentation's input needs ``boxes`` (n, 4) x0, y0, x1, y1 and ``is_crowd`` (n,) bool.

    Args:
        check_iou: False ignores the IoU, as the published code of YOLACT does; its author says that the check halved
            AP early in the training.
    """

    def __init__(self, check_iou: bool = False) -> None:
        super().__init__()
        self.check_iou = check_iou

    def get_transform(self, image: np.ndarray, boxes: np.ndarray, is_crowd: np.ndarray) -> T.Transform:
        """Draw a window."""
        boxes = boxes[~is_crowd & np.isfinite(boxes).all(1)]
        while len(boxes):
            least_iou = _CROP_OPTIONS[np.random.randint(len(_CROP_OPTIONS))]
            if least_iou is None:
                break
            for _ in range(_CROP_TRIES):
                window = _draw_window(image.shape[:2])
                if window is not None and self._is_accepted(window, boxes, least_iou):
                    left, top, right, bottom = window
                    return T.CropTransform(left, top, right - left, bottom - top)
        return T.NoOpTransform()

    def _is_accepted(self, window: tuple[int, int, int, int], boxes: np.ndarray, least_iou: float) -> bool:
        x, y = (boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2
        left, top, right, bottom = window
        if not ((left < x) & (x < right) & (top < y) & (y < bottom)).any():
            return False
        return not self.check_iou or bool((pairwise_iou(Boxes([window]), Boxes(boxes)) >= least_iou).any())


def _draw_window(size: tuple[int, int]) -> tuple[int, int, int, int] | None:
    """Return left, top, right and bottom in pixels; None where the sides' ratio is out of range."""
    height, width = size
    crop_width = np.random.uniform(_SMALLEST_CROP * width, width)
    crop_height = np.random.uniform(_SMALLEST_CROP * height, height)
    if not 0.5 <= crop_height / crop_width <= 2:
        return None
    # The published code draws positions from pixel 1 on.
    left, top = (int(np.random.uniform(min(1, most), most)) for most in (width - crop_width, height - crop_height))
    right, bottom = int(left + crop_width), int(top + crop_height)
    return (left, top, right, bottom) if right > left and bottom > top else None


def _coin() -> bool:
    return np.random.uniform() < 0.5
