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

/** Return the number of a mask's pixels from the lengths of its runs. */
export function area(counts) {
  return counts.reduce((sum, count, index) => sum + (index % 2 ? count : 0), 0);
}

/** Return whether a mask with these lengths of runs and this height covers a pixel. */
export function covers(counts, rows, column, row) {
  if (row < 0 || row >= rows) return false;
  let left = column * rows + row;
  return counts.findIndex((count) => (left -= count) < 0) % 2 === 1;
}

/**
 * Decode a mask, reduced by a scale of at most 1 (nearest pixels).
 *
 * rle: {size: [height, width], counts: string}.
 * Return {left, top, width, height, pixels}: the window of the reduced mask around its ones, and pixels a Uint8Array of
 * 0 and 1 row by row.
 */
export function decodeMask(rle, scale) {
  const rows = rle.size[0];
  // The first reduced pixel whose center is at or beyond an edge between source pixels.
  const reduced = (edge) => Math.max(0, Math.ceil(edge * scale - 0.5));
  const runs = columnRuns(parseCounts(rle.counts), rows);
  // Not the box of the instance: YOLACT's can be smaller than its mask.
  const box = { left: Infinity, top: Infinity, right: 0, bottom: 0 };
  for (const { column, start, stop } of runs) {
    box.left = Math.min(box.left, column);
    box.top = Math.min(box.top, start);
    box.right = Math.max(box.right, column + 1);
    box.bottom = Math.max(box.bottom, stop);
  }
  if (!runs.length) return { left: 0, top: 0, width: 0, height: 0, pixels: new Uint8Array(0) };
  const [left, top] = [reduced(box.left), reduced(box.top)];
  const [width, height] = [reduced(box.right) - left, reduced(box.bottom) - top];
  const pixels = new Uint8Array(width * height);
  for (const { column, start, stop } of runs) {
    const [first, last] = [reduced(start) - top, reduced(stop) - top];
    for (let x = reduced(column) - left; x < reduced(column + 1) - left; x++) {
      for (let y = first; y < last; y++) pixels[y * width + x] = 1;
    }
  }
  return { left, top, width, height, pixels };
}

/** Return the runs of ones, cut at the ends of the columns: their column, first row and the row behind the last. */
function columnRuns(counts, rows) {
  const runs = [];
  let position = 0;
  counts.forEach((count, index) => {
    const end = position + count;
    while (index % 2 === 1 && position < end) {
      const column = Math.floor(position / rows);
      const stop = Math.min(end, (column + 1) * rows);
      runs.push({ column, start: position - column * rows, stop: stop - column * rows });
      position = stop;
    }
    position = end;
  });
  return runs;
}
