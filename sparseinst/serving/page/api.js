// Talk to the service that this page came from.

const MAX_TRIES = 20;

/** Return the JSON of an endpoint; throw an Error with the service's line where it answers with one. */
export async function getJson(path) {
  const response = await reached(fetch(path));
  return body(response);
}

/**
 * Predict an image (a Blob). Wait and try again while the service is busy or its model is loading. An answer without
 * Retry-After is final: the prediction itself failed or took too long.
 */
export async function predict(image, { threshold, maps = false, signal }) {
  const response = await post(`predict?threshold=${threshold}&maps=${maps}`, image, signal);
  return body(response);
}

/** Return a JPEG (a Blob) of an image of a format that the browser does not read. */
export async function readable(image, signal) {
  const response = await post("draw?instances=false", image, signal);
  return response.ok ? response.blob() : body(response);
}

async function post(path, image, signal) {
  const options = { method: "POST", body: image, headers: { "Content-Type": "application/octet-stream" }, signal };
  for (let tries = 1; ; tries++) {
    const response = await reached(fetch(path, options));
    const seconds = Number(response.headers.get("Retry-After"));
    if (![429, 503].includes(response.status) || !seconds || tries === MAX_TRIES) return response;
    await new Promise((resolve) => setTimeout(resolve, 1000 * seconds * (0.5 + Math.random())));
    signal?.throwIfAborted();
  }
}

async function reached(request) {
  try {
    return await request;
  } catch (error) {
    throw error.name === "AbortError" ? error : new Error("The service cannot be reached. Is it still running?");
  }
}

async function body(response) {
  const content = await response.json().catch(() => ({ error: `The service answered ${response.status}` }));
  if (!response.ok) throw new Error(content.error);
  return content;
}
