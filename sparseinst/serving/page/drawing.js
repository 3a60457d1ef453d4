// Draw an image and its instances on a canvas.

import { area, covers, decodeMask, parseCounts } from "./rle.js";

const FILL = 0.42;
const DIMMED = 0.4;
// Thickness of an outline: the long side of the drawing divided by this.
const SIDE_PER_BORDER = 380;
// The boxes and names of more instances would hide the image.
export const MAX_LABELS = 40;
const FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, sans-serif';

/**
 * An image with its instances at a fixed size, from which views are drawn quickly.
 *
 * image: drawable, of any size. prediction: answer of the service; null before it. palette: CSS colors by rank.
 * longSide: of the drawing, in pixels.
 */
export class Drawing {
  constructor(image, prediction, palette, longSide) {
    const width = prediction?.image.width ?? image.naturalWidth;
    const height = prediction?.image.height ?? image.naturalHeight;
    this.scale = longSide / Math.max(width, height);
    this.width = Math.max(1, Math.round(width * this.scale));
    this.height = Math.max(1, Math.round(height * this.scale));
    this.image = image;
    this.instances = (prediction?.instances ?? []).map((instance, rank) => ({
      ...instance,
      rank,
      color: palette[rank % palette.length],
      counts: parseCounts(instance.segmentation.counts),
    }));
    this.masks = new Map();
  }

  /** Return the smallest of these instances that covers a point of the drawing, or undefined. */
  at(x, y, instances) {
    const [column, row] = [Math.floor(x / this.scale), Math.floor(y / this.scale)];
    return instances
      .filter(({ counts, segmentation }) => covers(counts, segmentation.size[0], column, row))
      .sort((a, b) => area(a.counts) - area(b.counts))[0];
  }

  /**
   * Draw on a canvas, which gets this drawing's size.
   *
   * instances: those that are shown. active: the one that stands out, or undefined. show: {masks, boxes, names}.
   * heat: {height, width, levels} of an activation map over the image, or null. unit: pixels of the drawing for one
   * CSS pixel of the screen. milliseconds: stop painting masks after this time, and cache them for the next call; by
   * default all are painted and none is cached. Return whether all masks are drawn.
   */
  draw(canvas, { instances, active, show, heat = null, unit = 1, milliseconds = Infinity }) {
    if (canvas.width !== this.width || canvas.height !== this.height) {
      Object.assign(canvas, { width: this.width, height: this.height });
    }
    const context = canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.clearRect(0, 0, this.width, this.height);
    context.drawImage(this.image, 0, 0, this.width, this.height);
    if (heat) {
      context.fillStyle = "rgb(12 14 24 / 62%)";
      context.fillRect(0, 0, this.width, this.height);
      drawHeat(context, heat, this.width, this.height);
    }
    // Largest first, so that small instances stay visible.
    const ordered = [...instances].sort((a, b) => b.bbox[2] * b.bbox[3] - a.bbox[2] * a.bbox[3]);
    const visible = heat ? ordered.filter((instance) => instance === active) : ordered;
    const budget = { left: milliseconds };
    let isComplete = true;
    for (const instance of visible) {
      context.globalAlpha = active && instance !== active ? DIMMED : 1;
      if (show.masks || instance === active) {
        isComplete = this.#drawMask(context, instance, heat ? 0 : FILL, budget) && isComplete;
      }
      if (show.boxes && (ordered.length <= MAX_LABELS || instance === active)) this.#drawBox(context, instance, unit);
    }
    context.globalAlpha = 1;
    const named = show.names && !heat && ordered.length <= MAX_LABELS ? ordered : [];
    const labels = active ? [...named.filter((instance) => instance !== active), active] : named;
    this.#drawLabels(context, labels, active, unit);
    return isComplete;
  }

