"use strict";
(async () => {
  const $ = id => document.getElementById("viewer-" + id);
  const { images, models } = JSON.parse($("data").textContent);
  const picture = $("picture"), maps = $("maps"), text = $("text");
  const labels = 26, gap = 4; // pixels beside and between the maps
  const state = { model: 0, image: 0, query: 0, map: null };
  const pictures = await Promise.all(images.map(address => {
    const image = new Image();
    image.src = address;
    return image.decode().then(() => image);
  }));

  // Weights are bytes relative to the maximum of their row, which follow as numbers.
  async function decode(model) {
    if (model.weights) return;
    const packed = Uint8Array.from(atob(model.data), letter => letter.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    const content = await new Response(stream).arrayBuffer();
    const count = model.shape.reduce((a, b) => a * b);
    model.weights = new Uint8Array(content, 0, count);
    const rows = count / model.shape[4];
    model.maxima = new Float32Array(content.slice(count, count + 4 * rows));
    const end = count + 4 * rows * (1 + model.prefix);
    model.toPrefix = new Float32Array(content.slice(count + 4 * rows, end));
    if (model.grids) model.places = new Int32Array(content.slice(end));
    delete model.data;
  }

  const viridis = [[68, 1, 84], [72, 40, 120], [62, 74, 137], [49, 104, 142], [38, 130, 142], [31, 158, 137],
    [53, 183, 121], [109, 205, 89], [180, 222, 44], [253, 231, 37]];
  function colour(value) {
    const at = Math.min(value / 255, 0.9999) * (viridis.length - 1), low = Math.floor(at);
    return viridis[low].map((part, i) => part + (at - low) * (viridis[low + 1][i] - part));
  }
  const palette = Array.from({ length: 256 }, (_, value) => colour(value));

  // The row of the query that is stored next to the one pointed at.
  function row(layer, head) {
    const model = models[state.model], [, layers, heads, queries, patches] = model.shape;
    const number = ((state.image * layers + layer) * heads + head) * queries + state.query;
    return {
      weights: laidOut(model, layer, head, model.weights.subarray(number * patches, (number + 1) * patches)),
      most: model.maxima[number],
      toPrefix: model.toPrefix.subarray(number * model.prefix, (number + 1) * model.prefix).reduce((a, b) => a + b, 0),
    };
  }

  // Of a window, its weights in the grid of the layer; nothing of a head that the layer does not have.
  function laidOut(model, layer, head, weights) {
    if (!model.places) return weights;
    if (head >= model.heads[layer]) return new Uint8Array(0);
    const keys = weights.length, first = (layer * model.queries.length + state.query) * keys;
    const whole = new Uint8Array(model.grids[layer][0] * model.grids[layer][1]);
    for (let i = 0; i < keys; i++) {
      if (model.places[first + i] >= 0) whole[model.places[first + i]] = weights[i];
    }
    return whole;
  }

  function gridOf(weights) {
    const model = models[state.model];
    return (model.grids || [model.grid]).find(([rows, columns]) => rows * columns === weights.length) || [1, 1];
  }

  // The patches of a row as a small picture, one pixel a patch.
  function bitmap(weights, alpha) {
    const [rows, columns] = gridOf(weights);
    if (!weights.length) return document.createElement("canvas");
    const small = Object.assign(document.createElement("canvas"), { width: columns, height: rows });
    const pixels = new ImageData(columns, rows);
    for (let i = 0; i < rows * columns; i++) {
      pixels.data.set([...palette[weights[i]], alpha], 4 * i);
    }
    small.getContext("2d").putImageData(pixels, 0, 0);
    return small;
  }

  function cell() {
    const [rows, columns] = models[state.model].grid, scale = Math.max(1, Math.round(48 / Math.max(rows, columns)));
    return { width: columns * scale + gap, height: rows * scale + gap };
  }

  function patchOf(query) {
    const model = models[state.model], token = model.queries[query] - model.prefix;
    return token < 0 ? null : { row: Math.floor(token / model.grid[1]), column: token % model.grid[1] };
  }

  function strongest() {
    const [, layers, heads] = models[state.model].shape;
    let found = { most: -1 };
    for (let layer = 0; layer < layers; layer++) {
      for (let head = 0; head < heads; head++) {
        const { most } = row(layer, head);
        if (most > found.most) found = { most, layer, head };
      }
    }
    return found;
  }

  function draw() {
    const model = models[state.model], [, layers, heads] = model.shape, size = cell();
    maps.width = labels + heads * size.width;
    maps.height = 18 + layers * size.height;
    const context = maps.getContext("2d");
    context.imageSmoothingEnabled = false;
    context.font = "12px sans-serif";
    context.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--muted");
    for (let head = 0; head < heads; head++) context.fillText(head + 1, labels + head * size.width + 2, 12);
    for (let layer = 0; layer < layers; layer++) {
      context.fillText(layer + 1, 2, 18 + layer * size.height + size.height / 2);
      for (let head = 0; head < heads; head++) {
        context.drawImage(bitmap(row(layer, head).weights, 255), labels + head * size.width, 18 + layer * size.height,
          size.width - gap, size.height - gap);
      }
    }
    const shown = state.map || strongest();
    context.strokeStyle = getComputedStyle(document.documentElement).getPropertyValue("--mark");
    context.lineWidth = 2;
    context.strokeRect(labels + shown.head * size.width - 1, 17 + shown.layer * size.height, size.width - gap + 2,
      size.height - gap + 2);
    const { weights, most, toPrefix } = row(shown.layer, shown.head);
    const over = picture.getContext("2d"), side = picture.width;
    over.imageSmoothingEnabled = false;
    over.globalAlpha = 1;
    over.drawImage(pictures[state.image], 0, 0, side, picture.height);
    over.globalAlpha = 0.6;
    over.drawImage(bitmap(weights, 255), 0, 0, side, picture.height);
    over.globalAlpha = 1;
    const patch = patchOf(state.query);
    if (patch) {
      const wide = side / model.grid[1], high = picture.height / model.grid[0];
      over.strokeStyle = getComputedStyle(document.documentElement).getPropertyValue("--mark");
      over.lineWidth = 2.5;
      over.strokeRect(patch.column * wide + 1, patch.row * high + 1, wide - 2, high - 2);
    }
    const who = patch ? `Patch in row ${patch.row + 1}, column ${patch.column + 1}` : `Prefix token ${state.query + 1}`;
    const key = weights.indexOf(255), [rows, columns] = gridOf(weights);
    text.textContent = !weights.length ? `Layer ${shown.layer + 1} has no head ${shown.head + 1}.`
      : `${who}: head ${shown.head + 1} of layer ${shown.layer + 1} gives ${(100 * most).toFixed(1)} % `
      + `to row ${Math.floor(key / columns) + 1}, column ${key % columns + 1}`
      + (model.places ? ` of ${rows} x ${columns}, in its window` : "")
      + (state.map ? "" : " (no head gives one patch more)")
      + (model.prefix ? `, ${(100 * toPrefix).toFixed(1)} % to prefix tokens.` : ".");
    for (const [number, thumb] of [...$("images").children].entries()) {
      thumb.setAttribute("aria-pressed", number === state.image);
    }
    maps.style.cursor = picture.style.cursor = "crosshair";
  }

  function choose(row, column) {
    const model = models[state.model], step = model.stride;
    const token = model.prefix + Math.floor(row / step) * step * model.grid[1] + Math.floor(column / step) * step;
    state.query = Math.max(0, model.queries.indexOf(token));
    draw();
  }

  function pointAt(event) {
    const box = picture.getBoundingClientRect(), [rows, columns] = models[state.model].grid;
    const at = (place, start, length, count) => Math.min(count - 1, Math.max(0, Math.floor((place - start) / length * count)));
    choose(at(event.clientY, box.top, box.height, rows), at(event.clientX, box.left, box.width, columns));
  }

  function pointAtMap(event) {
    const box = maps.getBoundingClientRect(), [, layers, heads] = models[state.model].shape, size = cell();
    const head = Math.floor(((event.clientX - box.left) * maps.width / box.width - labels) / size.width);
    const layer = Math.floor(((event.clientY - box.top) * maps.height / box.height - 18) / size.height);
    state.map = head >= 0 && head < heads && layer >= 0 && layer < layers ? { layer, head } : null;
    draw();
  }

  async function take(number) {
    await decode(models[number]);
    const model = models[number], middle = model.grid.map(count => count >> 1);
    state.model = number;
    state.map = null;
    $("cls").hidden = !model.cls;
    choose(...middle);
  }

  for (const type of ["pointerdown", "pointermove"]) {
    picture.addEventListener(type, pointAt);
    maps.addEventListener(type, pointAtMap);
  }
  const arrows = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  // A finger leaves when it is lifted: what it chose stays.
  maps.addEventListener("pointerleave", event => {
    if (event.pointerType === "touch") return;
    state.map = null;
    draw();
  });
  maps.addEventListener("keydown", event => {
    const step = arrows[event.key], [, layers, heads] = models[state.model].shape;
    if (!step && event.key !== "Escape") return;
    event.preventDefault();
    const { layer, head } = state.map || strongest();
    state.map = step ? { layer: Math.min(layers - 1, Math.max(0, layer + step[0])),
      head: Math.min(heads - 1, Math.max(0, head + step[1])) } : null;
    draw();
  });
  picture.addEventListener("keydown", event => {
    const step = arrows[event.key];
    if (!step) return;
    event.preventDefault();
    const { stride, grid } = models[state.model], patch = patchOf(state.query) || { row: 0, column: 0 };
    choose(...[patch.row, patch.column].map((place, axis) =>
      Math.min(grid[axis] - 1, Math.max(0, place + step[axis] * stride))));
  });
  $("cls").addEventListener("click", () => { state.query = 0; draw(); });
  $("model").addEventListener("change", event => take(Number(event.target.value)));
  models.forEach((model, number) => $("model").add(new Option(model.name, number)));
  pictures.forEach((image, number) => {
    const thumb = document.createElement("button");
    thumb.type = "button";
    thumb.ariaLabel = `image ${number + 1}`;
    thumb.append(image.cloneNode());
    thumb.addEventListener("click", () => { state.image = number; draw(); });
    $("images").append(thumb);
  });
  await take(0);
})().catch(error => {
  document.getElementById("viewer-text").textContent = `This browser cannot show it: ${error.message}`;
});
