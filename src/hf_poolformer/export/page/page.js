// The page of this folder. Whatever is a name here is put in as text, never as HTML.
import { load } from "./classify.js";

const $ = (id) => document.getElementById(id);
const TOP = 5;
const HEADINGS = {
  classes: "Most probable classes",
  labels: "Labels, each with its own probability",
  numbers: "Numbers, in the units that the model was trained on",
};
const SEEN = "hf-poolformer: isolated";
let classify = null;
let stream = null;
let latest = 0;

main().catch(complain);

async function main() {
  say("Loading the model…");
  await stayOffline();
  const asked = new URLSearchParams(location.search);
  classify = await load({ device: asked.get("device") ?? "auto", threads: Number(asked.get("threads")) || 0 });
  const { model, kind, size, precision } = classify.settings;
  document.title = model;
  $("title").textContent = model;
  $("heading").textContent = HEADINGS[kind];
  $("about").textContent =
    `Runs by ${classify.where}; ${(size / 1e6).toFixed(1)} MB in ${precision}. Images stay on this device.`;
  $("file").disabled = false;
  $("webcam").disabled = !navigator.mediaDevices?.getUserMedia;
  say("Ready.");
  await keepOffline();
}

function say(text, trouble = false) {
  $("status").textContent = text;
  $("status").classList.toggle("trouble", trouble);
}

function complain(error) {
  console.error(error);
  say(error.message || String(error), true);
}

// Images --------------------------------------------------------------------------------------------------------

async function show(image) {
  if (!classify) return;
  const mine = ++latest;
  try {
    stop();
    say("Computing…");
    const bitmap = await createImageBitmap(image).catch(() => null);
    if (!bitmap) throw new Error("This browser cannot read that as an image.");
    draw(bitmap);
    await new Promise((resolve) => setTimeout(resolve)); // so that the image is seen before the model computes
    const began = performance.now();
    const answers = await classify(image);
    if (mine === latest) list(answers, performance.now() - began);
    say("Ready.");
  } catch (error) {
    complain(error);
  }
}

function draw(bitmap) {
  const canvas = $("shown");
  const scale = Math.min(1, 1024 / Math.max(bitmap.width, bitmap.height));
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  canvas.hidden = false;
  $("hint").hidden = true;
}

function list(answers, milliseconds) {
  const { kind } = classify.settings;
  const shown = kind === "numbers" ? answers : answers.slice(0, Math.max(TOP, answers.filter((a) => a.given).length));
  $("answers").replaceChildren(...shown.map((answer) => item(answer, kind)));
  $("time").textContent = `${milliseconds.toFixed(0)} ms for this image, by ${classify.where}.`;
}

function item({ label, score, given }, kind) {
  const row = document.createElement("li");
  row.append(part("name", label), part("score", kind === "numbers" ? number(score) : percent(score)));
  if (kind === "numbers") return row;
  if (kind === "labels") row.classList.toggle("less", !given);
  const track = part("track", "");
  const bar = part("bar", "");
  bar.style.width = percent(score);
  track.append(bar);
  row.append(track);
  row.dataset.score = score;
  return row;
}

function part(name, text) {
  const element = document.createElement(name === "track" || name === "bar" ? "div" : "span");
  element.className = name;
  element.textContent = text;
  return element;
}

const percent = (share) => `${(100 * share).toFixed(1)}%`;
const number = (value) => Number(value.toPrecision(5)).toString();

$("file").addEventListener("change", () => {
  const [file] = $("file").files;
  if (file) show(file);
  $("file").value = "";
});

document.addEventListener("paste", (event) => {
  const file = imageIn(event.clipboardData);
  if (file) show(file);
});

for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault(); // or the browser would leave the page for the image
    $("drop").classList.toggle("over", kind === "dragenter" || kind === "dragover");
    if (kind !== "drop") return;
    const file = imageIn(event.dataTransfer);
    if (file) show(file);
    else if (classify) say("That is no image file.", true);
  });
}

function imageIn(data) {
  return [...(data?.files ?? [])].find((file) => file.type.startsWith("image/"));
}

// Webcam --------------------------------------------------------------------------------------------------------

$("webcam").addEventListener("click", async () => {
  if (stream) return stop();
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  } catch (error) {
    return say(`There is no picture from a camera: ${error.message}`, true);
  }
  const video = $("live");
  const mine = ++latest;
  video.srcObject = stream;
  video.hidden = false;
  $("shown").hidden = $("hint").hidden = true;
  $("webcam").textContent = "Stop";
  try {
    await video.play();
    say("The model looks at the camera's picture.");
    while (stream && mine === latest) {
      const began = performance.now();
      const answers = await classify(video);
      if (!stream || mine !== latest) break;
      list(answers, performance.now() - began);
      await new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve)));
    }
  } catch (error) {
    if (mine === latest) {
      stop();
      complain(error);
    }
  }
});

function stop() {
  if (!stream) return;
  stream.getTracks().forEach((track) => track.stop());
  stream = null;
  draw(frameOf($("live")));
  $("live").hidden = true;
  $("live").srcObject = null;
  $("webcam").textContent = "Webcam";
  say("Ready.");
}

function frameOf(video) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [video.videoWidth || 1, video.videoHeight || 1];
  canvas.getContext("2d").drawImage(video, 0, 0);
  return Object.assign(canvas, { close() {} });
}

// Without a network ----------------------------------------------------------------------------------------------

// The service worker keeps the files. It also isolates the page, which needs one reload: one in a tab, never more.
async function stayOffline() {
  const workers = navigator.serviceWorker;
  if (!workers) return;
  try {
    const former = workers.controller;
    workers.addEventListener("controllerchange", () => {
      // Another export has taken this one's place.
      if (!former || workers.controller === former) return;
      if (classify) $("offline").textContent = "There is a new version of this page: reload it.";
      else location.reload();
    });
    await workers.register("./sw.js", { updateViaCache: "none" });
    await within(3000, workers.ready);
    if (!workers.controller) await within(1000, new Promise((done) => workers.addEventListener("controllerchange", done)));
  } catch (error) {
    console.warn("This page will need a network the next time, too:", error);
    return;
  }
  if (workers.controller && !crossOriginIsolated && window === window.top && firstTime()) {
    location.reload();
    await new Promise(() => {});
  }
}

function firstTime() {
  try {
    if (sessionStorage.getItem(SEEN)) return false;
    sessionStorage.setItem(SEEN, "1");
    return sessionStorage.getItem(SEEN) === "1";
  } catch {
    return false; // no storage: then nobody could tell the second time from the first
  }
}

const within = (milliseconds, promise) =>
  Promise.race([promise, new Promise((done) => setTimeout(done, milliseconds))]);

async function keepOffline() {
  const worker = navigator.serviceWorker?.controller;
  if (!worker) return;
  const keep = performance.getEntriesByType("resource").map((entry) => entry.name);
  const { port1, port2 } = new MessageChannel();
  const answer = new Promise((done) => (port1.onmessage = (event) => done(event.data)));
  worker.postMessage({ keep }, [port2]);
  $("offline").textContent = (await answer)
    ? "From now on this page works without a network, too."
    : "There is no room to keep this page: it will need a network the next time, too.";
}
