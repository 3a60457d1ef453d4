// The page: opened images, their predictions, and the shown part of both.

import { getJson, predict } from "./api.js";
import { canOpenCamera, closeCamera, openCamera, takePhoto } from "./camera.js";
import { cocoJson, download } from "./coco.js";
import { Drawing, MAX_LABELS, decodeLevels } from "./drawing.js";
import { loaded } from "./images.js";
import { fillClasses, fillMapNumbers, fillObjects, fillStrip, markActive } from "./panel.js";

// Instances are requested down to the slider's least value, so that moving it needs no new prediction.
const LEAST_SCORE = 0.05;
const SCREEN_SIDES = [1024, 2048];
const MOST_SAVED_SIDE = 4096;
const POLL_MS = 1500;
const PAINT_MS = 60;

const element = (id) => document.getElementById(id);
const canvas = element("canvas");
const video = element("video");
const stage = element("stage");

const state = {
  metadata: null,
  entries: [],
  current: null,
  hovered: undefined,
  selected: undefined,
  hiddenClasses: new Set(),
  mapNumber: 0,
};

// ---------------------------------------------------------------- opened images

function open(blobs) {
  const entries = [...blobs].map((blob) => ({
    blob,
    name: blob.name ?? `photo ${new Date().toISOString().slice(0, 19).replaceAll(":", "-")}.jpg`,
    url: URL.createObjectURL(blob),
    state: "waiting",
    abort: new AbortController(),
  }));
  if (!entries.length) return;
  state.entries.push(...entries);
  showCamera(false);
  select(entries[0]);
  work();
}

let isWorking = false;
/** Predict the opened images one after the other, the current one first. */
async function work() {
  if (isWorking || !state.metadata) return;
  isWorking = true;
  for (;;) {
    const waiting = state.entries.filter((entry) => entry.state === "waiting");
    const entry = waiting.find((candidate) => candidate === state.current) ?? waiting[0];
    if (!entry) break;
    await find(entry);
  }
  isWorking = false;
}

async function find(entry) {
  entry.state = "working";
  entry.error = null;
  update(entry);
  const { signal } = entry.abort;
  try {
    entry.image ??= await loaded(entry, signal);
    update(entry);
    entry.prediction = await predict(entry.blob, { threshold: LEAST_SCORE, signal });
    entry.state = "done";
  } catch (error) {
    entry.state = "failed";
    entry.error = error.message;
  }
  entry.drawing = null;
  update(entry);
}

/** Request the activation maps of an image, once. */
async function findMaps(entry) {
  if (entry.maps || entry.state !== "done" || entry.isMapping) return;
  entry.isMapping = true;
  update(entry);
  let failure = null;
  try {
    const { instances } = await predict(entry.blob, { threshold: LEAST_SCORE, maps: true, signal: entry.abort.signal });
    entry.maps = instances.map(({ activation_maps: maps }) => maps);
  } catch (error) {
    failure = error.message;
    element("show-maps").checked = false;
  }
  entry.isMapping = false;
  update(entry);
  // After the update, which says what the image shows.
  if (failure !== null && state.entries.includes(entry)) say(failure);
}

function select(entry) {
  // Its canvases take as much memory as several images.
  if (state.current && state.current !== entry) state.current.drawing = null;
  state.current = entry;
  state.hovered = state.selected = undefined;
  updateAll();
}

function remove(entry) {
  entry.abort.abort();
  URL.revokeObjectURL(entry.url);
  const index = state.entries.indexOf(entry);
  state.entries.splice(index, 1);
  const next = Math.min(index, state.entries.length - 1);
  if (state.current === entry) select(state.entries[next] ?? null);
  else updateAll();
  // The focus was on a button that is gone.
  const button = element("strip").children[next]?.querySelector(".remove");
  (button ?? element(video.hidden ? "choose" : "stop-camera")).focus();
}

// ---------------------------------------------------------------- what is shown

