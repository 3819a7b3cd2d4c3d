// The page of an index: asks the server, shows what it answers. No dependencies, no build step.

const $ = (id) => document.getElementById(id);
const STEPS = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)}%`;

let about = { segments: 0 };
let result = { hits: [], query: null, done: false };
let shown = null; // the hit in the viewer
let running = null; // aborts the query before
let showing = null; // the timer of a clip that is shown by its frames
let asking = null; // aborts the question before
let failure = null; // the message of the last query, if it failed
let seek = () => {}; // go to a time of what the viewer shows
const MAX_UPLOAD = 20e6; // bytes, as the server has it

// --- asking --------------------------------------------------------------------------------------

async function search(url, options, query, note = "") {
  running?.abort();
  running = new AbortController();
  const { signal } = running;
  result = { hits: [], query, done: false };
  failure = null;
  $("hits").classList.add("waiting");
  $("status").textContent = "Searching…";
  state(null);
  try {
    const response = await fetch(url, { ...options, signal });
    if (!response.ok) throw new Refused((await response.json()).error);
    for await (const line of lines(response.body)) {
      const stage = JSON.parse(line);
      if (stage.error) throw new Refused(stage.error);
      show(stage, note);
    }
    if (!result.done) throw new TypeError("the answer ended early");
  } catch (error) {
    if (signal.aborted) return;
    result = { hits: [], query, done: true };
    $("status").textContent = "";
    failure = error instanceof Refused ? escape(error.message) : gone();
    render();
  } finally {
    if (!signal.aborted) $("hits").classList.remove("waiting");
  }
}

class Refused extends Error {}

async function* lines(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    yield* parts.filter(Boolean);
  }
}

function show(stage, note) {
  const seconds = `${stage.seconds.toFixed(2)} s`;
  if (stage.stage === "matching") {
    $("status").textContent = `${result.first}. Matching ${stage.matched} of ${stage.total} … ${seconds}`;
    return;
  }
  result.hits = stage.hits;
  result.done = stage.stage === "done";
  if (!result.done) {
    result.first = `Shortlist after ${seconds}`;
    $("status").textContent = `${result.first}. Matching …`;
  } else {
    const matched = stage.total ? `${result.first}, ${stage.total} reranked after ${seconds}` : seconds;
    $("status").textContent = `${note}${stage.hits.length} results. ${matched}`;
  }
  render();
}

function gone() {
  return `The server does not answer. Start it again: <code>uniadapter search serve --index ${escape(about.folder ?? "FOLDER")}</code>`;
}

// --- the list ------------------------------------------------------------------------------------

// The hits that the slider leaves. What a text's result holds without a probability was not judged.
function visible() {
  const least = $("threshold").value / 100;
  const judged = result.done && result.query?.text;
  return result.hits.filter((hit) =>
    hit.probability === null ? !(judged && least > 0) : hit.probability >= least);
}

function render() {
  const least = $("threshold").value / 100;
  const hits = visible();
  place(hits);
  $("export").disabled = !result.done || hits.length === 0;
  state(failure);
  if (failure) return;
  if (!about.segments) {
    state(`The index is empty. Put images or videos into <code>${escape(about.root ?? "")}</code> and run
      <code>uniadapter search index ${escape(about.root ?? "DIR")} --index ${escape(about.folder ?? "FOLDER")}</code>`);
  } else if (result.done && result.query && hits.length === 0) {
    const best = Math.max(...result.hits.map((hit) => hit.probability ?? 0), 0);
    state(`No match reaches ${percent(least)} (best: ${percent(best)}).
      Lower the threshold or describe it in other words.`);
  } else if (!result.query) {
    state(`${about.segments} segments of ${about.files} files in <code>${escape(about.root ?? "")}</code>.`);
  }
}

// A card that is there already is used again, so that it keeps the focus.
function place(hits) {
  const list = $("hits"), before = new Map();
  for (const item of list.children) before.set(item.dataset.segment, item);
  const items = hits.map((hit) => card(hit, before.get(String(hit.segment))));
  for (const item of [...list.children]) if (!items.includes(item)) item.remove();
  items.forEach((item, i) => {
    if (list.children[i] !== item) keepFocus(() => list.insertBefore(item, list.children[i]));
  });
}

function keepFocus(move) {
  const focused = document.activeElement;
  move();
  if (document.activeElement !== focused) focused.focus({ preventScroll: true });
}

function card(hit, item = $("card").content.firstElementChild.cloneNode(true)) {
  item.dataset.segment = hit.segment;
  const image = item.querySelector("img");
  const address = frameAddress(bestFrame(hit));
  if (image.getAttribute("src") !== address) image.src = address;
  image.onerror = async () => { image.alt = await lost(); };
  item.querySelector(".bar span").style.width = percent(hit.probability ?? 0);
  item.querySelector(".name").textContent = hit.file;
  item.querySelector(".fact").textContent = facts(hit);
  const button = item.querySelector("button");
  button.setAttribute("aria-label", `${hit.rank}. ${hit.file}, ${facts(hit)}`);
  button.onclick = () => open(hit);
  return item;
}

// Why a picture did not come: the server or the file is gone.
async function lost() {
  try {
    if ((await fetch("/api/about")).ok) return "This file cannot be read any more. Update the index.";
  } catch { /* the same as an error status */ }
  return "The server does not answer. Start it again.";
}

function frameAddress([, , segment, number]) {
  return `/frame/${segment}/${number}.jpg`;
}

function bestFrame(hit) {
  return hit.frames.reduce((best, frame) => (frame[1] > best[1] ? frame : best));
}

function facts(hit) {
  const sure = hit.probability === null ? `similarity ${hit.similarity.toFixed(2)}` : percent(hit.probability);
  return hit.end ? `${clock(hit.start)}–${clock(hit.end)} · ${sure}` : sure;
}

function clock(seconds) {
  const whole = Math.floor(seconds);
  const parts = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  const [hours, minutes, rest] = parts.map((part) => String(part).padStart(2, "0"));
  return parts[0] ? `${parts[0]}:${minutes}:${rest}` : `${Number(minutes)}:${rest}`;
}

function state(html) {
  $("state").hidden = html === null;
  $("state").innerHTML = html ?? "";
}

function escape(text) {
  const element = document.createElement("span");
  element.textContent = text;
  return element.innerHTML;
}

// --- the viewer ----------------------------------------------------------------------------------

function open(hit) {
  shown = hit;
  clearInterval(showing);
  asking?.abort();
  $("title").textContent = `${hit.rank}. ${hit.file}`;
  $("facts").textContent = `${facts(hit)} · similarity ${hit.similarity.toFixed(3)}`;
  $("answer").textContent = "";
  $("ask").hidden = !about.answers;
  $("screen").replaceChildren(hit.end ? player(hit) : picture(hit));
  bars(hit);
  if (!$("viewer").open) $("viewer").showModal();
}

function picture(hit) {
  const image = document.createElement("img");
  image.src = `/media/${hit.segment}`;
  image.alt = hit.file;
  image.onerror = () => { if (shown === hit) still(hit); };
  return image;
}

function player(hit) {
  const video = document.createElement("video");
  video.controls = true;
  video.autoplay = true;
  video.muted = true;
  video.src = `/media/${hit.segment}#t=${hit.best}`;
  video.onloadedmetadata = () => {
    if (shown !== hit) return;
    if (video.videoWidth) video.currentTime = hit.best;
    else frames(hit); // it can play the sound alone
  };
  video.onerror = () => { if (shown === hit) frames(hit); };
  video.ontimeupdate = () => cursor(video.currentTime);
  seek = (time) => { video.currentTime = time; };
  return video;
}

