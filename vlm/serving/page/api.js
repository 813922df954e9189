// HTTP client: requests with the API key if there is one, and thumbnails by item number.

let key = "";
try {
  key = sessionStorage.key ?? "";
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
        sessionStorage.key = key;
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
export async function showPicture(img, item, size) {
  const path = `/v1/items/${item}/picture?size=${size}`;
  if (!key) {
    img.src = path;
    return;
  }
  const reply = await send(path);
  if (!reply.ok) return;
  const url = URL.createObjectURL(await reply.blob());
  img.addEventListener("load", () => URL.revokeObjectURL(url), { once: true });
  img.src = url;
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