function shown(instances) {
  const least = Number(element("threshold").value);
  return instances.filter(({ score, category_id: id }) => score >= least && !state.hiddenClasses.has(id));
}

function drawingOf(entry) {
  if (!entry.image) return null;
  const side = Math.max(entry.image.naturalWidth, entry.image.naturalHeight);
  const [least, most] = SCREEN_SIDES;
  entry.drawing ??= new Drawing(
    entry.image, entry.prediction, state.metadata.palette, Math.max(least, Math.min(side, most)),
  );
  return entry.drawing;
}

function view(entry, drawing) {
  const isOn = (id) => element(id).checked;
  const instances = shown(drawing.instances);
  const rank = [state.hovered, state.selected].find((value) => instances.some((instance) => instance.rank === value));
  let active = instances.find((instance) => instance.rank === rank);
  let heat = null;
  if (isOn("show-maps") && entry.maps) {
    active ??= instances[0];
    const maps = active && entry.maps[active.rank];
    if (maps) heat = { ...maps, levels: decodeLevels(maps.maps[state.mapNumber] ?? maps.maps[0]) };
  }
  return { instances, active, heat, show: { masks: isOn("show-masks"), boxes: isOn("show-boxes"), names: isOn("show-names") } };
}

let isDrawing = false;
/** Draw the current image at the next frame of the screen. */
function draw() {
  if (isDrawing) return;
  isDrawing = true;
  requestAnimationFrame(() => {
    isDrawing = false;
    const entry = state.current;
    const drawing = entry && state.metadata && drawingOf(entry);
    canvas.hidden = !drawing || !video.hidden;
    if (!drawing) return;
    const options = view(entry, drawing);
    // The size on the screen follows from that of the drawing.
    if (canvas.width !== drawing.width || canvas.height !== drawing.height) {
      Object.assign(canvas, { width: drawing.width, height: drawing.height });
    }
    const unit = canvas.width / (canvas.clientWidth || canvas.width);
    // Many large masks appear over several frames, so that the page answers meanwhile.
    if (!drawing.draw(canvas, { ...options, unit, milliseconds: PAINT_MS })) draw();
    canvas.setAttribute("aria-label", `${entry.name}: ${summary(entry, options.instances)}`);
    markActive(options.active?.rank, state.selected);
  });
}

function summary(entry, instances) {
  if (entry.state === "failed") return entry.error;
  if (entry.state !== "done") return "looking for objects";
  const counts = new Map();
  for (const { category_name: name } of instances) counts.set(name, (counts.get(name) ?? 0) + 1);
  const parts = [...counts].map(([name, count]) => `${count} ${name}`);
  return `${instances.length} ${instances.length === 1 ? "object" : "objects"}${parts.length ? `: ${parts.join(", ")}` : ""}`;
}

/** Show the state of one image; only the strip changes where another image is shown. */
function update(entry) {
  if (entry === state.current) updateAll();
  else fillStrip(element("strip"), state, { select, remove, count: (other) => shown(other.prediction.instances).length });
}