// An image that a browser cannot show is shown as the server decodes it.
function still(hit) {
  const [box, image] = decoded(hit, "This browser cannot show the file. This is a copy of it.");
  image.alt = hit.file;
  image.src = frameAddress(hit.frames[0]);
  $("screen").replaceChildren(box);
}

function decoded(hit, text) {
  const box = document.createElement("div");
  const note = document.createElement("p");
  const image = document.createElement("img");
  note.textContent = text;
  image.onerror = async () => {
    const reason = await lost();
    if (shown !== hit) return;
    clearInterval(showing);
    image.remove();
    note.textContent = reason;
  };
  box.append(image, note);
  return [box, image];
}

// What a browser cannot play is shown by its frames, which the server decodes, at their times.
function frames(hit) {
  const [box, image] = decoded(hit, "This browser cannot play the file. These are frames of it.");
  const times = hit.frames.map(([time]) => time);
  image.alt = `Frames of ${hit.file}`;
  let number = -1;
  const to = (time) => {
    number = Math.max(0, times.findLastIndex((each) => each <= time));
    image.src = frameAddress(hit.frames[number]);
    cursor(times[number]);
  };
  const step = () => to(times[(number + 1) % times.length]);
  number = times.findLastIndex((each) => each < hit.best);
  clearInterval(showing);
  showing = setInterval(step, Math.max(150, (1000 * (hit.end - hit.start)) / times.length));
  seek = (time) => { clearInterval(showing); to(time); };
  step();
  $("screen").replaceChildren(box);
}

