// Opens the graph of this folder in onnxruntime-web. Every file that can compute is fetched by its hash.

// What a person can mend; the message says how.
export class Trouble extends Error {}

// base: the folder's URL. device: "webgpu" or "wasm" for nothing else. threads: of WebAssembly.
export async function open(base, { device = "auto", threads = 0 } = {}) {
  const settings = JSON.parse(new TextDecoder().decode(await bytesOf(new URL("web.json", base), "", "The page's settings")));
  const adapter = device !== "wasm" && settings.webgpu ? await gpuAdapter(device === "webgpu") : null;
  if (device === "webgpu" && !adapter) {
    throw new Trouble(settings.webgpu ? "This browser has no WebGPU." : "A model in 8 bits runs by WebAssembly only.");
  }
  const { file, integrity } = settings.graph;
  const graph = await bytesOf(new URL(file, base), integrity, "The model");
  const refused = [];
  for (const way of adapter ? ["webgpu", "wasm"] : ["wasm"]) {
    try {
      const model = await start(way, settings, base, graph, threads);
      await check(model, settings.check);
      return model;
    } catch (error) {
      if (way === "wasm" || device === "webgpu") throw error;
      refused.push(error);
      console.warn("WebGPU is not used:", error);
    }
  }
}

// A graphics card, not its imitation by the processor, which is slower than WebAssembly, unless that is asked for.
async function gpuAdapter(any) {
  try {
    const adapter = await navigator.gpu?.requestAdapter();
    return adapter && (any || !(adapter.info?.isFallbackAdapter ?? adapter.isFallbackAdapter)) ? adapter : null;
  } catch {
    return null;
  }
}

async function start(way, settings, base, graph, wanted) {
  const { version, folder, ways, integrity } = settings.runtime;
  const place = new URL(folder, base);
  const names = ways[way];
  const what = `onnxruntime-web ${version}, which runs the model,`;
  const [code, glue, binary] = await Promise.all(
    names.map((name) => bytesOf(new URL(name, place), integrity[name], what)),
  );
  const ort = await import(scriptUrl(code));
  const threads = !globalThis.crossOriginIsolated ? 1 : wanted || Math.min(4, navigator.hardwareConcurrency || 1);
  Object.assign(ort.env.wasm, { wasmBinary: binary, wasmPaths: { mjs: scriptUrl(glue) }, numThreads: threads });
  ort.env.logLevel = "error";
  const session = await ort.InferenceSession.create(new Uint8Array(graph), {
    executionProviders: [way],
    logSeverityLevel: 3,
  });
  let before = Promise.resolve();
  const run = (pixels) => {
    // One at a time: a session takes no second image before it has answered.
    const answer = before.then(async () => {
      const image = new ort.Tensor("uint8", pixels.data, [pixels.height, pixels.width, 3]);
      const { [session.outputNames[0]]: scores } = await session.run({ [session.inputNames[0]]: image });
      return Float32Array.from(scores.data);
    });
    before = answer.catch(() => {});
    return answer;
  };
  const by = threads === 1 ? "WebAssembly, one thread" : `WebAssembly, ${threads} threads`;
  return { settings, run, where: way === "webgpu" ? "WebGPU" : by };
}

// Drivers and browsers have faults: an image of known answers has to get them.
async function check(model, { height, width, scores, tolerance }) {
  const data = new Uint8Array(height * width * 3);
  for (let y = 0, at = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      for (let c = 0; c < 3; c++) data[at++] = (2 * x + 3 * y + 40 * c + ((x * y) >> (4 + c))) & 255;
    }
  }
  const found = await model.run({ data, height, width });
  const wrong = scores.findIndex((score, index) => !(Math.abs(found[index] - score) <= (tolerance[index] ?? tolerance)));
  if (wrong >= 0 || found.length !== scores.length) {
    throw new Trouble(
      `This browser (${model.where}) computes something else than the model: ${found[wrong]} in place of ` +
        `${scores[wrong]}. Another browser, or an update of this one, may do better.`,
    );
  }
}

// The content of a URL as an ArrayBuffer; a content with another hash is refused by the browser.
async function bytesOf(url, integrity, what) {
  let response;
  try {
    response = await fetch(url, integrity ? { integrity } : {});
  } catch {
    const here = url.origin === globalThis.location?.origin;
    throw new Trouble(
      `${what} could not be fetched from ${url.href}: there is no network, or the file is missing or changed. ` +
        (here
          ? "Reload with a network, or upload the whole folder again."
          : "Reload with a network, or export with --vendor, which puts the file beside this page."),
    );
  }
  if (!response.ok) {
    throw new Trouble(`${what} is missing: ${url.href} gives ${response.status}. Upload the whole folder again.`);
  }
  return response.arrayBuffer();
}

function scriptUrl(bytes) {
  return URL.createObjectURL(new Blob([bytes], { type: "text/javascript" }));
}

// Upright, in sRGB, on white, as bytes of red, green and blue. Read in tiles: phones have no large canvas. Put on white
// here, since a canvas rounds transparent colours down.
const TILE = 2048;

export async function pixelsOf(image) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(image, { premultiplyAlpha: "none" });
  } catch {
    throw new Trouble("This browser cannot read that as an image.");
  }
  const { width, height } = bitmap;
  const data = new Uint8Array(width * height * 3);
  for (let top = 0; top < height; top += TILE) {
    for (let left = 0; left < width; left += TILE) {
      const [columns, rows] = [Math.min(TILE, width - left), Math.min(TILE, height - top)];
      const tile = canvasOf(columns, rows).getContext("2d", { willReadFrequently: true });
      tile.drawImage(bitmap, -left, -top);
      const { data: colours } = tile.getImageData(0, 0, columns, rows);
      for (let y = 0, from = 0; y < rows; y++) {
        let to = ((top + y) * width + left) * 3;
        for (let x = 0; x < columns; x++, from += 4) {
          const alpha = colours[from + 3];
          const white = 255 * (255 - alpha) + 127;
          for (let c = 0; c < 3; c++) data[to++] = ((colours[from + c] * alpha + white) / 255) | 0;
        }
      }
    }
  }
  bitmap.close();
  return { data, width, height };
}

function canvasOf(width, height) {
  if (globalThis.OffscreenCanvas) return new OffscreenCanvas(width, height);
  return Object.assign(document.createElement("canvas"), { width, height });
}
