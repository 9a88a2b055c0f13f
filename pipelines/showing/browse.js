// The page of `jobs/show.py browse`. Its whole state is the address behind the #, so that each view has a link.
// Texts come from data sets: they are only ever set as textContent.
"use strict";

const BATCH = 6; // images a request, so that the first pictures don't wait for the last
const $ = (id) => document.getElementById(id);

let store = null; // what the server says of it
let state = null; // what is shown, as the address has it
let shown = { key: "", answer: null }; // the rows of `state`, as the server gave them
let running = new AbortController(); // what is under way for `state`
let known = { fingerprint: "", finished: -1, complete: true };
let heatColours = null; // 256 colours of cosines
let scrolledTo = 0; // where the images were left for a point
const photos = new Map(); // row -> {url} or {reason}
const cosines = new Map(); // level -> {grid, rows: Map of row -> Uint16Array}

// --- the server ---------------------------------------------------------------------------------------------------

class Problem extends Error {}

async function get(path, query = {}, signal = undefined) {
  const answer = await fetch(`${path}?${new URLSearchParams(query)}`, { signal });
  if (answer.status === 403) throw new Problem("This page's token isn't valid any more: open the address that the program printed.");
  if (!answer.ok) throw new Problem(`The server couldn't answer (${answer.status} ${await answer.text()})`);
  return answer;
}

async function ask(path, query, signal) {
  const answer = await get(path, query, signal);
  if (!answer.headers.get("content-type").startsWith("application/json")) return unpacked(await answer.arrayBuffer());
  const said = await answer.json();
  if (said && said.problem) throw new Problem(said.problem);
  return said;
}

function unpacked(buffer) {
  const length = new DataView(buffer).getUint32(0, true);
  return { ...JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length))), body: buffer.slice(4 + length) };
}

async function inBatches(rows, work) {
  const parts = [];
  for (let i = 0; i < rows.length; i += BATCH) parts.push(rows.slice(i, i + BATCH));
  const worker = async () => { while (parts.length) await work(parts.shift()); };
  await Promise.all([worker(), worker(), worker()]);
}

// --- state and address ----------------------------------------------------------------------------------------------

const START = { show: "images", level: "", from: 0, count: 24, find: "", only: "", each: "image", scale: "all", row: null, x: null, y: null };