function bars(hit) {
  const svg = $("bars");
  svg.replaceChildren();
  svg.toggleAttribute("hidden", !hit.end);
  const values = hit.frames.map(([, cosine]) => cosine);
  const low = Math.min(...values, 0), high = Math.max(...values, low + 1e-6);
  const length = hit.end - hit.start;
  hit.frames.forEach(([time, cosine], i) => {
    const next = hit.frames[i + 1]?.[0] ?? hit.end;
    const height = 5 + (95 * (cosine - low)) / (high - low);
    const bar = element("rect", {
      x: (1000 * (time - hit.start)) / length,
      y: 100 - height,
      width: Math.max(4, (1000 * (next - time)) / length - 3),
      height,
      tabindex: i ? -1 : 0, // the arrows reach the others
      role: "button",
      "aria-label": `${clock(time)}, similarity ${cosine.toFixed(2)}`,
    });
    bar.append(element("title", {}, `${clock(time)}  ${cosine.toFixed(3)}`));
    bar.onclick = () => seek(time);
    bar.onkeydown = (event) => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); seek(time); }
      const all = [...svg.querySelectorAll("rect")];
      const next = all[i + (STEPS[event.key] ?? 0)];
      if (!next || next === bar) return;
      event.preventDefault();
      for (const each of all) each.setAttribute("tabindex", each === next ? 0 : -1);
      next.focus();
    };
    svg.append(bar);
  });
  svg.append(element("line", { id: "cursor", x1: 0, x2: 0, y1: 0, y2: 100 }));
}

function cursor(time) {
  if (!shown) return;
  const at = (1000 * (time - shown.start)) / (shown.end - shown.start);
  for (const end of ["x1", "x2"]) $("cursor")?.setAttribute(end, Math.min(Math.max(at, 0), 1000));
}

function element(name, attributes, text = "") {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = text;
  return made;
}

async function ask(question) {
  const hit = shown;
  asking?.abort();
  asking = new AbortController();
  const { signal } = asking;
  $("answer").textContent = "Thinking… (the first question loads the model)";
  try {
    const response = await fetch("/api/answer", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ segment: hit.segment, question }),
      signal,
    });
    const said = await response.json();
    if (signal.aborted) return;
    const loading = said.loading ? `, ${said.loading} s to load the model` : "";
    $("answer").textContent = response.ok ? `${said.answer} (${said.seconds} s${loading})` : said.error;
  } catch {
    if (!signal.aborted) $("answer").innerHTML = gone();
  }
}

// --- the address holds the query -----------------------------------------------------------------

