// HTTP client: requests with the API key if there is one, and thumbnails by item number.

let key = "";
try {
  key = sessionStorage.getItem("key") ?? ""; // .key is a method
} catch {
  // storage may be disabled
}

export class Problem extends Error {}

async function send(path, body, signal) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const method = body === undefined ? "GET" : "POST";
  return fetch(path, { method, headers, signal, body: body && JSON.stringify(body) });
}

export async function ask(path, body, signal) {
  for (;;) {
    let reply;
    try {
      reply = await send(path, body, signal);
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Problem("The server does not respond: check that it is running.");
    }
    if (reply.status === 401) {
      await askForKey();
      continue;
    }
    const result = await reply.json().catch(() => ({}));
    if (!reply.ok) throw new Problem(result.error?.message ?? `The server returned status ${reply.status}.`);
    return result;
  }
}

let asking;

function askForKey() {
  asking ??= new Promise((resolve) => {
    const dialog = document.getElementById("keyDialog");
    const problem = document.getElementById("keyProblem");
    problem.textContent = "This key is not valid.";
    problem.hidden = !key;
    const cancel = (event) => event.preventDefault();
    dialog.addEventListener("cancel", cancel);
    document.getElementById("keyForm").onsubmit = () => {
      key = document.getElementById("key").value;
      try {
        sessionStorage.setItem("key", key);
      } catch {
        // the page asks for the key again after a reload
      }
      dialog.removeEventListener("cancel", cancel);
      asking = undefined;
      resolve();
    };
    dialog.showModal();
  });
  return asking;
}

// An <img> cannot send a key, so with a key the picture is fetched and shown from memory.
// failed({code, message}) is called if there is no picture: an <img> does not tell why.
export async function showPicture(img, item, size, failed = () => {}) {
  const path = `/v1/items/${item}/picture?size=${size}`;
  if (!key) {
    img.addEventListener("error", async () => failed(await reasonOf(await send(path).catch(() => null))), { once: true });
    img.src = path;
    return;
  }
  const reply = await send(path).catch(() => null);
  if (!reply?.ok) {
    failed(await reasonOf(reply));
    return;
  }
  const url = URL.createObjectURL(await reply.blob());
  img.addEventListener("load", () => URL.revokeObjectURL(url), { once: true });
  img.src = url;
}

async function reasonOf(reply) {
  const result = await reply?.json().catch(() => null);
  return result?.error ?? { code: "", message: "The server does not respond." };
}

// Open the file of an item in a new tab; a link cannot send a key either.
export async function openOriginal(event, item) {
  if (!key) return; // the browser follows the link
  event.preventDefault();
  const tab = open("", "_blank");
  const reply = await send(`/v1/items/${item}/original`).catch(() => null);
  if (!reply?.ok) {
    tab?.close();
    throw new Problem((await reasonOf(reply)).message);
  }
  const url = URL.createObjectURL(await reply.blob());
  if (tab) tab.location = url;
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

const MAX_BYTES = 2_000_000; // larger files are downscaled before upload
const SIDE = 1600; // pixels of the long side after downscaling

export async function dataUrl(file) {
  if (file.size <= MAX_BYTES) return read(file);
  const bitmap = await createImageBitmap(file).catch(() => null);
  if (!bitmap) return read(file); // the server may support a format that the browser does not
  const scale = Math.min(1, SIDE / Math.max(bitmap.width, bitmap.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/jpeg", 0.92);
}

function read(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(String(reader.result));
    reader.onerror = () => reject(new Problem(`${file.name} cannot be read.`));
    reader.readAsDataURL(file);
  });
}