  /** Draw a mask, from the cache or while the budget lasts, and return whether it is drawn. */
  #drawMask(context, instance, opacity, budget) {
    const isCached = opacity === FILL && budget.left < Infinity;
    let painted = isCached && this.masks.get(instance.rank);
    if (!painted) {
      if (budget.left <= 0) return false;
      const start = performance.now();
      painted = this.#paint(instance, opacity);
      budget.left -= performance.now() - start;
      if (isCached) this.masks.set(instance.rank, painted);
    }
    const { left, top, canvas } = painted;
    if (canvas) context.drawImage(canvas, left, top);
    // Free its memory now: the garbage collector comes after several hundred megabytes.
    if (canvas && !isCached) canvas.width = 0;
    return true;
  }

  /** Return an instance's mask on a canvas, with the position of the canvas in this drawing; null where it is empty. */
  #paint(instance, opacity) {
    const border = Math.max(2, Math.round(Math.max(this.width, this.height) / SIDE_PER_BORDER));
    const reduced = decodeMask(instance.segmentation, Math.min(this.scale, 1));
    const mask = this.scale > 1 ? enlarged(reduced, this.scale) : reduced;
    const { left, top, width, height } = mask;
    return { left, top, canvas: width && height ? asCanvas(colored(mask, instance.color, opacity, border)) : null };
  }

  #drawBox(context, { bbox, color }, unit) {
    context.strokeStyle = color;
    context.lineWidth = 1.5 * unit;
    context.strokeRect(...bbox.map((side) => side * this.scale));
  }

  #drawLabels(context, instances, active, unit) {
    const size = 12.5 * unit;
    const height = size * 1.6;
    const taken = [];
    context.font = `600 ${size}px ${FONT}`;
    context.textBaseline = "middle";
    for (const instance of instances) {
      const text = `${instance.category_name}  ${Math.round(instance.score * 100)}%`;
      const width = context.measureText(text).width + size * 1.75;
      const [left, top, boxWidth] = instance.bbox.map((side) => side * this.scale);
      const x = clamp(left + boxWidth / 2 - width / 2, 0, this.width - width);
      let y = clamp(top - height - 2 * unit, 0, this.height - height);
      for (let moves = 0; moves < 6; moves++) {
        const other = taken.find((box) => x < box.x + box.width && box.x < x + width && Math.abs(box.y - y) < height);
        if (!other || other.y + 2 * height > this.height) break;
        y = other.y + height + unit;
      }
      taken.push({ x, y, width });
      context.globalAlpha = active && instance !== active ? DIMMED : 1;
      context.fillStyle = "rgb(16 20 26 / 82%)";
      context.beginPath();
      context.roundRect(x, y, width, height, height / 2);
      context.fill();
      context.fillStyle = instance.color;
      context.beginPath();
      context.arc(x + size * 0.8, y + height / 2, size * 0.26, 0, 2 * Math.PI);
      context.fill();
      context.fillStyle = "#fff";
      context.fillText(text, x + size * 1.3, y + height / 2 + size * 0.05);
    }
    context.globalAlpha = 1;
  }
}

/** Return the levels of an activation map, 0 to 255, row by row, from its base64. */
export function decodeLevels(base64) {
  return Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
}

function clamp(value, least, most) {
  return Math.max(least, Math.min(value, most));
}

/** Enlarge a mask; its outline is that of the interpolated mask, as in the drawings of the package. */
function enlarged(mask, scale) {
  if (!mask.width || !mask.height) return mask;
  // A margin lets the outline fade to zero around the window.
  const source = new ImageData(mask.width + 2, mask.height + 2);
  for (let y = 0; y < mask.height; y++) {
    for (let x = 0; x < mask.width; x++) {
      source.data[4 * ((y + 1) * source.width + x + 1) + 3] = 255 * mask.pixels[y * mask.width + x];
    }
  }
  const left = Math.round(mask.left * scale);
  const top = Math.round(mask.top * scale);
  const width = Math.round((mask.left + mask.width) * scale) - left;
  const height = Math.round((mask.top + mask.height) * scale) - top;
  const context = newCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.drawImage(asCanvas(source), -scale, -scale, source.width * scale, source.height * scale);
  const { data } = context.getImageData(0, 0, width, height);
  const pixels = new Uint8Array(width * height);
  for (let index = 0; index < pixels.length; index++) pixels[index] = data[4 * index + 3] >= 128 ? 1 : 0;
  return { left, top, width, height, pixels };
}

/** Return the pixels of a mask's fill of this opacity and of its outline. */
function colored({ width, height, pixels }, color, opacity, border) {
  const channels = [1, 3, 5].map((at) => parseInt(color.slice(at, at + 2), 16));
  const [fill, outline] = [opacity, 1].map(
    (alpha) => new Uint32Array(Uint8ClampedArray.of(...channels, 255 * alpha).buffer)[0],
  );
  const result = new ImageData(width, height);
  const colors = new Uint32Array(result.data.buffer);
  for (let y = 0, index = 0; y < height; y++) {
    for (let x = 0; x < width; x++, index++) {
      if (!pixels[index]) continue;
      const isInner = x >= border && y >= border && x < width - border && y < height - border
        && pixels[index - border] && pixels[index + border]
        && pixels[index - border * width] && pixels[index + border * width];
      colors[index] = isInner ? fill : outline;
    }
  }
  return result;
}

function drawHeat(context, { height, width, levels }, toWidth, toHeight) {
  const colors = new ImageData(width, height);
  levels.forEach((level, index) => colors.data.set(heatColor(level / 255), 4 * index));
  context.drawImage(asCanvas(colors), 0, 0, toWidth, toHeight);
}

/** Return red, green, blue, alpha of a value in [0, 1]: transparent, violet, orange, light yellow. */
function heatColor(value) {
  const stops = [[60, 30, 120, 0], [150, 40, 140, 120], [245, 125, 60, 190], [255, 245, 170, 235]];
  const at = Math.min(value * 3, 2.999);
  const [low, share] = [Math.floor(at), at % 1];
  return stops[low].map((part, channel) => part + (stops[low + 1][channel] - part) * share);
}

function asCanvas(pixels) {
  const canvas = newCanvas(pixels.width, pixels.height);
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  return canvas;
}

function newCanvas(width, height) {
  return Object.assign(document.createElement("canvas"), { width, height });
}
