// Decode COCO's compressed run-length encodings.

/** Return the lengths of the runs of a compressed encoding: zeros, ones, zeros, ... down the columns. */
export function parseCounts(text) {
  const counts = [];
  for (let at = 0; at < text.length; ) {
    let value = 0;
    let shift = 0;
    let code;
    do {
      code = text.charCodeAt(at++) - 48;
      value |= (code & 31) << shift;
      shift += 5;
    } while (code & 32);
    // The highest bit of the last group is the sign.
    if (code & 16 && shift < 32) value |= -1 << shift;
    // From the fourth on, each run is stored as the difference from the run before the last.
    counts.push(counts.length > 2 ? value + counts[counts.length - 2] : value);
  }
  return counts;
}

/**
 * Decode a mask, reduced by a scale of at most 1 (nearest pixels).
 *
 * rle: {size: [height, width], counts: string}. bbox: [x, y, width, height] around the mask, in pixels.
 * Return {left, top, width, height, area, pixels}: the window of the reduced mask, pixels a Uint8Array of 0 and 1 row
 * by row, and area the number of pixels of the mask before it was reduced.
 */
export function decodeMask(rle, bbox, scale) {
  const [rows, columns] = rle.size;
  // The first reduced pixel whose center is at or beyond an edge between source pixels.
  const reduced = (edge) => Math.ceil(edge * scale - 0.5);
  const left = Math.max(0, reduced(Math.floor(bbox[0])));
  const top = Math.max(0, reduced(Math.floor(bbox[1])));
  const width = Math.max(0, reduced(Math.min(columns, Math.ceil(bbox[0] + bbox[2]))) - left);
  const height = Math.max(0, reduced(Math.min(rows, Math.ceil(bbox[1] + bbox[3]))) - top);
  const pixels = new Uint8Array(width * height);
  let position = 0;
  let area = 0;
  parseCounts(rle.counts).forEach((count, index) => {
    const end = position + count;
    if (index % 2 === 1) {
      area += count;
      while (position < end) {
        const column = Math.floor(position / rows);
        const stop = Math.min(end, (column + 1) * rows);
        const first = Math.max(reduced(position - column * rows) - top, 0);
        const last = Math.min(reduced(stop - column * rows) - top, height);
        for (let x = Math.max(reduced(column) - left, 0); x < Math.min(reduced(column + 1) - left, width); x++) {
          for (let y = first; y < last; y++) pixels[y * width + x] = 1;
        }
        position = stop;
      }
    }
    position = end;
  });
  return { left, top, width, height, area, pixels };
}
