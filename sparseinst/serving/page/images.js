// Read images in the browser.

import { readable } from "./api.js";

/** Return the image of an opened file. The service converts a format that the browser does not read. */
export async function loaded(entry, signal) {
  const image = await decoded(entry.url).catch(() => null);
  if (image) return image;
  URL.revokeObjectURL(entry.url);
  entry.url = URL.createObjectURL(await readable(entry.blob, signal));
  return decoded(entry.url);
}

async function decoded(url) {
  const image = new Image();
  image.src = url;
  await image.decode();
  return image;
}