function stateOf(hash) {
  const given = new URLSearchParams(hash.replace(/^#/, ""));
  const number = (name) => (/^\d{1,15}(\.\d{1,9})?$/.test(given.get(name) ?? "") ? Number(given.get(name)) : START[name]);
  const found = { ...START, level: given.get("level") ?? "", find: given.get("find") ?? "" };
  for (const name of ["from", "count", "row", "x", "y"]) found[name] = number(name);
  found.from = Math.floor(found.from);
  found.count = [12, 24, 48, 96].includes(found.count) ? found.count : START.count;
  found.only = given.get("only") === "failed" ? "failed" : "";
  found.scale = given.get("scale") === "own" ? "own" : "all";
  found.each = given.get("each") === "cell" ? "cell" : "image";
  found.show = ["failures", "nearest"].includes(given.get("show")) ? given.get("show") : "images";
  if (found.row === null || found.x === null || found.y === null) Object.assign(found, { row: null, x: null, y: null });
  if (found.row !== null) found.row = Math.floor(found.row);
  if (found.show === "nearest" && found.row === null) found.show = "images";
  return found;
}

function linkTo(some) {
  const said = Object.entries(some).filter(([name, value]) => value !== START[name] && value !== null);
  return said.length ? `#${new URLSearchParams(said)}` : location.pathname;
}

function go(change, { replace = false } = {}) {
  const link = linkTo({ ...state, ...change });
  history[replace ? "replaceState" : "pushState"](null, "", link);
  render();
}

const isPointed = () => state.row !== null;
const maps = () => store.levels.filter((level) => level.grid);
const vectors = () => store.levels.filter((level) => !level.grid);
const levelNow = () => maps().find((level) => level.name === state.level) ?? maps()[0] ?? null;
const searched = () => levelNow() ?? vectors()[0];

// --- drawing --------------------------------------------------------------------------------------------------------

async function render() {
  running.abort();
  running = new AbortController();
  const { signal } = running;
  const before = state;
  state = stateOf(location.hash);
  showControls();
  $("problem").hidden = true;
  try {
    if (state.show === "failures") await showFailures(signal);
    else if (state.show === "nearest") await showNearest(signal);
    else await showImages(signal, before);
  } catch (error) {
    if (error.name !== "AbortError" && !signal.aborted) tellProblem(error);
  }
}

function tellProblem(error) {
  $("problem").textContent = error instanceof Problem ? error.message : `The server doesn't answer: ${error.message}`;
  $("problem").hidden = false;
}

function showControls() {
  const isImages = state.show === "images";
  const level = levelNow();
  for (const [id, isOn] of [["to-images", state.show !== "failures"], ["to-failures", state.show === "failures"]]) {
    if (isOn) $(id).setAttribute("aria-current", "page");
    else $(id).removeAttribute("aria-current");
  }
  $("controls").hidden = state.show === "failures";
  if (document.activeElement !== $("find")) $("find").value = state.find;
  $("only").checked = state.only === "failed";
  $("count").value = String(state.count);
  $("level-field").hidden = !level;
  if (level) {
    $("level").max = maps().length - 1;
    $("level").value = maps().indexOf(level);
    $("level").disabled = maps().length < 2;
    $("level").setAttribute("aria-valuetext", inWords(level));
    $("level-name").textContent = inWords(level);
  }
  $("legend").hidden = !level || isPointed() || !isImages;
  $("point").hidden = !isPointed() || state.show === "failures";
  $("nearest").hidden = !isImages;
  $("nearest").textContent = `Nearest in the whole store, ${searched().name}`;
  $("each-field").hidden = isImages || !level;
  $("each").checked = state.each === "image";
  $("own-field").hidden = !isImages || !level;
  $("own").checked = state.scale === "own";
  $("maps").hidden = isImages;
  $("scale").hidden = !isImages;
  $("back").textContent = level ? "Back to colours" : "Back to images";
  $("failures").hidden = state.show !== "failures";
  $("cards").hidden = state.show === "failures";
  $("pager").hidden = !isImages;
  $("progress").hidden = true;
  $("nothing").hidden = true;
  $("readout").textContent = "";
}

const inWords = (level) => `${level.name} · ${level.method}${level.grid ? ` · ${level.grid[0]} × ${level.grid[1]} cells` : ""}`;

function element(tag, { className = "", text = "", ...attributes } = {}, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text) made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// --- images ---------------------------------------------------------------------------------------------------------

async function showImages(signal, before) {
  const { find, only, from, count } = state;
  const key = JSON.stringify([find, only, from, count]);
  const isLevelOnly = before && shown.key === key && before.show === "images"
    && JSON.stringify({ ...before, level: "", scale: "" }) === JSON.stringify({ ...state, level: "", scale: "" });
  if (!isLevelOnly || !$("cards").children.length) {
    if (shown.key !== key) {
      const answer = await ask("cards", { find, only, from, count }, signal);
      shown = { key, answer };
    }
    const cards = await withQuery(shown.answer.cards, signal);
    if (isPointed()) tellPoint(cards[0]);
    build(cards);
    if (isPointed() && !(before && before.row !== null)) { scrolledTo = scrollY; scrollTo(0, 0); }
    if (!isPointed() && before && before.row !== null) scrollTo(0, scrolledTo);
    showPager(shown.answer);
  }
  for (const caption of document.querySelectorAll("figcaption")) {
    caption.classList.toggle("current", isPointed() && caption.dataset.level === levelNow()?.name);
  }
  const drawn = [...$("cards").children];
  await Promise.all([fillPhotos(drawn, signal), fillMaps(drawn, signal)]);
}

// The image of the point comes first, wherever it is.
async function withQuery(cards, signal) {
  if (!isPointed()) return cards;
  const query = cards.find((card) => card.row === state.row) ?? (await ask("cards", { rows: state.row }, signal)).cards[0];
  return [query, ...cards.filter((card) => card.row !== state.row)];
}

function build(cards) {
  forget(new Set(cards.map((card) => card.row)));
  const levels = isPointed() ? maps() : [levelNow()].filter(Boolean);
  $("cards").style.setProperty("--tiles", Math.min(1 + levels.length, 5));
  $("cards").replaceChildren(...cards.map((card) => cardOf(card, levels)));
  const isEmpty = !cards.length;
  $("nothing").hidden = !isEmpty;
  $("nothing").textContent = state.find ? "No key holds this." : state.only ? "No image failed." : "There are no images here.";
}

function forget(rows) {
  cosines.clear();
  for (const [row, photo] of photos) {
    if (!rows.has(row)) {
      if (photo.url) URL.revokeObjectURL(photo.url);
      photos.delete(row);
    }
  }
}

function cardOf(card, levels) {
  const pictures = element("div", { className: "pictures" });
  const item = element("li", { "data-row": card.row, className: card.row === state.row ? "query" : "" }, pictures);
  item.card = card;
  if (card.status === "failed") {
    pictures.classList.add("still");
    const tile = tileOf(null, `failed: ${card.reason}`, true);
    tile.style.aspectRatio = `${(1 + levels.length) * store.input[1]} / ${store.input[0]}`; // as high as the others'
    pictures.append(element("figure", {}, tile));
  } else {
    const photo = element("figure", {}, tileOf(null, "", false, `photograph ${card.key}`));
    pictures.append(photo);
    for (const level of levels) {
      const tile = tileOf(level, card.status === "pending" ? "not written yet" : "", false, `${card.key}, ${level.name}`);
      pictures.append(element("figure", {}, tile));
    }
    if (isPointed() && levels.length) {
      photo.append(element("figcaption", {}, element("b", { text: "photograph" })));
      for (const [i, level] of levels.entries()) {
        const caption = element("figcaption", { "data-level": level.name }, element("b", { text: level.name }));
        caption.append(` ${level.method}, ${level.grid[0]} × ${level.grid[1]}`);
        pictures.children[1 + i].append(caption);
      }
    }
    if (card.status === "ok") listen(pictures, item);
    else pictures.classList.add("still");
    if (card.row === state.row && isPointed()) ring(pictures, inputOf(card, state.x, state.y));
  }
  const about = card.width ? `row ${card.row} · ${card.width} × ${card.height} px` : `row ${card.row} · ${card.status}`;
  item.append(element("div", { className: "caption" },
    element("span", { className: "key", text: card.key }),
    element("span", { className: "soft number", text: about }),
    element("span", { className: "vectors number" })));
  return item;
}

function tileOf(level, note, isBad, label = "") {
  const [height, width] = store.input;
  const tile = element("div", { className: level ? "tile map" : "tile photo" });
  tile.style.aspectRatio = `${width} / ${height}`;
  tile.level = level;
  if (level) {
    const canvas = element("canvas", { role: "img", "aria-label": label });
    const box = boxOf(level, 0, 0, level.grid[0], level.grid[1]);
    canvas.hidden = true;
    Object.assign(canvas.style, box);
    tile.append(canvas);
  } else if (label) {
    const image = element("img", { alt: label });
    image.hidden = true;
    tile.append(image);
  }
  tile.append(element("span", { className: isBad ? "note bad" : "note", text: note }));
  return tile;
}

function noteOn(tile, text, isBad = false) {
  const note = tile.querySelector(".note");
  note.textContent = text;
  note.className = isBad ? "note bad" : "note";
}

async function fillPhotos(items, signal) {
  const there = items.filter((item) => item.card.status !== "failed");
  const lacking = there.map((item) => item.card.row).filter((row) => !photos.has(row));
  for (const item of there) drawPhoto(item);
  await inBatches(lacking, async (rows) => {
    const { photos: found, body } = await ask("photos", { rows }, signal);
    let at = 0;
    for (const each of found) {
      const bytes = body.slice(at, at + each.bytes);
      at += each.bytes;
      photos.set(each.row, each.bytes ? { url: URL.createObjectURL(new Blob([bytes], { type: "image/jpeg" })) } : { reason: each.reason });
    }
    for (const item of there) if (rows.includes(item.card.row)) drawPhoto(item);
  });
}

function drawPhoto(item) {
  const photo = photos.get(item.card.row);
  const tile = item.querySelector(".tile.photo");
  const image = tile?.querySelector("img");
  if (!photo || !image) return;
  image.hidden = !photo.url;
  if (photo.url && image.src !== photo.url) image.src = photo.url;
  if (photo.reason) noteOn(tile, `no photograph: ${photo.reason}`);
}

async function fillMaps(items, signal) {
  const there = items.filter((item) => item.card.status === "ok");
  if (!there.length) return;
  if (isPointed()) await fillSimilar(there, signal);
  else if (levelNow()) await fillColours(there, levelNow(), signal);
}

async function fillColours(items, level, signal) {
  await inBatches(items.map((item) => item.card.row), async (rows) => {
    const { rows: there, grid: [height, width], body } = await ask("colours", { level: level.name, rows }, signal);
    const bytes = new Uint8Array(body);
    for (const item of items.filter((each) => rows.includes(each.card.row))) {
      const tile = item.querySelector(".tile.map");
      const i = there.indexOf(item.card.row);
      tile.level = level;
      tile.querySelector("canvas").setAttribute("aria-label", `${item.card.key}, colours of ${level.name}`);
      if (i < 0) { missing(tile); continue; }
      draw(tile, height, width, (cell) => bytes.subarray(3 * (i * height * width + cell), 3 * (i * height * width + cell) + 3));
    }
  });
}

function missing(tile) {
  tile.querySelector("canvas").hidden = true;
  noteOn(tile, "this level has no features of it");
}

function draw(tile, height, width, colourOf) {
  const canvas = tile.querySelector("canvas");
  const pixels = new ImageData(width, height);
  for (let cell = 0; cell < height * width; cell++) {
    const colour = colourOf(cell);
    if (colour) pixels.data.set([colour[0], colour[1], colour[2], 255], 4 * cell);
  }
  Object.assign(canvas, { width, height, hidden: false });
  Object.assign(canvas.style, boxOf(tile.level, 0, 0, tile.level.grid[0], tile.level.grid[1]));
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  noteOn(tile, "");
}

async function fillSimilar(items, signal) {
  heatColours ??= await ask("heat", {}, signal);
  const rows = items.map((item) => item.card.row);
  const { row, x, y } = state;
  drawSimilar(items);
  await Promise.all(store.levels.map(async (level) => {
    if (cosines.has(level.name)) return;
    const { rows: there, grid, body } = await ask("similar", { row, x, y, level: level.name, rows }, signal);
    const values = new Uint16Array(body);
    const cells = grid[0] * grid[1];
    cosines.set(level.name, { grid, rows: new Map(there.map((each, i) => [each, values.subarray(i * cells, (i + 1) * cells)])) });
    drawSimilar(items);
  }));
}

const cosineOf = (step) => ((step - 1) / 65534) * 2 - 1;

function drawSimilar(items) {
  const drawnLevels = [...cosines.entries()].filter(([name]) => !maps().length || maps().some((level) => level.name === name));
  const all = scaleOf(drawnLevels.flatMap(([, { rows }]) => [...rows.values()]));
  const isOwn = state.scale === "own";
  $("low").textContent = isOwn ? "lowest of the image" : all[0].toFixed(2);
  $("high").textContent = isOwn ? "its highest" : all[1].toFixed(2);
  drawBar();
  for (const item of items) {
    const { row } = item.card;
    const scale = isOwn ? scaleOf(drawnLevels.map(([, { rows }]) => rows.get(row) ?? [])) : all;
    for (const tile of item.querySelectorAll(".tile.map")) {
      const found = cosines.get(tile.level.name);
      if (!found) continue;
      const values = found.rows.get(row);
      if (!values) { missing(tile); continue; }
      draw(tile, ...found.grid, (cell) => values[cell] && heatOf(cosineOf(values[cell]), scale));
    }
    const told = vectors().map((level) => [level.name, cosines.get(level.name)?.rows.get(row)?.[0]])
      .filter(([, step]) => step).map(([name, step]) => `${name} ${cosineOf(step).toFixed(3)}`);
    if (isOwn && maps().length) told.unshift(`${scale[0].toFixed(2)} to ${scale[1].toFixed(2)}`);
    item.querySelector(".vectors").textContent = told.join(", ");
  }
}

const heatOf = (cosine, [low, high]) => heatColours[Math.round(255 * Math.min(1, Math.max(0, (cosine - low) / (high - low))))];

// What the lowest and the highest colour stand for: without the lowest 2 %, up to the highest cosine.
function scaleOf(maps) {
  const some = [];
  let highest = 0;
  for (const values of maps) {
    const step = Math.max(1, Math.floor(values.length / 784));
    for (let i = 0; i < values.length; i += step) if (values[i]) some.push(values[i]);
    for (const value of values) if (value > highest) highest = value;
  }
  if (!some.length) return [0, 1];
  some.sort((a, b) => a - b);
  const low = cosineOf(some[Math.floor(0.02 * some.length)]);
  return [Math.min(low, cosineOf(highest) - 1e-3), cosineOf(highest)];
}

function drawBar() {
  const pixels = new ImageData(256, 1);
  heatColours.forEach((colour, i) => pixels.data.set([...colour, 255], 4 * i));
  $("bar").getContext("2d").putImageData(pixels, 0, 0);
}

function tellPoint(card) {
  const where = maps().length ? `pixel (${state.x}, ${state.y}) of ` : "";
  $("point-text").textContent = state.show === "nearest"
    ? `The cells that are most like ${where}${card.key}, by cosine, ${searched().name}`
    : `Cosine with ${where}${card.key}`;
}

function showPager({ total, has_more: hasMore }) {
  const { from, count } = state;
  const last = Math.min(from + count, total);
  $("range").textContent = total ? `${(Math.min(from, total - 1) + 1).toLocaleString("en")}–${last.toLocaleString("en")} of ${total.toLocaleString("en")}${hasMore ? " or more" : ""}` : "";
  $("first").disabled = $("previous").disabled = from === 0;
  $("next").disabled = $("last").disabled = last >= total;
  $("pager").hidden = total === 0;
}

// --- cells ----------------------------------------------------------------------------------------------------------

// Places are in pixels of the model's input, which is what the pictures show.
const inputOf = (card, x, y) => [x * card.x_scale + card.x_offset, y * card.y_scale + card.y_offset];
const originalOf = (card, x, y) => [(x - card.x_offset) / card.x_scale, (y - card.y_offset) / card.y_scale];

function cellOf(level, [x, y]) {
  const row = Math.round((y - level.start[0]) / level.step[0]), column = Math.round((x - level.start[1]) / level.step[1]);
  const clamp = (value, size) => Math.min(size - 1, Math.max(0, value));
  return [clamp(row, level.grid[0]), clamp(column, level.grid[1])];
}

const centreOf = (level, [row, column]) => [level.start[1] + column * level.step[1], level.start[0] + row * level.step[0]];

function boxOf(level, row, column, rows = 1, columns = 1) {
  const [height, width] = store.input;
  const percent = (value, of) => `${(100 * value) / of}%`;
  return {
    left: percent(level.start[1] + (column - 0.5) * level.step[1], width), width: percent(columns * level.step[1], width),
    top: percent(level.start[0] + (row - 0.5) * level.step[0], height), height: percent(rows * level.step[0], height),
  };
}

function ring(pictures, [x, y]) {
  const [height, width] = store.input;
  if (!(x >= 0 && x <= width && y >= 0 && y <= height)) return; // of an address that somebody wrote
  for (const tile of pictures.querySelectorAll(".tile")) {
    const mark = element("span", { className: "ring" });
    Object.assign(mark.style, { left: `${(100 * x) / width}%`, top: `${(100 * y) / height}%` });
    tile.append(mark);
  }
}

function clearCells() {
  for (const each of document.querySelectorAll(".cell:not(.fixed)")) each.remove();
}

function markCell(item, place, level) {
  clearCells();
  const { card } = item;
  const [x, y] = originalOf(card, ...place).map((value) => value.toFixed(0));
  const told = [];
  if (level) {
    for (const tile of item.querySelectorAll(".tile")) {
      const own = tile.level ?? level;
      const box = element("span", { className: "cell" });
      Object.assign(box.style, boxOf(own, ...cellOf(own, place)));
      tile.append(box);
    }
    const [row, column] = cellOf(level, place);
    const found = cosines.get(level.name);
    const step = isPointed() && state.show === "images" && found?.rows.get(card.row)?.[row * found.grid[1] + column];
    if (step) told.push(`cosine ${cosineOf(step).toFixed(3)}`);
    told.push(`${level.name} row ${row}, column ${column}`, `pixel ${x}, ${y}`);
  }
  told.push(card.key);
  $("readout").textContent = told.join(" · ");
}

// What a picture of an image does: the pointer and the arrows choose a cell, click and Enter compare it.
function listen(pictures, item) {
  const [height, width] = store.input;
  pictures.tabIndex = 0;
  pictures.setAttribute("role", "button");
  pictures.setAttribute("aria-label", `${item.card.key}: arrows choose a cell, Enter shows what is similar to it`);
  const placeOf = (event) => {
    // Between two pictures: the one before.
    const tile = event.target.closest(".tile") ?? (event.target === pictures ? pictures.querySelector(".tile") : null);
    if (!tile) return null;
    const box = tile.getBoundingClientRect();
    const inside = (value) => Math.min(1, Math.max(0, value));
    return { tile, place: [inside((event.clientX - box.left) / box.width) * width, inside((event.clientY - box.top) / box.height) * height] };
  };
  pictures.addEventListener("pointermove", (event) => {
    const at = placeOf(event);
    if (at) markCell(item, at.place, at.tile.level ?? levelNow());
  });
  pictures.addEventListener("pointerleave", () => { clearCells(); $("readout").textContent = ""; });
  pictures.addEventListener("click", (event) => {
    const at = placeOf(event);
    if (at) choose(item.card, at.place);
  });
  pictures.addEventListener("blur", clearCells);
  pictures.addEventListener("keydown", (event) => {
    const level = levelNow();
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    const middle = level ? cellOf(level, [width / 2, height / 2]) : [0, 0];
    if (event.key in moves && level) {
      const [row, column] = item.cursor ? cellOf(level, item.cursor) : middle;
      const [down, right] = item.cursor ? moves[event.key] : [0, 0];
      item.cursor = centreOf(level, cellOf(level, centreOf(level, [row + down, column + right])));
      markCell(item, item.cursor, level);
    } else if (event.key === "Enter" || event.key === " ") {
      choose(item.card, item.cursor ?? (level ? centreOf(level, middle) : [width / 2, height / 2]));
    } else return;
    event.preventDefault();
  });
}

function choose(card, place) {
  // Addresses have tenths of pixels: at the picture's border, not the one that lies beyond it.
  const within = (value, size, by) => Math.min(size - 0.06 * by, Math.max(0.06 * by, value));
  const [x, y] = originalOf(card, within(place[0], store.input[1], card.x_scale), within(place[1], store.input[0], card.y_scale));
  const inside = (value, size) => Math.min(size, Math.max(0, Math.round(10 * value) / 10));
  const slack = 1 / Math.min(card.x_scale, card.y_scale);
  if (x < -slack || y < -slack || x > card.width + slack || y > card.height + slack) {
    $("readout").textContent = "There is no photograph at this place, only what fills the model's input.";
    return;
  }
  go({ show: "images", row: card.row, x: inside(x, card.width), y: inside(y, card.height) });
}

// --- nearest --------------------------------------------------------------------------------------------------------

async function showNearest(signal) {
  const { row, x, y, count, each } = state;
  const query = (await ask("cards", { rows: row }, signal)).cards[0];
  tellPoint(query);
  forget(new Set());
  $("cards").replaceChildren();
  $("progress").hidden = false;
  $("looked").value = 0;
  $("looked-text").textContent = "";
  const asked = { row, x, y, count, level: searched().name, ...(each === "image" ? { per_image: 1 } : {}) };
  const cells = await lastLine(await get("nearest", asked, signal));
  $("progress").hidden = true;
  $("cards").style.setProperty("--tiles", 1.4);
  $("cards").replaceChildren(...cells.map((cell) => nearCard(cell)));
  $("nothing").hidden = cells.length > 0;
  $("nothing").textContent = "No image has features of this level.";
  await fillPhotos([...$("cards").children], signal);
}

async function lastLine(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Problem("The server ended the search early; its terminal says why.");
    text += value;
    const lines = text.split("\n");
    text = lines.pop();
    for (const line of lines) {
      const said = JSON.parse(line);
      if (said.problem) throw new Problem(said.problem);
      if (said.cells) return said.cells;
      $("looked").value = said.looked_at / said.of;
      $("looked-text").textContent = `${said.looked_at.toLocaleString("en")} of ${said.of.toLocaleString("en")} images`;
    }
  }
}

function nearCard(cell) {
  const item = cardOf(cell, []);
  const level = searched();
  if (level.grid) {
    const box = element("span", { className: "cell fixed" });
    Object.assign(box.style, boxOf(level, ...cell.cell));
    item.querySelector(".tile").append(box);
  }
  item.querySelector(".vectors").textContent = `cosine ${cell.cosine.toFixed(3)}`;
  return item;
}

// --- failures -------------------------------------------------------------------------------------------------------

async function showFailures(signal) {
  const { failed, rows, groups } = await ask("failures", {}, signal);
  const all = element("button", { type: "button", text: "Show the failed images" });
  all.addEventListener("click", () => go({ ...START, level: state.level, only: "failed" }));
  $("failures").replaceChildren(
    element("p", { text: failed ? `${failed.toLocaleString("en")} of ${rows.toLocaleString("en")} images failed.` : `None of ${rows.toLocaleString("en")} images failed${known.complete ? "" : " so far"}.` }),
    ...groups.map((group) => {
      const examples = element("div", { className: "examples" });
      for (const { row, key } of group.examples) {
        const button = element("button", { type: "button", text: key });
        button.addEventListener("click", () => go({ ...START, level: state.level, from: row - (row % state.count), count: state.count }));
        examples.append(button);
      }
      return element("article", {}, element("h2", { text: `${group.count.toLocaleString("en")} × ${group.reason}` }), examples);
    }),
    ...(failed ? [all] : []));
}

// --- a store that is written ----------------------------------------------------------------------------------------

async function watch() {
  let again = 3000;
  try {
    const said = await ask("status");
    const rows = said.rows.toLocaleString("en"), finished = said.finished.toLocaleString("en");
    $("state").className = said.is_complete ? "" : "writing";
    $("state").textContent = said.is_complete ? `complete, ${rows} images` : `${finished} of ${rows} images; ${said.state}`;
    $("failed").textContent = said.failed ? said.failed.toLocaleString("en") : "";
    const isAnother = known.fingerprint && known.fingerprint !== said.fingerprint;
    const isFurther = known.finished >= 0 && (known.finished !== said.finished || known.complete !== said.is_complete);
    known = { fingerprint: said.fingerprint, finished: said.finished, complete: said.is_complete };
    again = said.is_complete ? 15000 : 3000;
    if (isAnother) await restart();
    else if (isFurther) await refresh();
  } catch (error) {
    $("state").className = "lost";
    $("state").textContent = error instanceof Problem ? error.message : "the server doesn't answer; was it stopped?";
    again = 15000;
  }
  setTimeout(watch, again);
}

async function restart() {
  store = await ask("store");
  shown = { key: "", answer: null };
  describe();
  await render();
}

// Cards that have changed are made anew; the others stay as they are.
async function refresh() {
  if (state.show === "failures") { await render(); return; }
  if (state.show !== "images" || !shown.answer) return;
  const { find, only, from, count } = state;
  const { signal } = running;
  const answer = await ask("cards", { find, only, from, count }, signal);
  const was = new Map(shown.answer.cards.map((card) => [card.row, card.status]));
  shown = { key: JSON.stringify([find, only, from, count]), answer };
  if (answer.cards.length !== was.size || answer.cards.some((card) => was.get(card.row) !== card.status)) await redraw(answer, signal);
}

async function redraw(answer, signal) {
  const cards = await withQuery(answer.cards, signal);
  const there = new Map([...$("cards").children].map((item) => [item.card.row, item]));
  const levels = isPointed() ? maps() : [levelNow()].filter(Boolean);
  const items = cards.map((card) => (there.get(card.row)?.card.status === card.status ? there.get(card.row) : cardOf(card, levels)));
  $("cards").replaceChildren(...items);
  $("nothing").hidden = items.length > 0;
  showPager(answer);
  cosines.clear();
  const changed = items.filter((item) => there.get(item.card.row) !== item);
  await Promise.all([fillPhotos(changed, signal), fillMaps(isPointed() ? items : changed, signal)]);
}

// --- beginning ------------------------------------------------------------------------------------------------------

function describe() {
  $("name").textContent = store.name;
  $("about").textContent = `${store.title} · ${store.url}`;
  document.title = `${store.name} - Raylift`;
  const said = [
    store.is_random ? "The weights are random: these features show that the pipeline works, not what good features look like." : "",
    maps().length ? "" : "This store holds one vector for each image and no maps: a click compares images as a whole.",
  ].filter(Boolean);
  $("warning").textContent = said.join(" ");
  $("warning").hidden = !said.length;
}

function stepLevel(by) {
  const to = maps()[maps().indexOf(levelNow()) + by];
  if (to) go({ level: to.name }, { replace: true });
}

function page(by) {
  const to = Math.max(0, state.from + by * state.count);
  if (state.show === "images" && shown.answer && to !== state.from && to < shown.answer.total) { go({ from: to }); scrollTo(0, 0); }
}

function stepBack() {
  if (state.show === "nearest") go({ show: "images" });
  else if (state.show === "failures") go({ show: "images" });
  else if (isPointed()) go({ row: null, x: null, y: null });
  else if (state.find || state.only) go({ find: "", only: "", from: 0 });
}

function begin() {
  let typing = 0;
  const search = (replace) => { clearTimeout(typing); if ($("find").value !== state.find) go({ find: $("find").value, from: 0, show: "images" }, { replace }); };
  $("find").addEventListener("input", () => { clearTimeout(typing); typing = setTimeout(search, 250, true); });
  $("controls").addEventListener("submit", (event) => { event.preventDefault(); search(false); });
  $("level").addEventListener("input", () => go({ level: maps()[Number($("level").value)].name }, { replace: true }));
  $("count").addEventListener("change", () => go({ count: Number($("count").value), from: state.from - (state.from % Number($("count").value)) }));
  $("only").addEventListener("change", () => go({ only: $("only").checked ? "failed" : "", from: 0, show: "images" }));
  $("each").addEventListener("change", () => go({ each: $("each").checked ? "image" : "cell" }));
  $("own").addEventListener("change", () => go({ scale: $("own").checked ? "own" : "all" }, { replace: true }));
  $("to-images").addEventListener("click", () => go({ show: "images" }));
  $("to-failures").addEventListener("click", () => go({ show: "failures" }));
  $("nearest").addEventListener("click", () => go({ show: "nearest" }));
  $("maps").addEventListener("click", () => go({ show: "images" }));
  $("back").addEventListener("click", () => go({ show: "images", row: null, x: null, y: null }));
  $("cancel").addEventListener("click", () => go({ show: "images" }));
  $("first").addEventListener("click", () => { go({ from: 0 }); scrollTo(0, 0); });
  $("previous").addEventListener("click", () => page(-1));
  $("next").addEventListener("click", () => page(1));
  $("last").addEventListener("click", () => { const { total } = shown.answer; go({ from: Math.floor((total - 1) / state.count) * state.count }); scrollTo(0, 0); });
  $("link").addEventListener("click", async () => {
    try { await navigator.clipboard.writeText(location.href); $("readout").textContent = "copied: it opens this view in this browser"; }
    catch { $("readout").textContent = location.href; }
  });
  addEventListener("popstate", render);
  addEventListener("keydown", (event) => {
    const isTyping = event.target.matches?.("input[type='search'], select");
    if (event.key === "Escape") {
      if (isTyping) event.target.blur();
      if (!isTyping || !$("find").value) stepBack();
      else { $("find").value = ""; search(false); }
    } else if (isTyping || event.ctrlKey || event.metaKey || event.altKey) return;
    else if (event.key === "/") { $("find").focus(); $("find").select(); }
    else if (event.key === "[") stepLevel(-1);
    else if (event.key === "]") stepLevel(1);
    else if (event.key === "n") page(1);
    else if (event.key === "p") page(-1);
    else return;
    event.preventDefault();
  });
}

async function start() {
  history.replaceState(null, "", location.pathname + location.hash); // the token is a cookie by now
  try {
    store = await ask("store");
    describe();
    begin();
    await Promise.all([render(), watch()]);
  } catch (error) {
    tellProblem(error);
  }
}

start();