function go(parameters) {
  const url = new URL(location.pathname, location.href);
  for (const [key, value] of Object.entries(parameters)) if (value) url.searchParams.set(key, value);
  history.pushState(null, "", url);
  follow();
}

function follow() {
  const given = new URLSearchParams(location.search);
  $("viewer").close();
  $("text").value = given.get("q") ?? "";
  setThreshold(given.get("least") ?? 0);
  const query = given.get("q") ?? given.get("like");
  document.title = query ? `${given.get("q") ?? "More like this"} – Search` : "Search";
  if (given.get("like")) {
    const like = given.get("like");
    search(`/api/search?like=${encodeURIComponent(like)}`, {}, { like }, "More like this: ");
  } else if (given.get("q")) {
    search(`/api/search?text=${encodeURIComponent(given.get("q"))}`, {}, { text: given.get("q") });
  } else {
    running?.abort();
    $("hits").classList.remove("waiting");
    failure = null;
    result = { hits: [], query: null, done: true };
    $("status").textContent = "";
    render();
  }
}

function byImage(file) {
  if (!file) return;
  $("viewer").close();
  $("text").value = "";
  history.pushState(null, "", "/");
  document.title = `Like ${file.name} – Search`;
  if (file.size > MAX_UPLOAD) {
    running?.abort();
    $("hits").classList.remove("waiting");
    $("status").textContent = "";
    result = { hits: [], query: { image: file.name }, done: true };
    failure = `The image has more than ${MAX_UPLOAD / 1e6} MB. Use a smaller one.`;
    render();
    return;
  }
  search("/api/search", { method: "POST", body: file }, { image: file.name }, `Like ${file.name}: `);
}

function setThreshold(value) {
  $("threshold").value = value;
  $("percent").textContent = `${$("threshold").value}%`;
}

// --- what people do ------------------------------------------------------------------------------

$("form").onsubmit = (event) => {
  event.preventDefault();
  const text = $("text").value.trim();
  if (text) go({ q: text, least: Number($("threshold").value) || null });
};
$("threshold").oninput = () => {
  setThreshold($("threshold").value);
  const url = new URL(location.href);
  url.searchParams.set("least", $("threshold").value);
  history.replaceState(null, "", url);
  render();
};
$("pick").onclick = () => $("file").click();
$("file").onchange = () => { byImage($("file").files[0]); $("file").value = ""; };
$("close").onclick = () => $("viewer").close();
$("viewer").onclose = () => {
  shown = null;
  clearInterval(showing);
  asking?.abort();
  $("screen").replaceChildren();
};
$("like").onclick = () => go({ like: shown.segment });
$("ask").onsubmit = (event) => {
  event.preventDefault();
  if ($("question").value.trim()) ask($("question").value.trim());
};
$("export").onclick = () => {
  const content = JSON.stringify({ query: result.query, root: about.root, hits: visible() }, null, 2);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([content], { type: "application/json" }));
  link.download = "hits.json";
  link.click();
  URL.revokeObjectURL(link.href);
};
addEventListener("popstate", follow);
addEventListener("dragover", (event) => { event.preventDefault(); document.body.classList.add("dropping"); });
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dropping");
});
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  byImage(event.dataTransfer.files[0]);
});
addEventListener("keydown", (event) => {
  if (event.target.matches("input") || $("viewer").open) return;
  if (event.key === "/") { event.preventDefault(); $("text").focus(); }
  const cards = [...document.querySelectorAll(".hit")];
  const at = cards.indexOf(document.activeElement);
  if (at < 0 || !(event.key in STEPS)) return;
  const columns = cards.filter((card) => card.offsetTop === cards[0].offsetTop).length;
  const step = STEPS[event.key] * (event.key === "ArrowUp" || event.key === "ArrowDown" ? columns : 1);
  if (cards[at + step]) { event.preventDefault(); cards[at + step].focus(); }
});

try {
  about = await (await fetch("/api/about")).json();
  follow();
} catch {
  state(gone());
}
