// A figure of panels side by side, on a screen too narrow for it: its parts stand in rows, one below
// the other. What cannot be parted keeps its size, in a box that scrolls sideways: by finger, and by
// the arrow keys once the box has the focus.
(() => {
  if (window.regkitStack) return;
  const READABLE = 0.75; // of its own size: letters of 9 points are then 9 pixels high

  // The parts of a figure, [left, right] in its pixels: as few as fit into the room, none much wider
  // than the others.
  function parted(cuts, width, room) {
    const edges = [0, ...cuts, width];
    const packed = (most) => {
      const parts = [];
      for (let start = 0, k = 1; k < edges.length; k++)
        if (k === edges.length - 1 || edges[k + 1] - edges[start] > most) {
          parts.push([edges[start], edges[k]]);
          start = k;
        }
      return parts;
    };
    const panel = Math.max(...cuts.map((cut, k) => cut - edges[k]), width - cuts[cuts.length - 1]);
    const count = packed(Math.max(room, panel)).length;
    const widths = edges.flatMap((left, k) => edges.slice(k + 1).map((right) => right - left));
    const most = Math.min(...widths.filter((one) => one >= panel && packed(one).length <= count));
    return packed(most);
  }

  // Lets an image fit its box, which is its parent; `data-cuts` says where it may be cut. Returns what
  // is to be called when the image has become another one.
  window.regkitStack = (image, box) => {
    const stack = document.createElement("div");
    stack.className = "regkit-stack";
    stack.setAttribute("role", "img");
    image.after(stack);
    const fit = () => {
      const own = image.naturalWidth, tall = image.naturalHeight, room = box.clientWidth;
      if (!own || !room) return;
      const cuts = (image.dataset.cuts ?? "").split(" ").filter(Boolean).map(Number);
      const parts = cuts.length && room < READABLE * own ? parted(cuts, own, room / READABLE) : [];
      const most = Math.max(...parts.map(([left, right]) => right - left), parts.length ? 0 : own);
      const wide = room < READABLE * most;
      box.classList.toggle("regkit-stacked", parts.length > 0);
      box.classList.toggle("regkit-wide", wide);
      image.style.width = wide && !parts.length ? `${own}px` : "";
      stack.style.width = wide ? `${most}px` : `min(100%, ${most}px)`;
      stack.setAttribute("aria-label", image.alt);
      stack.replaceChildren(...parts.map(([left, right]) => {
        const part = document.createElement("div"), width = right - left;
        part.style.width = `${(100 * width) / most}%`;
        part.style.aspectRatio = `${width} / ${tall}`;
        part.style.backgroundImage = `url("${image.src}")`;
        part.style.backgroundSize = `${(100 * own) / width}% 100%`;
        part.style.backgroundPosition = `${(100 * left) / (own - width)}% 0`;
        return part;
      }));
      for (const [name, value] of [["tabindex", "0"], ["role", "region"],
        ["aria-label", "Figure, wider than the screen: scrolls sideways"]])
        if (wide) box.setAttribute(name, value);
        else box.removeAttribute(name);
    };
    image.addEventListener("load", fit);
    new ResizeObserver(fit).observe(box);
    return fit;
  };
})();
