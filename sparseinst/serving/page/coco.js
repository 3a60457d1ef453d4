// Write what is shown as a COCO json, and download files.

import { area, parseCounts } from "./rle.js";

/**
 * Return a COCO json in the instances format.
 *
 * opened: [{name, prediction, instances}], instances those that are shown. categories: of the service's metadata.
 */
export function cocoJson(opened, categories) {
  const images = opened.map(({ name, prediction }, index) => ({
    id: index + 1,
    file_name: name,
    width: prediction.image.width,
    height: prediction.image.height,
  }));
  const annotations = opened
    .flatMap(({ instances }, index) => instances.map((instance) => ({ instance, image_id: index + 1 })))
    .map(({ instance, image_id }, index) => ({
      id: index + 1,
      image_id,
      category_id: instance.category_id,
      bbox: instance.bbox,
      area: area(parseCounts(instance.segmentation.counts)),
      iscrowd: 0,
      score: instance.score,
      segmentation: instance.segmentation,
    }));
  return { images, annotations, categories };
}

/** Save a Blob as a file of this name. */
export function download(blob, name) {
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
