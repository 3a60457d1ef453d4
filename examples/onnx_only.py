"""Run an exported SparseInst with numpy, onnxruntime and opencv alone: no PyTorch, no Detectron2, no sparseinst.

    sparseinst export --config-file CONFIG --format onnx --output out MODEL.WEIGHTS model_final.pth
    python examples/onnx_only.py out/model.onnx photo.jpg --threshold 0.4 --draw drawn.png

`sparseinst.inference.Predictor` returns the same detections. Print one line of JSON for each.
"""

import argparse
import json

import cv2
import numpy as np
import onnxruntime

BITS = 22  # of the fractions of Pillow's coefficients


class Model:
    """Run an exported file as its metadata describes: images, classes, thresholds."""

    def __init__(self, path: str) -> None:
        try:
            self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        except Exception as error:  # those of onnxruntime have no common class
            raise SystemExit(f"error: {' '.join(str(error).split())}") from error
        self.metadata = json.loads(self.session.get_modelmeta().custom_metadata_map.get("sparseinst", "{}"))
        if self.metadata.get("meta_architecture") != "SparseInst" or self.metadata["max_detections"]:
            raise SystemExit(f"error: {path}: expected a SparseInst of `sparseinst export` without --end-to-end")

    def detect(self, image_bgr: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return scores (n,), classes (n,), boxes (n, 4) and masks (n, height, width) bool, best first."""
        image = image_bgr if self.metadata["channel_order"] == "BGR" else image_bgr[:, :, ::-1]
        resized = resize_as_pillow(image, self.network_size(*image.shape[:2]))
        padded = self.normalize_and_pad(resized)
        results = self.session.run(self.metadata["outputs"], {"images": padded})
        first = {name: result[0] for name, result in zip(self.metadata["outputs"], results)}
        return self.postprocess(first, padded.shape[2:], resized.shape[:2], image.shape[:2])

    def network_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the size that an image is resized to."""
        if fit_size := self.metadata.get("fit_size") or self.metadata["size"]:  # earlier versions wrote no fit_size
            fits = list(zip(fit_size, (height, width)))
            scale = min(most / side for most, side in fits)
            return tuple(max(1, min(most, round(scale * side))) for most, side in fits)
        if (short := self.metadata["short_side"]) == 0:
            return height, width
        long = self.metadata["long_side"]
        scale = short / min(height, width)
        new_height, new_width = (short, scale * width) if height < width else (scale * height, short)
        if max(new_height, new_width) > long:
            scale = long / max(new_height, new_width)
            new_height, new_width = new_height * scale, new_width * scale
        return max(1, int(new_height + 0.5)), max(1, int(new_width + 0.5))

    def normalize_and_pad(self, image: np.ndarray) -> np.ndarray:
        """Return (1, 3, h, w) as the network takes it."""
        mean, std = (np.array(self.metadata[key], np.float32) for key in ("pixel_mean", "pixel_std"))
        multiple, least = self.metadata["size_divisibility"], self.metadata.get("min_side", 0)
        sides = (-(-max(side, least) // multiple) * multiple for side in image.shape[:2])
        height, width = self.metadata["size"] or sides
        padding, pixels = np.zeros(3, np.float32), (image - mean) / std
        if self.metadata["input"] == "image":
            padding, pixels = np.round(mean).astype(np.uint8), image
        padded = np.tile(padding, (height, width, 1))
        padded[: image.shape[0], : image.shape[1]] = pixels
        return np.ascontiguousarray(np.repeat(padded.transpose(2, 0, 1)[None], self.metadata["batch"] or 1, axis=0))

    def postprocess(self, outputs, padded_size, image_size, output_size):
        """Score, select, rescore by maskness, sort and resize."""
        options = self.metadata["postprocessing"]
        class_probs = sigmoid(outputs["pred_logits"])
        classes = class_probs.argmax(1)
        scores = np.sqrt(class_probs.max(1) * sigmoid(outputs["pred_scores"][:, 0]))
        kept = scores > max(options["cls_threshold"], options["score_threshold"])
        scores, classes, probs = scores[kept], classes[kept], sigmoid(outputs["pred_masks"][kept])
        above = probs > options["mask_threshold"]
        scores = scores * (probs * above).sum((1, 2)) / (above.sum((1, 2)) + 1e-6)
        order = np.argsort(-scores, kind="stable")
        order = order[scores[order] > options["score_threshold"]]
        if options["mask_nms_threshold"] > 0:
            order = order[mask_nms(above[order], classes[order], options["mask_nms_threshold"])]
        masks, boxes, found = [], [], []
        for index in order[: options["max_detections"]]:
            whole = cv2.resize(probs[index], padded_size[::-1], interpolation=cv2.INTER_LINEAR)
            whole = whole[: image_size[0], : image_size[1]]
            mask = cv2.resize(whole, output_size[::-1], interpolation=cv2.INTER_LINEAR) > options["mask_threshold"]
            if mask.any():
                rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
                masks.append(mask)
                boxes.append([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
                found.append(index)
        boxes, masks = np.array(boxes, float).reshape(-1, 4), np.array(masks, bool).reshape(-1, *output_size)
        return scores[found], classes[found], boxes, masks


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))


def mask_nms(masks: np.ndarray, classes: np.ndarray, threshold: float) -> list[int]:
    """Return the indices of the masks, best first, that overlap no better remaining mask of their class."""
    kept = []
    for index, mask in enumerate(masks):
        rivals = [masks[other] for other in kept if classes[other] == classes[index]]
        if not any((rival & mask).sum() > threshold * (rival | mask).sum() for rival in rivals):
            kept.append(index)
    return kept


def resize_as_pillow(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize (height, width, 3) uint8 bilinearly with antialiasing, bit for bit as Pillow: first rows, then columns."""
    for axis in (1, 0):
        if size[axis] != image.shape[axis]:
            weights = resize_weights(image.shape[axis], size[axis])
            sums = np.tensordot(weights, image.astype(np.float64), (1, axis))  # exact: whole, below 2 ** 53
            resized = np.clip((np.moveaxis(sums, 0, axis).astype(np.int64) + (1 << (BITS - 1))) >> BITS, 0, 255)
            image = resized.astype(np.uint8)
    return image


def resize_weights(old: int, new: int) -> np.ndarray:
    """Return (new, old): Pillow's fixed-point coefficients of its triangle filter."""
    scale = old / new
    support = max(scale, 1.0)
    weights = np.zeros((new, old))
    for index, center in enumerate(scale * (np.arange(new) + 0.5)):
        pixels = np.arange(max(int(center - support + 0.5), 0), min(int(center + support + 0.5), old))
        row = np.maximum(1 - np.abs((pixels - center + 0.5) / support), 0)
        weights[index, pixels] = np.floor(row / row.sum() * (1 << BITS) + 0.5)
    return weights


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model"), parser.add_argument("image")
    parser.add_argument("--threshold", type=float, default=0.4, help="lowest score that is shown (default 0.4)")
    parser.add_argument("--draw", help="file to write the image with masks to")
    args = parser.parse_args()
    if (photo := cv2.imread(args.image)) is None:
        raise SystemExit(f"error: {args.image} cannot be read as an image")
    model = Model(args.model)
    for score, label, box, mask in zip(*model.detect(photo)):
        if score >= args.threshold:
            found = {"class": model.metadata["class_names"][label], "score": float(score), "box": box.tolist()}
            print(json.dumps({**found, "area": int(mask.sum())}))
            photo[mask] = photo[mask] // 2 + np.array([0, 100, 0], np.uint8)
    if args.draw:
        cv2.imwrite(args.draw, photo)
