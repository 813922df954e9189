// Requests to the server, with the key if it asks for one, and pictures by number.

let key = "";
try {
  key = sessionStorage.key ?? "";
} catch {
  // storage may be forbidden
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
      throw new Problem("The server does not answer: is it still running?");
    }
    if (reply.status === 401) {
      await askForKey();
      continue;
    }
    const said = await reply.json().catch(() => ({}));
    if (!reply.ok) throw new Problem(said.error?.message ?? `the server answered ${reply.status}`);
    return said;
  }
}

let asking;

function askForKey() {
  asking ??= new Promise((resolve) => {
    const dialog = document.getElementById("keyDialog");
    const problem = document.getElementById("keyProblem");
    problem.textContent = "That key is not known here.";
    problem.hidden = !key;
    const cancel = (event) => event.preventDefault();
    dialog.addEventListener("cancel", cancel);
    document.getElementById("keyForm").onsubmit = () => {
      key = document.getElementById("key").value;
      try {
        sessionStorage.key = key;
      } catch {
        // then it is asked for again after a reload
      }
      dialog.removeEventListener("cancel", cancel);
      asking = undefined;
      resolve();
    };
    dialog.showModal();
  });
  return asking;
}

// An <img> cannot send a key, so with one its picture is fetched and shown from memory.
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

const LARGEST = 2_000_000; // bytes that are sent as they are
const SIDE = 1600; // pixels that larger pictures are sent at

export async function dataUrl(file) {
  if (file.size <= LARGEST) return read(file);
  const bitmap = await createImageBitmap(file).catch(() => null);
  if (!bitmap) return read(file); // the server may know a format that the browser does not
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
    reader.onerror = () => reject(new Problem(`${file.name} cannot be read`));
    reader.readAsDataURL(file);
  });
}
