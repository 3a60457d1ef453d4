// Take photos with the camera of this machine.

/** Whether this page may open a camera: browsers allow it on localhost and over HTTPS only. */
export function canOpenCamera() {
  return Boolean(navigator.mediaDevices?.getUserMedia);
}

// Number of openings and closings.
let turn = 0;

/**
 * Show the camera in a video element. Return false where it was closed meanwhile; throw an Error with a line for people.
 */
export async function openCamera(video) {
  const own = ++turn;
  try {
    const stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" }, audio: false });
    // The browser may have waited for a permission.
    if (turn !== own) {
      stop(stream);
      return false;
    }
    video.srcObject = stream;
    await video.play();
    return true;
  } catch (error) {
    if (turn !== own) return false;
    const reason = { NotAllowedError: "its use was not allowed", NotFoundError: "none was found" }[error.name];
    throw new Error(`The camera cannot be opened: ${reason ?? error.message}`);
  }
}

/** Return the current image of the video as a JPEG (a Blob). */
export function takePhoto(video) {
  const canvas = Object.assign(document.createElement("canvas"), { width: video.videoWidth, height: video.videoHeight });
  canvas.getContext("2d").drawImage(video, 0, 0);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.95));
}

/** Switch the camera off. */
export function closeCamera(video) {
  turn++;
  stop(video.srcObject);
  video.srcObject = null;
}

function stop(stream) {
  stream?.getTracks().forEach((track) => track.stop());
}
