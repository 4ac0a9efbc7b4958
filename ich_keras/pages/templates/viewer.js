// @ts-check
"use strict";

/**
 * The slice viewer of a page. Everything lies in the page: `#facts` (JSON) says what there is,
 * `#pixels-N` and `#maps-N` hold one packed slice per line (`ich_keras/pages/packing.py`).
 *
 * @typedef {{name: string, rows: number, columns: number, from: number,
 *   peak: number | null}} HeatMap
 * @typedef {{
 *   title: string, rows: number, columns: number, row_mm: number, column_mm: number,
 *   letters: [string, string, string, string], axial: boolean, ends: [string, string],
 *   z_mm: number[], along_mm: number[], images: string[], labels: string[],
 *   curves: Object<string, (number | null)[]>, maps: HeatMap[], start: number, shown: string
 * }} Series
 * @typedef {{rows: number, columns: number, values: Uint8Array}} Heat
 */
(function () {
  const LOW_HU = -1024, HIGH_HU = 3071;
  const KEPT_BYTES = 64 * 2 ** 20; // unpacked slices and heat maps that stay in memory
  const AHEAD = 3; // slices on either side that are unpacked before they are asked for
  const PAGE = 5; // slices of PageUp and PageDown
  const STRIDE = 10; // pixels of the marker with Shift
  const WHEEL = 50; // pixels of a wheel or trackpad per slice
  const FINGER = 10; // pixels of a finger per slice
  const MOST_CURVES = 12;
  const GAP = 1.5; // of the distances beside: no line joins slices farther apart
  const SVG = "http://www.w3.org/2000/svg";

  /** @param {string} id @returns {any} */
  const at = (id) => document.getElementById(id);
  /** @type {{series: Series[], presets: {name: string, level: number, width: number}[]}} */
  const facts = JSON.parse(at("facts").textContent);
  const stage = at("stage"), canvas = /** @type {HTMLCanvasElement} */ (at("canvas"));
  const pen = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  const slider = /** @type {HTMLInputElement} */ (at("slice"));
  const levelBox = /** @type {HTMLInputElement} */ (at("level"));
  const widthBox = /** @type {HTMLInputElement} */ (at("width"));
  const heatBox = /** @type {HTMLInputElement} */ (at("heat"));
  const opacityBox = /** @type {HTMLInputElement} */ (at("opacity"));
  const curve = at("curve");

  let chosen = 0; // number of the series
  let current = 0; // slice, from the most inferior
  let level = facts.presets[0].level, width = facts.presets[0].width;
  /** @type {Int16Array | null} */
  let pixels = null; // of the slice on the canvas
  /** @type {string[]} */
  const labels = facts.series.map((one) => one.shown);
  const places = facts.series.map((one) => one.start);
  // A label may be called "constructor", which every object has.
  const curves = facts.series.map((one) => new Map(Object.entries(one.curves)));

  /* Unpacking */

  /** @type {Map<string, string[]>} */
  const texts = new Map();
  /** @param {string} id @param {number} number @returns {string} */
  function lineOf(id, number) {
    let lines = texts.get(id);
    if (lines === undefined) {
      const element = at(id);
      lines = element.textContent.trim().split("\n");
      element.remove(); // it would be in memory twice
      texts.set(id, lines || []);
    }
    return lines === undefined ? "" : lines[number];
  }

  /** @param {string} line @param {number} count @returns {Promise<Uint16Array>} folded differences */
  async function unpacked(line, count) {
    const raw = atob(line), packed = new Uint8Array(raw.length);
    for (let place = 0; place < raw.length; place++) packed[place] = raw.charCodeAt(place);
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    const planes = new Uint8Array(await new Response(stream).arrayBuffer());
    if (planes.length !== 2 * count) throw new Error("its length is wrong");
    const folded = new Uint16Array(count);
    for (let place = 0; place < count; place++) {
      folded[place] = planes[place] | (planes[count + place] << 8);
    }
    return folded;
  }

  /** @param {Series} one @param {number} series @param {number} slice */
  async function readSlice(one, series, slice) {
    const count = one.rows * one.columns, hu = new Int16Array(count);
    const folded = await unpacked(lineOf(`pixels-${series}`, slice), count);
    let value = LOW_HU;
    for (let place = 0; place < count; place++) {
      value += (folded[place] >>> 1) ^ -(folded[place] & 1);
      hu[place] = value;
    }
    return hu;
  }

  /** @param {HeatMap} map @param {number} series @param {number} slice @returns {Promise<Heat>} */
  async function readHeat(map, series, slice) {
    const count = map.rows * map.columns, values = new Uint8Array(count);
    const folded = await unpacked(lineOf(`maps-${series}`, map.from + slice), count);
    let value = 0;
    for (let place = 0; place < count; place++) {
      value += (folded[place] >>> 1) ^ -(folded[place] & 1);
      values[place] = value;
    }
    return { rows: map.rows, columns: map.columns, values };
  }

  /** What was unpacked or is being unpacked; the longest unused goes first.
   * @type {Map<string, {done: any, promise: Promise<any>, bytes: number}>} */
  const kept = new Map();
  /** @param {string} key @param {number} bytes @param {() => Promise<any>} read */
  function keep(key, bytes, read) {
    let entry = kept.get(key);
    if (entry === undefined) {
      const made = { done: null, promise: Promise.resolve(null), bytes };
      made.promise = read().then((found) => (made.done = found));
      made.promise.catch(() => kept.delete(key));
      entry = made;
    }
    kept.delete(key);
    kept.set(key, entry);
    let total = 0;
    for (const one of kept.values()) total += one.bytes;
    for (const [name, one] of kept) {
      if (total <= KEPT_BYTES || name === key) break;
      total -= one.bytes;
      kept.delete(name);
    }
    return entry;
  }

  /** @param {number} slice */
  function sliceEntry(slice) {
    const one = facts.series[chosen], series = chosen;
    return keep(`${series}/${slice}`, one.rows * one.columns * 2, () =>
      readSlice(one, series, slice));
  }

  /** @returns {HeatMap | undefined} */
  function chosenMap() {
    return facts.series[chosen].maps.find((map) => map.name === labels[chosen]);
  }

  /** @param {number} slice */
  function heatEntry(slice) {
    const map = heatBox.checked ? chosenMap() : undefined, series = chosen;
    if (map === undefined) return null;
    return keep(`${series}/${slice}/${map.name}`, map.rows * map.columns, () =>
      readHeat(map, series, slice));
  }

  /* Drawing */

  let turn = 0; // of drawing: one that was overtaken is not shown
  async function draw() {
    const mine = ++turn, slice = current;
    const ofPixels = sliceEntry(slice), ofHeat = heatEntry(slice);
    try {
      // What is there already is drawn at once, without a detour.
      const hu = ofPixels.done || (await ofPixels.promise);
      const heat = ofHeat === null ? null : ofHeat.done || (await ofHeat.promise);
      if (mine !== turn) return;
      paint(hu, heat);
      at("trouble").hidden = true;
    } catch (error) {
      if (mine !== turn) return;
      pixels = null;
      pen.clearRect(0, 0, canvas.width, canvas.height);
      at("trouble").textContent = typeof DecompressionStream === "undefined"
        ? "This browser is too old to unpack the slices."
        : `Slice ${slice + 1} cannot be unpacked: the file is damaged. Make the page again.`;
      at("trouble").hidden = false;
    }
    stage.dataset.drawn = `${chosen}/${slice}/${level}/${width}`;
    stage.dataset.heat = ofHeat === null ? "" : `${labels[chosen]}/${opacityBox.value}`;
    for (let far = 1; far <= AHEAD; far++) {
      for (const next of [slice + far, slice - far]) {
        if (next >= 0 && next < facts.series[chosen].z_mm.length) {
          sliceEntry(next);
          heatEntry(next);
        }
      }
    }
  }

  /** @param {Int16Array} hu @param {Heat | null} heat */
  function paint(hu, heat) {
    pixels = hu;
    const image = pen.createImageData(canvas.width, canvas.height), out = image.data;
    const low = level - width / 2, greys = new Uint8Array(HIGH_HU - LOW_HU + 1);
    for (let place = 0; place < greys.length; place++) {
      const share = (place + LOW_HU - low) / width;
      greys[place] = Math.floor(255 * Math.min(1, Math.max(0, share)) + 0.5);
    }
    for (let place = 0, to = 0; place < hu.length; place++, to += 4) {
      out[to] = out[to + 1] = out[to + 2] = greys[hu[place] - LOW_HU];
      out[to + 3] = 255;
    }
    if (heat !== null) warm(out, heat, Number(opacityBox.value) / 100);
    pen.putImageData(image, 0, 0);
  }

  /** Lay a heat map over a slice: yellow to red, the stronger the less transparent.
   * @param {Uint8ClampedArray} out @param {Heat} heat @param {number} opacity */
  function warm(out, heat, opacity) {
    const { rows, columns } = canvasSize(), values = heat.values;
    for (let row = 0, to = 0; row < rows; row++) {
      const y = Math.min(heat.rows - 1, Math.max(0, ((row + 0.5) * heat.rows) / rows - 0.5));
      const top = Math.floor(y), down = y - top;
      const upper = top * heat.columns, lower = Math.min(top + 1, heat.rows - 1) * heat.columns;
      for (let column = 0; column < columns; column++, to += 4) {
        const x = Math.min(
          heat.columns - 1, Math.max(0, ((column + 0.5) * heat.columns) / columns - 0.5));
        const left = Math.floor(x), over = x - left, right = Math.min(left + 1, heat.columns - 1);
        const above = values[upper + left] * (1 - over) + values[upper + right] * over;
        const below = values[lower + left] * (1 - over) + values[lower + right] * over;
        const share = (above * (1 - down) + below * down) / 255, alpha = share * opacity;
        out[to] = Math.floor(out[to] * (1 - alpha) + 255 * alpha + 0.5);
        out[to + 1] = Math.floor(out[to + 1] * (1 - alpha) + 220 * (1 - share) * alpha + 0.5);
        out[to + 2] = Math.floor(out[to + 2] * (1 - alpha) + 0.5);
      }
    }
  }

  function canvasSize() {
    return { rows: canvas.height, columns: canvas.width };
  }

  /* What is said about it */

  /** @param {number} number @param {number} digits */
  const told = (number, digits) => number.toFixed(digits).replace("-", "\u2212");
  /** @param {number | null} probability */
  const chance = (probability) => (probability === null ? "none" : probability.toFixed(3));

  let speaking = 0;
  function tell() {
    const one = facts.series[chosen], count = one.z_mm.length;
    const image = one.images[current] === "" ? "" : `image ${one.images[current]}`;
    const z = one.axial
      ? `z ${told(one.z_mm[current], 1)} mm` : `position ${told(one.along_mm[current], 1)} mm`;
    at("where").textContent = [`Slice ${current + 1} of ${count}`, z, image]
      .filter(Boolean).join("\n");
    at("window-told").textContent = `L ${told(level, 0)}\nW ${told(width, 0)}`;
    const values = curves[chosen].get(labels[chosen]);
    const also = values === undefined ? "" : `, ${labels[chosen]} ${chance(values[current])}`;
    const text = `Slice ${current + 1} of ${count}, ${z}${also}`;
    slider.value = String(current + 1);
    slider.setAttribute("aria-valuetext", text);
    curve.setAttribute("aria-valuenow", String(current + 1));
    curve.setAttribute("aria-valuetext", text);
    canvas.setAttribute("aria-label", `${one.title}, ${text}`);
    levelBox.value = String(level);
    widthBox.value = String(width);
    for (const button of document.querySelectorAll("[data-preset]")) {
      const preset = facts.presets[Number(button.getAttribute("data-preset"))];
      const is = preset.level === level && preset.width === width;
      button.setAttribute("aria-pressed", String(is));
    }
    for (const button of document.querySelectorAll(`#series-${chosen} [data-slice]`)) {
      const is = Number(button.getAttribute("data-slice")) === current;
      if (is) button.setAttribute("aria-current", "true");
      else button.removeAttribute("aria-current");
    }
    mark();
    const active = document.activeElement;
    window.clearTimeout(speaking);
    // A slider says its own value.
    if (active !== slider && active !== curve) {
      speaking = window.setTimeout(() => (at("spoken").textContent = text), 400);
    }
  }

  /** @type {{x: number, y: number} | null} */
  let under = null; // the pointer, in the window
  /** @type {{row: number, column: number} | null} */
  let marked = null; // the pixel that keys have chosen
  /** The pixel whose value is shown: that under the pointer, or the marked one. */
  function probed() {
    const { rows, columns } = canvasSize();
    if (marked !== null) return marked;
    if (under === null) return null;
    const box = canvas.getBoundingClientRect();
    const column = Math.floor(((under.x - box.left) / box.width) * columns);
    const row = Math.floor(((under.y - box.top) / box.height) * rows);
    return row >= 0 && row < rows && column >= 0 && column < columns ? { row, column } : null;
  }
  function probe() {
    const place = probed(), { rows, columns } = canvasSize(), cross = at("cross");
    let text = "";
    if (place !== null && pixels !== null) {
      const hu = pixels[place.row * columns + place.column];
      const sign = hu === HIGH_HU ? "\u2265 " : hu === LOW_HU ? "\u2264 " : "";
      text = `${sign}${told(hu, 0)} HU\nrow ${place.row + 1}, column ${place.column + 1}`;
    }
    at("under").textContent = text;
    cross.hidden = marked === null;
    if (marked !== null) {
      cross.style.left = `${(100 * (marked.column + 0.5)) / columns}%`;
      cross.style.top = `${(100 * (marked.row + 0.5)) / rows}%`;
    }
    return text;
  }

  /** @param {number} down @param {number} right */
  function move(down, right) {
    const { rows, columns } = canvasSize();
    const from = probed() || { row: Math.floor(rows / 2), column: Math.floor(columns / 2) };
    const isNew = marked === null;
    marked = isNew ? from : {
      row: Math.min(rows - 1, Math.max(0, from.row + down)),
      column: Math.min(columns - 1, Math.max(0, from.column + right)),
    };
    window.clearTimeout(speaking);
    const text = probe();
    speaking = window.setTimeout(() => (at("spoken").textContent = text), 400);
  }
  function unmark() {
    marked = null;
    probe();
  }

  /* The curve: probability along z */

  /** @param {string} name @param {Object<string, string | number>} settings */
  function shape(name, settings) {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(settings)) made.setAttribute(key, String(value));
    return made;
  }

  /** The share of the width at which a slice lies. @param {number} slice */
  function share(slice) {
    const along = facts.series[chosen].along_mm, last = along.length - 1;
    const length = along[last] - along[0];
    return length > 0 ? (along[slice] - along[0]) / length : 0.5;
  }

  /** The parts of a curve without a missing value or slice: the points of each.
   * @param {(number | null)[]} values @returns {[number, number][][]} */
  function partsOf(values) {
    const along = facts.series[chosen].along_mm;
    // Many heads are thin below and thick above: what is usual is told by the distances beside.
    const distances = along.slice(1).map((mm, place) => mm - along[place]);
    const usual = distances.map((own, place) => {
      const beside = [distances[place - 1], distances[place + 1]].filter((mm) => mm !== undefined);
      return beside.length > 0 ? Math.max(...beside) : own;
    });
    /** @type {[number, number][][]} */
    const parts = [];
    let last = -2; // the slice of the last point
    values.forEach((value, slice) => {
      if (value === null) return;
      const isNext = last === slice - 1 && distances[last] <= GAP * usual[last];
      if (!isNext) parts.push([]);
      parts[parts.length - 1].push([1000 * share(slice), 100 * (1 - value)]);
      last = slice;
    });
    return parts;
  }

  function drawCurve() {
    const one = facts.series[chosen], plot = at("plot"), names = [...curves[chosen].keys()];
    at("curves").hidden = names.length === 0;
    plot.replaceChildren();
    for (const y of [0, 50, 100]) {
      plot.append(shape("line", { x1: 0, x2: 1000, y1: y, y2: y, class: "grid" }));
    }
    const order = names.length > MOST_CURVES ? [] : names.filter((n) => n !== labels[chosen]);
    for (const name of [...order, labels[chosen]]) {
      const is = name === labels[chosen] ? " chosen" : "";
      const tint = `line tint-${one.labels.indexOf(name) % 8}${is}`;
      for (const part of partsOf(curves[chosen].get(name) || [])) {
        const points = part.map(([x, y]) => `${x.toFixed(1)},${y.toFixed(1)}`);
        if (points.length > 1) {
          plot.append(shape("polyline", { points: points.join(" "), class: tint }));
        } else { // a line without length, which has round ends, is a dot
          const [x, y] = points[0].split(",");
          plot.append(shape("line", { x1: x, x2: x, y1: y, y2: y, class: `dot ${tint}` }));
        }
      }
    }
    plot.append(shape("line", { x1: 0, x2: 0, y1: 0, y2: 100, class: "here", id: "here" }));
    at("curve-label").textContent = labels[chosen];
    const along = one.axial ? "along z" : "through the slices";
    at("curve-along").textContent = along;
    at("end-first").textContent = one.ends[0];
    at("end-last").textContent = one.ends[1];
    curve.setAttribute("aria-label", `Probability of ${labels[chosen]} ${along}`);
    curve.setAttribute("aria-valuemax", String(one.z_mm.length));
  }

  function mark() {
    const line = at("here"), x = String(1000 * share(current));
    if (line !== null) {
      line.setAttribute("x1", x);
      line.setAttribute("x2", x);
    }
    const values = curves[chosen].get(labels[chosen]);
    at("curve-value").textContent = values === undefined ? "" : chance(values[current]);
  }

  /* What a person does */

  /** @param {number} slice */
  function go(slice) {
    const last = facts.series[chosen].z_mm.length - 1;
    const next = Math.min(last, Math.max(0, slice));
    if (next === current) return;
    current = places[chosen] = next;
    tell();
    draw().then(probe);
  }

  /** @param {number} newLevel @param {number} newWidth */
  function setWindow(newLevel, newWidth) {
    level = Math.round(Math.min(HIGH_HU, Math.max(LOW_HU, newLevel)));
    width = Math.round(Math.min(HIGH_HU - LOW_HU + 1, Math.max(1, newWidth)));
    tell();
    draw();
  }

  /** @param {string} label */
  function setLabel(label) {
    labels[chosen] = label;
    drawCurve();
    heatControls();
    tell();
    draw();
  }

  function heatControls() {
    const hasMaps = facts.series[chosen].maps.length > 0, map = chosenMap();
    at("heat-controls").hidden = !hasMaps;
    at("heat-note").textContent = map === undefined
      ? `There is no heat map of ${labels[chosen]}.`
      : map.peak === null ? `Nothing in this series speaks for ${labels[chosen]}.`
      : `Shown: ${labels[chosen]}.`;
    const peak = at("heat-peak"), place = map === undefined ? null : map.peak;
    peak.hidden = place === null;
    peak.dataset.slice = String(place);
    peak.textContent = `Strongest: slice ${Number(place) + 1}`;
    opacityBox.disabled = !heatBox.checked || map === undefined;
    at("opacity-told").textContent = `${opacityBox.value} %`;
    opacityBox.setAttribute("aria-valuetext", `${opacityBox.value} percent`);
  }

  /** @param {number} series */
  function setSeries(series) {
    chosen = series;
    current = places[series];
    const one = facts.series[series];
    for (const element of document.querySelectorAll(".of-series")) {
      /** @type {HTMLElement} */ (element).hidden = element.id !== `series-${series}`;
    }
    marked = null; // another series may have other pixels
    canvas.width = one.columns;
    canvas.height = one.rows;
    const wide = one.columns * one.column_mm, high = one.rows * one.row_mm;
    stage.style.aspectRatio = `${wide} / ${high}`;
    stage.style.maxWidth = `calc(68vh * ${wide / high})`;
    ["left", "right", "top", "bottom"].forEach((side, place) => {
      at(`letter-${side}`).textContent = one.letters[place];
    });
    const ticks = [100, 50, 20, 10, 5, 2, 1].find((mm) => mm <= wide / 3) || 1;
    at("scale").style.width = `${(100 * ticks) / wide}%`;
    at("scale-told").textContent = `${ticks} mm`;
    slider.max = String(one.z_mm.length);
    drawCurve();
    heatControls();
    tell();
    draw().then(probe);
  }

  /** @param {KeyboardEvent} event */
  function onKey(event) {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const last = facts.series[chosen].z_mm.length - 1;
    /** @type {Object<string, () => void>} */
    const moves = {
      ArrowUp: () => go(current + 1), ArrowRight: () => go(current + 1),
      ArrowDown: () => go(current - 1), ArrowLeft: () => go(current - 1),
      PageUp: () => go(current + PAGE), PageDown: () => go(current - PAGE),
      Home: () => go(0), End: () => go(last),
    };
    /** @type {Object<string, () => void>} */
    const windows = {
      ArrowUp: () => setWindow(level + 5, width), ArrowDown: () => setWindow(level - 5, width),
      ArrowRight: () => setWindow(level, width + 10),
      ArrowLeft: () => setWindow(level, width - 10),
    };
    const preset = facts.presets[Number(event.key) - 1];
    const keys = event.shiftKey ? windows : moves;
    let act = Object.hasOwn(keys, event.key) ? keys[event.key] : undefined;
    if (preset !== undefined) act = () => setWindow(preset.level, preset.width);
    const letter = event.key.toLowerCase();
    if (letter === "h" && !at("heat-controls").hidden) act = () => heatBox.click();
    const step = event.shiftKey ? STRIDE : 1;
    /** @type {Object<string, () => void>} */
    const marks = {
      i: () => move(-step, 0), k: () => move(step, 0),
      j: () => move(0, -step), l: () => move(0, step),
    };
    if (Object.hasOwn(marks, letter)) act = marks[letter];
    if (event.key === "Escape" && marked !== null) act = unmark;
    if (act === undefined) return;
    event.preventDefault();
    act();
  }

  let rolled = 0;
  /** @param {WheelEvent} event */
  function onWheel(event) {
    if (event.ctrlKey) return; // the browser's zoom
    event.preventDefault();
    const pixelsPerUnit = event.deltaMode === 0 ? 1 : event.deltaMode === 1 ? WHEEL / 3 : WHEEL;
    // A notch of a wheel is one slice, however many pixels it is said to be.
    const delta = Math.max(-WHEEL, Math.min(WHEEL, event.deltaY * pixelsPerUnit));
    rolled = Math.sign(rolled) === -Math.sign(delta) ? delta : rolled + delta;
    const steps = Math.trunc(rolled / WHEEL);
    rolled -= steps * WHEEL;
    if (steps !== 0) go(current - steps);
  }

  /** Pointers that are down, and where. @type {Map<number, {x: number, y: number}>} */
  const down = new Map();
  /** @type {{x: number, y: number, slice: number, level: number, width: number, fingers: number}
   *   | null} */
  let drag = null;
  function middle() {
    const points = [...down.values()];
    return {
      x: points.reduce((sum, one) => sum + one.x, 0) / points.length,
      y: points.reduce((sum, one) => sum + one.y, 0) / points.length,
    };
  }
  function beginDrag() {
    drag = down.size === 0
      ? null : { ...middle(), slice: current, level, width, fingers: down.size };
  }

  /** @param {PointerEvent} event */
  function onDown(event) {
    if (event.button !== 0) return;
    stage.setPointerCapture(event.pointerId);
    down.set(event.pointerId, { x: event.clientX, y: event.clientY });
    beginDrag();
  }

  /** @param {PointerEvent} event */
  function onMove(event) {
    under = { x: event.clientX, y: event.clientY };
    marked = null;
    if (down.has(event.pointerId) && drag !== null) {
      down.set(event.pointerId, { x: event.clientX, y: event.clientY });
      const now = middle(), right = now.x - drag.x, below = now.y - drag.y;
      if (event.pointerType === "touch" && drag.fingers === 1) {
        go(drag.slice - Math.trunc(below / FINGER));
      } else {
        const step = Math.max(1, Math.round(drag.width / 100));
        setWindow(drag.level + below * step, drag.width + right * step);
      }
    }
    probe();
  }

  /** @param {PointerEvent} event */
  function onUp(event) {
    down.delete(event.pointerId);
    beginDrag();
  }

  /** @param {PointerEvent} event */
  function onCurve(event) {
    if (event.type === "pointermove" && event.buttons === 0) return;
    const box = at("plot").getBoundingClientRect(), one = facts.series[chosen];
    const wanted = (event.clientX - box.left) / box.width;
    let best = 0;
    for (let slice = 1; slice < one.z_mm.length; slice++) {
      if (Math.abs(share(slice) - wanted) < Math.abs(share(best) - wanted)) best = slice;
    }
    go(best);
  }

  stage.addEventListener("keydown", onKey);
  curve.addEventListener("keydown", onKey);
  stage.addEventListener("wheel", onWheel, { passive: false });
  stage.addEventListener("pointerdown", onDown);
  stage.addEventListener("pointermove", onMove);
  stage.addEventListener("pointerup", onUp);
  stage.addEventListener("pointercancel", onUp);
  stage.addEventListener("pointerleave", () => {
    under = null;
    probe();
  });
  curve.addEventListener("pointerdown", onCurve);
  curve.addEventListener("pointermove", onCurve);
  slider.addEventListener("input", () => go(Number(slider.value) - 1));
  for (const box of [levelBox, widthBox]) {
    box.addEventListener("change", () => {
      const values = [levelBox, widthBox].map((one) => one.valueAsNumber);
      if (values.every(Number.isFinite)) setWindow(values[0], values[1]);
      else tell(); // what was there before
    });
  }
  for (const box of [heatBox, opacityBox]) {
    box.addEventListener("input", () => {
      heatControls();
      draw();
    });
  }
  document.addEventListener("click", (event) => {
    const button = /** @type {Element} */ (event.target).closest("[data-slice], [data-preset]");
    if (button === null) return;
    const preset = button.getAttribute("data-preset");
    if (preset === null) {
      if (button.hasAttribute("data-label")) choose(String(button.getAttribute("data-label")));
      go(Number(button.getAttribute("data-slice")));
    } else {
      const { level: newLevel, width: newWidth } = facts.presets[Number(preset)];
      setWindow(newLevel, newWidth);
    }
  });
  /** @param {string} name @param {string} value */
  function check(name, value) {
    for (const box of document.querySelectorAll(`input[name="${name}"]`)) {
      const radio = /** @type {HTMLInputElement} */ (box);
      radio.checked = radio.value === value;
    }
  }
  /** @param {string} label */
  function choose(label) {
    check(`label-${chosen}`, label);
    setLabel(label);
  }
  // After "back", a browser restores what fields held, without a word and after this script ran.
  window.addEventListener("pageshow", () => {
    check("series", String(chosen));
    labels.forEach((label, series) => check(`label-${series}`, label));
    heatControls();
    tell();
    draw();
  });
  document.addEventListener("change", (event) => {
    const box = /** @type {HTMLInputElement} */ (event.target);
    if (box.name === "series") setSeries(Number(box.value));
    if (box.name === `label-${chosen}`) setLabel(box.value);
  });

  // A browser may bring back what was chosen before the page was loaded again.
  heatBox.checked = facts.series.some((one) => one.maps.length > 0) && heatBox.checked;
  document.documentElement.classList.add("scripted");
  at("viewer").hidden = false;
  const first = /** @type {HTMLInputElement | null} */ (
    document.querySelector('input[name="series"]:checked'));
  setSeries(first === null ? 0 : Number(first.value));
})();