function updateAll() {
  const entry = state.current;
  const instances = entry?.prediction?.instances ?? [];
  const visible = shown(instances);
  element("welcome").hidden = Boolean(entry) || !video.hidden;
  element("working").hidden = !(entry && (["waiting", "working"].includes(entry.state) || entry.isMapping)) || !video.hidden;
  element("failure").hidden = entry?.state !== "failed" || !video.hidden;
  element("failure-text").textContent = entry?.error ?? "";
  if (entry) say(`${entry.name}: ${summary(entry, visible)}`);
  else say("No image yet.");
  const numBelow = instances.filter(({ score }) => score < Number(element("threshold").value)).length;
  element("hidden-count").textContent = numBelow ? `${numBelow} more below it` : "";
  element("crowded").hidden = visible.length <= MAX_LABELS;
  element("crowded").textContent = `Boxes and names appear for ${MAX_LABELS} objects or fewer, and for the one you choose.`;
  const least = `${Math.round(100 * element("threshold").value)}%`;
  element("threshold-value").textContent = least;
  element("threshold").setAttribute("aria-valuetext", least);
  fillStrip(element("strip"), state, { select, remove, count: (other) => shown(other.prediction.instances).length });
  fillClasses(element("classes"), instances, state.hiddenClasses, Number(element("threshold").value), updateAll);
  element("classes-card").hidden = !instances.length;
  const ranked = instances.map((instance, rank) => ({ ...instance, rank }));
  fillObjects(element("objects"), shown(ranked), state.metadata?.palette ?? [], { hover, toggle });
  element("no-objects").hidden = visible.length > 0;
  element("no-objects").textContent = entry?.state === "done"
    ? "None with this score and these classes."
    : "Objects appear here. Point at one, or choose it, to see it alone.";
  const withMaps = element("show-maps").checked;
  const numMaps = withMaps ? (entry?.maps?.[0]?.maps.length ?? 0) : 0;
  fillMapNumbers(element("map-numbers"), numMaps, state.mapNumber, (number) => {
    state.mapNumber = number;
    draw();
  });
  element("save-image").disabled = entry?.state !== "done";
  element("save-json").disabled = !state.entries.some(({ prediction }) => prediction);
  draw();
  if (entry && withMaps) findMaps(entry);
}

function say(text) {
  // Screen readers read every change, also an equal one.
  if (element("status").textContent !== text) element("status").textContent = text;
}

function hover(rank) {
  if (state.hovered === rank) return;
  state.hovered = rank;
  draw();
}

function toggle(rank) {
  state.selected = state.selected === rank ? undefined : rank;
  draw();
}

// ---------------------------------------------------------------- pointer, keyboard, files

function instanceAt(event) {
  const entry = state.current;
  const drawing = entry?.prediction && drawingOf(entry);
  if (!drawing) return undefined;
  const box = canvas.getBoundingClientRect();
  const [x, y] = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  return drawing.at(x * drawing.width, y * drawing.height, shown(drawing.instances));
}

canvas.addEventListener("pointermove", (event) => {
  if (event.pointerType === "touch") return;
  const instance = instanceAt(event);
  const tip = element("tip");
  tip.hidden = !instance;
  if (instance) {
    tip.textContent = `${instance.category_name} ${(100 * instance.score).toFixed(1)}%`;
    const box = stage.getBoundingClientRect();
    const x = Math.min(event.clientX - box.left + 14, box.width - tip.offsetWidth - 6);
    tip.style.transform = `translate(${x}px, ${Math.max(6, event.clientY - box.top - 38)}px)`;
  }
  canvas.style.cursor = instance ? "pointer" : "default";
  hover(instance?.rank);
});
canvas.addEventListener("pointerleave", () => {
  element("tip").hidden = true;
  hover(undefined);
});
canvas.addEventListener("click", (event) => {
  const rank = instanceAt(event)?.rank;
  state.selected = rank === state.selected ? undefined : rank;
  draw();
  if (rank !== undefined) element("objects").querySelector(`[data-rank="${rank}"]`)?.scrollIntoView({ block: "nearest" });
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (!video.hidden) showCamera(false);
  state.hovered = state.selected = undefined;
  draw();
});

element("threshold").addEventListener("input", updateAll);
for (const id of ["show-masks", "show-boxes", "show-names"]) element(id).addEventListener("change", draw);
element("show-maps").addEventListener("change", updateAll);
new ResizeObserver(draw).observe(stage);

