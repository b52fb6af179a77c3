// Keeps the page for when there is no network, and isolates it, which WebAssembly asks of pages that want threads.
// The line above is the export's. Of another export this file is another one, and its cache takes the old one's place;
// whoever changes a file of the page gives it another version there, too.
const PREFIX = `hf-poolformer page ${self.registration.scope} `;
const CACHE = PREFIX + EXPORT.version;
const at = (name) => new URL(name, self.registration.scope).href;
const SMALL = new Set(EXPORT.small.map(at));
const LARGE = new Set(EXPORT.large.map(at));
const PAGE = at("index.html");

self.addEventListener("install", (event) => {
  const keep = async () => {
    const cache = await caches.open(CACHE);
    await Promise.all(EXPORT.small.map((name) => put(cache, at(name))));
    await self.skipWaiting();
  };
  event.waitUntil(keep());
});

self.addEventListener("activate", (event) => {
  const replace = async () => {
    const old = (await caches.keys()).filter((name) => name.startsWith(PREFIX) && name !== CACHE);
    await Promise.all(old.map((name) => caches.delete(name)));
    await self.clients.claim();
  };
  event.waitUntil(replace());
});

self.addEventListener("fetch", (event) => {
  const { request } = event;
  if (request.method !== "GET") return;
  const url = request.url.split(/[?#]/)[0];
  if (request.mode === "navigate") {
    if (url === at("./") || url === PAGE) event.respondWith(page());
  } else if (SMALL.has(url) || LARGE.has(url)) {
    event.respondWith(kept(url, request));
  }
});

// The page asks for what it has loaded to be kept, and whether it is.
self.addEventListener("message", (event) => {
  const keep = async () => {
    let done = true;
    try {
      const cache = await caches.open(CACHE);
      for (const url of event.data.keep.filter((url) => LARGE.has(url))) {
        if (!(await cache.match(url))) await put(cache, url);
      }
    } catch {
      done = false;
    }
    event.ports[0].postMessage(done);
  };
  event.waitUntil(keep());
});

async function put(cache, url) {
  const response = await fetch(url, { cache: "no-cache" });
  if (!response.ok) throw new Error(`${url}: ${response.status}`);
  await cache.put(url, response);
}

async function kept(url, request) {
  const cache = await caches.open(CACHE);
  const found = await cache.match(url);
  if (found) return found;
  const response = await fetch(request);
  if (response.ok && LARGE.has(url)) {
    try {
      await cache.put(url, response.clone());
    } catch {
      // No room: the page works, with a network.
    }
  }
  return response;
}

async function page() {
  const cache = await caches.open(CACHE);
  const response = (await cache.match(PAGE)) ?? (await fetch(PAGE));
  const headers = new Headers(response.headers);
  headers.set("Cross-Origin-Opener-Policy", "same-origin");
  headers.set("Cross-Origin-Embedder-Policy", "require-corp");
  return new Response(response.body, { status: response.status, headers });
}
