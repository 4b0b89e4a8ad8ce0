// The views of regkit/widgets/views.py: pictures that are in the page become something to handle.
// Nothing is asked of another host, and a page may hold this script more than once.
(() => {
  if (window.regkitViews) return window.regkitViews();

  const make = (tag, properties = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(properties))
      if (name in element && !name.startsWith("aria")) element[name] = value;
      else element.setAttribute(name, value);
    element.append(...children);
    return element;
  };
  const range = (label, min, max, value) => {
    const input = make("input", { type: "range", min, max, step: 1, "aria-label": label });
    input.value = value;
    return input;
  };
  const choice = (label, names, chosen) => {
    const options = names.map((name) => make("option", { value: name, textContent: name }));
    const select = make("select", { "aria-label": label }, ...options);
    select.value = chosen;
    return select;
  };
  const stay = (event) => event.stopPropagation(); // keys pressed here are not the notebook's
  const data = (root) => JSON.parse(root.querySelector(".rv-data").textContent);

  function compare(root) {
    const pictures = [...root.querySelectorAll(".rv-still img")];
    const named = Object.fromEntries(pictures.map((picture) => [picture.dataset.name, picture]));
    const others = ["moved", "moving"].filter((name) => named[name]);
    const below = make("img", { src: named.fixed.src, alt: named.fixed.alt, draggable: false });
    const above = make("img", { draggable: false, alt: "" });
    const [left, right] = [make("b", { className: "rv-name" }), make("b", { className: "rv-name" })];
    const edge = make("div", { className: "rv-edge" });
    const stage = make("div", { className: "rv-stage" }, below, above, edge, left, right);
    stage.style.aspectRatio = named.fixed.style.aspectRatio;
    stage.style.maxWidth = `min(26rem, 34rem * (${stage.style.aspectRatio}))`; // a tall one fits a screen
    const place = range("place of the edge, percent from the left", 0, 100, 50);
    const squares = range("squares along the width", 2, 24, 8);
    const which = choice("image to compare with fixed", others, others[0]);
    const swap = make("button", { type: "button", textContent: "swap" });
    const play = make("button", { type: "button" });
    const tray = make("div", { className: "rv-long" });
    tray.style.maxWidth = stage.style.maxWidth;
    const modes = ["wipe", "flicker", "checkerboard"];
    const buttons = modes.map((mode) => make("button", { type: "button", textContent: mode }));
    let mode = "wipe", shown = true, timer = 0;

    const run = (on) => {
      clearInterval(timer);
      timer = on ? setInterval(() => {
        if (!root.isConnected) return run(false);
        shown = !shown;
        draw();
      }, 800) : 0;
      draw();
    };
    function draw() {
      const other = which.value, n = Number(squares.value), at = Number(place.value);
      above.src = named[other].src;
      above.alt = named[other].alt;
      stage.dataset.mode = mode;
      buttons.forEach((button, k) => button.setAttribute("aria-pressed", modes[k] === mode));
      above.style.clipPath = mode === "wipe" ? `inset(0 ${100 - at}% 0 0)` : "none";
      above.style.visibility = mode === "flicker" && !shown ? "hidden" : "visible";
      const size = stage.clientWidth / n || 1; // of a square, in pixels; a tile holds two by two
      const mask = mode === "checkerboard"
        ? `repeating-conic-gradient(#000 0 25%, transparent 0 50%) 0 0 / ${2 * size}px ${2 * size}px`
        : "none";
      above.style.webkitMask = mask;
      above.style.mask = mask;
      edge.hidden = mode !== "wipe";
      edge.style.left = `${at}%`;
      [left.textContent, right.textContent] = {
        wipe: [other, "fixed"],
        flicker: [shown ? other : "fixed", ""],
        checkerboard: ["fixed", n % 2 ? "fixed" : other], // the squares in the two upper corners
      }[mode];
      right.hidden = mode === "flicker";
      place.setAttribute("aria-valuetext", `${other} up to ${at} percent, then fixed`);
      play.textContent = timer ? "stop" : "start";
      const tools = {
        wipe: ["edge", place], flicker: [swap, play], checkerboard: ["squares", squares],
      }[mode];
      if (tray.dataset.mode !== mode) tray.replaceChildren(...tools);
      tray.dataset.mode = mode;
    }
    const still = matchMedia("(prefers-reduced-motion: reduce)");
    buttons.forEach((button, k) => button.addEventListener("click", () => {
      mode = modes[k];
      shown = true;
      run(mode === "flicker" && !still.matches);
    }));
    swap.addEventListener("click", () => { shown = !shown; run(false); });
    play.addEventListener("click", () => run(!timer));
    for (const input of [place, squares, which]) input.addEventListener("input", draw);
    const drag = (event) => {
      if (mode !== "wipe" || !event.buttons) return;
      const box = stage.getBoundingClientRect();
      place.value = (100 * (event.clientX - box.left)) / box.width;
      draw();
    };
    stage.addEventListener("pointerdown", drag);
    stage.addEventListener("pointermove", drag);
    new ResizeObserver(draw).observe(stage);
    const group = make("div", { role: "group", "aria-label": "how to compare" }, ...buttons);
    const bar = make("div", { className: "rv-bar" }, group);
    if (others.length > 1) bar.append(make("label", {}, "fixed and", which));
    draw();
    return [bar, stage, make("div", { className: "rv-bar" }, tray)];
  }

  function series(root) {
    const pictures = [...root.querySelectorAll(".rv-still img")];
    const input = range(root.dataset.label, 0, pictures.length - 1, data(root).start);
    const picture = make("img", { draggable: false });
    const box = make("div", { className: "rv-scroll" }, picture);
    const fit = window.regkitStack(picture, box);
    const said = make("output");
    const draw = () => {
      const one = pictures[input.value];
      picture.src = one.src;
      picture.alt = one.alt;
      picture.dataset.cuts = one.dataset.cuts;
      said.textContent = one.dataset.name;
      input.setAttribute("aria-valuetext", one.dataset.name);
      fit();
    };
    input.addEventListener("input", draw);
    draw();
    const label = make("label", { className: "rv-long" }, input, said);
    return [make("div", { className: "rv-bar" }, label), box];
  }

  // The voxels of a sheet that `_sprite` laid out, axis 0 fastest.
  async function unpacked(uri, [nx, ny, nz]) {
    const sheet = make("img", { src: uri, alt: "" });
    await sheet.decode();
    const columns = Math.ceil(Math.sqrt(nz));
    const canvas = make("canvas", { width: sheet.naturalWidth, height: sheet.naturalHeight });
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(sheet, 0, 0);
    const pixels = context.getImageData(0, 0, canvas.width, canvas.height).data;
    const voxels = new Uint8Array(nx * ny * nz);
    for (let k = 0; k < nz; k++) {
      const top = Math.floor(k / columns) * ny, left = (k % columns) * nx;
      for (let j = 0; j < ny; j++)
        for (let i = 0; i < nx; i++)
          voxels[i + nx * (j + ny * k)] = pixels[4 * ((top + j) * canvas.width + left + i)];
    }
    return voxels;
  }

  function volumes(root) {
    const { shape, extent, voxels, planes, layers, colours } = data(root);
    const names = Object.keys(layers);
    const step = [1, shape[0], shape[0] * shape[1]];
    const at = shape.map((n) => n >> 1);
    const table = (colours.match(/../g) ?? []).map((two) => parseInt(two, 16));
    const first = names.includes("moved") ? "moved" : names[0];
    const layer = choice("layer", names, first);
    const second = choice("layer to mix it with", ["nothing", ...names], "nothing");
    const share = range("share of the second layer, percent", 0, 100, 50);
    const mix = make("label", { className: "rv-long", hidden: true }, "share", share);
    const said = make("output");
    const kept = {};
    const colour = (name, value, channel) =>
      name === "Jacobian" ? table[3 * value + channel] : value;

    const handles = [0, 1, 2].map((axis) => {
      const input = range(`${planes[axis]} plane, place along axis ${axis}`, 0, shape[axis] - 1, at[axis]);
      input.addEventListener("input", () => go(axis, Number(input.value)));
      return input;
    });
    const views = [2, 1, 0].map((axis) => {
      const [right, up] = [0, 1, 2].filter((other) => other !== axis);
      const canvas = make("canvas", { width: shape[right], height: shape[up], tabIndex: 0 });
      canvas.setAttribute("role", "img");
      canvas.style.aspectRatio = `${extent[right]} / ${extent[up]}`;
      const lines = [make("span"), make("span")];
      Object.assign(lines[0].style, { top: 0, bottom: 0, width: "1px" });
      Object.assign(lines[1].style, { left: 0, right: 0, height: "1px" });
      const box = make("div", { className: "rv-plane" }, canvas, ...lines);
      box.style.flex = `${extent[right]} 1 0`;
      box.style.setProperty("--rv-part", Math.min(1, extent[right] / (2 * extent[0])));
      const point = (event) => {
        if (!event.buttons) return;
        const { left, top, width, height } = canvas.getBoundingClientRect();
        at[right] = Math.floor(((event.clientX - left) / width) * shape[right]);
        at[up] = shape[up] - 1 - Math.floor(((event.clientY - top) / height) * shape[up]);
        go(right, at[right], false);
        go(up, at[up]);
      };
      canvas.addEventListener("pointerdown", (event) => {
        canvas.setPointerCapture(event.pointerId);
        point(event);
      });
      canvas.addEventListener("pointermove", point);
      const keys = {
        ArrowLeft: [right, -1], ArrowRight: [right, 1], ArrowDown: [up, -1], ArrowUp: [up, 1],
        PageDown: [axis, -1], PageUp: [axis, 1],
      };
      canvas.addEventListener("keydown", (event) => {
        if (!keys[event.key]) return;
        event.preventDefault();
        const [along, by] = keys[event.key];
        go(along, at[along] + by);
      });
      return { axis, right, up, canvas, lines, box };
    });

    function go(axis, place, show = true) {
      at[axis] = Math.min(Math.max(place, 0), shape[axis] - 1);
      if (show) draw();
    }
    function plane({ axis, right, up, canvas, lines }) {
      const context = canvas.getContext("2d");
      const picture = context.createImageData(shape[right], shape[up]);
      const [a, b] = [layer.value, second.value];
      const part = kept[b] ? share.value / 100 : 0;
      for (let y = 0, p = 0; y < shape[up]; y++)
        for (let x = 0; x < shape[right]; x++, p += 4) {
          const q = at[axis] * step[axis] + x * step[right] + (shape[up] - 1 - y) * step[up];
          for (let c = 0; c < 3; c++) {
            const value = colour(a, kept[a][q], c);
            picture.data[p + c] = part ? value + part * (colour(b, kept[b][q], c) - value) : value;
          }
          picture.data[p + 3] = 255;
        }
      context.putImageData(picture, 0, 0);
      lines[0].style.left = `${(100 * (at[right] + 0.5)) / shape[right]}%`;
      lines[1].style.top = `${100 - (100 * (at[up] + 0.5)) / shape[up]}%`;
      canvas.setAttribute("aria-label",
        `${planes[axis]} plane of ${a}, ${at[axis] + 1} of ${shape[axis]}; arrow keys move the other two planes, page up and down this one`);
    }
    async function draw() {
      mix.hidden = second.value === "nothing";
      for (const name of [layer.value, second.value])
        if (layers[name]) kept[name] ??= await unpacked(layers[name], shape);
      if (!kept[layer.value]) return; // another was chosen while this one was read
      views.forEach(plane);
      handles.forEach((input, axis) => { input.value = at[axis]; });
      const place = at.map((i, axis) => Math.round(((i + 0.5) * voxels[axis]) / shape[axis] - 0.5));
      said.textContent = `voxel ${place.join(", ")}`;
      root.dataset.at = at.join(" ");
    }
    for (const input of [layer, second, share]) input.addEventListener("input", draw);
    draw();
    const bar = make("div", { className: "rv-bar" },
      make("label", {}, "show", layer), make("label", {}, "mixed with", second), mix);
    const places = make("div", { className: "rv-bar" },
      ...[2, 1, 0].map((axis) => make("label", {}, planes[axis], handles[axis])), said);
    return [bar, make("div", { className: "rv-planes" }, ...views.map(({ box }) => box)), places];
  }

  const kinds = { compare, series, volumes };
  window.regkitViews = () => {
    for (const root of document.querySelectorAll(".regkit-view:not(.rv-seen)")) {
      root.classList.add("rv-seen");
      const label = `${root.dataset.view}: ${root.dataset.label}`;
      const live = make("div", { className: "rv-live", role: "group", "aria-label": label });
      live.append(...kinds[root.dataset.view](root)); // after an error the pictures stay as they are
      root.append(live);
      root.classList.add("rv-ready");
      root.addEventListener("keydown", stay);
    }
  };
  // a notebook may put its cells into the page after it has run their scripts
  new MutationObserver(window.regkitViews).observe(document, { childList: true, subtree: true });
  window.regkitViews();
})();