for (const id of ["files", "capture"]) {
  element(id).addEventListener("change", ({ target }) => {
    open(target.files);
    target.value = "";
  });
}
element("choose").addEventListener("click", () => element("files").click());
element("retry").addEventListener("click", () => {
  state.current.state = "waiting";
  updateAll();
  // The button is hidden now.
  element("objects-heading").focus({ preventScroll: true });
  work();
});
document.addEventListener("paste", (event) => open(event.clipboardData.files));
for (const name of ["dragover", "drop", "dragleave"]) {
  document.addEventListener(name, (event) => {
    event.preventDefault();
    stage.classList.toggle("dropping", name === "dragover");
    if (name === "drop") open(event.dataTransfer.files);
  });
}

// ---------------------------------------------------------------- camera and downloads

const FILE_BUTTONS = ["choose", "camera"];
const CAMERA_BUTTONS = ["shoot", "stop-camera"];

function showCamera(isOpen) {
  if (!isOpen) closeCamera(video);
  const [hidden, visible] = isOpen ? [FILE_BUTTONS, CAMERA_BUTTONS] : [CAMERA_BUTTONS, FILE_BUTTONS];
  const hadFocus = hidden.includes(document.activeElement?.id);
  video.hidden = !isOpen;
  for (const id of hidden) element(id).hidden = true;
  for (const id of visible) element(id).hidden = false;
  if (hadFocus) element(visible[1]).focus();
  updateAll();
}

element("camera").addEventListener("click", async () => {
  if (!canOpenCamera()) {
    element("capture").click();
    return;
  }
  try {
    showCamera(true);
    element("shoot").disabled = true;
    if (!(await openCamera(video))) return;
    element("shoot").disabled = false;
    element("shoot").focus();
  } catch (error) {
    showCamera(false);
    say(error.message);
  }
});
element("stop-camera").addEventListener("click", () => showCamera(false));
element("shoot").addEventListener("click", async () => open([await takePhoto(video)]));

const stem = (name) => name.replace(/\.[^.]*$/, "");
element("save-image").addEventListener("click", () => {
  const entry = state.current;
  const { width, height } = entry.prediction.image;
  // Small images are enlarged, so that names can be read.
  const side = Math.min(Math.max(width, height, SCREEN_SIDES[0]), MOST_SAVED_SIDE);
  const drawing = new Drawing(entry.image, entry.prediction, state.metadata.palette, side);
  const saved = document.createElement("canvas");
  drawing.draw(saved, { ...view(entry, drawing), unit: side / SCREEN_SIDES[0] });
  saved.toBlob((blob) => download(blob, `${stem(entry.name)}_objects.png`), "image/png");
});
element("save-json").addEventListener("click", () => {
  const opened = state.entries
    .filter(({ prediction }) => prediction)
    .map(({ name, prediction }) => ({ name, prediction, instances: shown(prediction.instances) }));
  const json = JSON.stringify(cocoJson(opened, state.metadata.categories));
  const name = opened.length === 1 ? stem(opened[0].name) : "objects";
  download(new Blob([json], { type: "application/json" }), `${name}_coco.json`);
});

// ---------------------------------------------------------------- the model

/** Wait for the model, then show its description. */
async function connect() {
  const banner = element("banner");
  for (;;) {
    try {
      const health = await (await fetch("healthz")).json();
      if (health.status === "ready") {
        state.metadata = await getJson("metadata");
        break;
      }
      banner.classList.toggle("quiet", health.status === "loading");
      banner.textContent = health.error ? `The model cannot be loaded: ${health.error}` : "The model is loading …";
    } catch {
      banner.classList.remove("quiet");
      banner.textContent = "The service cannot be reached. Is it running?";
    }
    banner.hidden = false;
    await new Promise((resolve) => setTimeout(resolve, POLL_MS));
  }
  banner.hidden = true;
  const { model, architecture, categories, activation_maps: hasMaps } = state.metadata;
  element("model").textContent = `${model} · ${architecture} · ${categories.length} ${categories.length === 1 ? "class" : "classes"}`;
  element("maps-switch").hidden = !hasMaps;
  updateAll();
  work();
}

updateAll();
connect();
