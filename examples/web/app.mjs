// The base is one session; an adapter is the outputs of its expander, kept and fed to the base's slots.
import * as ort from "./ort/ort.wasm.min.mjs";

ort.env.wasm.wasmPaths = new URL("./ort/", import.meta.url).href;
ort.env.wasm.numThreads = 1; // more need cross-origin isolation, which a plain file server does not give

const spec = await (await fetch("expected.json")).json();
const say = (text) => { document.getElementById("status").textContent = text; };

async function session(url) {
  const bytes = new Uint8Array(await (await fetch(url)).arrayBuffer());
  return { session: await ort.InferenceSession.create(bytes), bytes: bytes.length };
}

const base = await session("base.onnx");
const slots = new Map(); // adapter name -> tensors by slot

async function load(adapter) {
  const start = performance.now();
  const made = await session(adapter.file);
  const tensors = await made.session.run({});
  slots.set(adapter.name, tensors);
  return { bytes: made.bytes, ms: performance.now() - start };
}

// No adapter: the same slots at rank 0. Declared shapes tell which dimension is the rank.
function empty(like) {
  const out = {};
  for (const meta of base.session.inputMetadata) {
    if (!(meta.name in like)) continue;
    const dims = meta.shape.map((d) => (typeof d === "number" && d >= 0 ? d : 0));
    const size = dims.reduce((a, b) => a * b, 1);
    out[meta.name] = new ort.Tensor(like[meta.name].type, new like[meta.name].data.constructor(size), dims);
  }
  return out;
}

async function run(row, name) {
  const feeds = { ...slots.get(name) };
  for (const [key, ids] of Object.entries(row.feeds)) {
    feeds[key] = new ort.Tensor("int64", BigInt64Array.from(ids, BigInt), [1, ids.length]);
  }
  const start = performance.now();
  const outputs = await base.session.run(feeds);
  return { values: Array.from(outputs[base.session.outputNames[0]].data), ms: performance.now() - start };
}

const loaded = {};
for (const adapter of spec.adapters) loaded[adapter.name] = await load(adapter);
slots.set("none", empty(slots.get(spec.adapters[0].name)));

const picked = { row: 0, name: "none" };
const input = document.getElementById("input");
spec.rows.forEach((row, i) => input.add(new Option(row.text, i)));
input.onchange = () => { picked.row = Number(input.value); show(); };
const group = document.getElementById("adapters");
for (const name of ["none", ...spec.adapters.map((a) => a.name)]) {
  const button = document.createElement("button");
  button.textContent = name;
  button.onclick = () => { picked.name = name; show(); };
  group.append(button);
}

async function show() {
  for (const b of group.children) b.setAttribute("aria-pressed", String(b.textContent === picked.name));
  const row = spec.rows[picked.row];
  const [plain, now] = [await run(row, "none"), await run(row, picked.name)];
  const top = Math.max(...plain.values.concat(now.values).map(Math.abs)) || 1;
  const outputs = document.getElementById("outputs");
  outputs.replaceChildren(...now.values.slice(0, 12).map((v, i) => {
    const line = document.createElement("div");
    line.className = "row";
    const label = document.createElement("span");
    label.textContent = `output ${i}`;
    const track = document.createElement("span");
    track.className = "track";
    const bar = document.createElement("i");
    bar.style.width = `${(50 * Math.abs(v)) / top}%`;
    bar.style.left = v < 0 ? `${50 - (50 * Math.abs(v)) / top}%` : "50%";
    track.append(bar);
    const value = document.createElement("span");
    value.className = "n";
    value.textContent = v.toFixed(4);
    line.append(label, track, value);
    return line;
  }));
  const change = Math.max(...now.values.map((v, i) => Math.abs(v - plain.values[i])));
  document.getElementById("change").textContent =
    picked.name === "none" ? "the base alone" : `largest change against the base: ${change.toFixed(4)}`;
  const about = spec.adapters.find((a) => a.name === picked.name);
  say(about
    ? `${about.name}: ${loaded[about.name].bytes.toLocaleString("en")} bytes fetched (${about.float32.toLocaleString("en")} as float32 factors), ` +
      `decoded in ${loaded[about.name].ms.toFixed(1)} ms, run in ${now.ms.toFixed(1)} ms`
    : `base: ${base.bytes.toLocaleString("en")} bytes, run in ${now.ms.toFixed(1)} ms`);
}

await show();

// For the test: every output of every row and adapter, and the tensors the expanders made.
if (new URLSearchParams(location.search).has("check")) {
  const results = [];
  for (const row of spec.rows) {
    const found = {};
    for (const name of slots.keys()) found[name] = (await run(row, name)).values;
    results.push(found);
  }
  const decoded = {};
  for (const adapter of spec.adapters) {
    decoded[adapter.name] = {};
    for (const [key, tensor] of Object.entries(slots.get(adapter.name))) {
      const raw = new Uint8Array(tensor.data.buffer, tensor.data.byteOffset, tensor.data.byteLength);
      const hash = await crypto.subtle.digest("SHA-256", raw);
      decoded[adapter.name][key] = Array.from(new Uint8Array(hash), (b) => b.toString(16).padStart(2, "0")).join("");
    }
  }
  picked.name = spec.adapters[0].name;
  await show();
  await fetch("/result", { method: "POST", body: JSON.stringify({ results, decoded }) });
}
