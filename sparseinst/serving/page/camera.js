// Take photos with the camera of this machine.

/** Whether this page may open a camera: browsers allow it on localhost and over HTTPS only. */
export function canOpenCamera() {
  return Boolean(navigator.mediaDevices?.getUserMedia);
}

/** Show the camera in a video element; throw an Error with a line for people. */
export async function openCamera(video) {
  try {
    video.srcObject = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" }, audio: false });
    await video.play();
  } catch (error) {
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
  video.srcObject?.getTracks().forEach((track) => track.stop());
  video.srcObject = null;
}
