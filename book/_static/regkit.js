// A figure of many panels cannot be read at the width of a phone. There it keeps its own size, in a
// box that scrolls sideways: by finger, and by the arrow keys once the box has the focus.
document.addEventListener("DOMContentLoaded", () => {
  const READABLE = 0.75; // of its own size: letters of 9 points are then 9 pixels high
  for (const image of document.querySelectorAll(".bd-article .cell_output img, .bd-article figure img")) {
    if (image.closest(".regkit-view, .widget-subarea, a")) continue;
    const box = document.createElement("div");
    box.className = "regkit-scroll";
    image.before(box);
    box.append(image);
    const fit = () => {
      const own = image.naturalWidth;
      const wide = own > 0 && box.clientWidth > 0 && box.clientWidth < READABLE * own;
      if (wide === box.classList.contains("regkit-wide")) return;
      box.classList.toggle("regkit-wide", wide);
      image.style.width = wide ? `${own}px` : "";
      for (const [name, value] of [["tabindex", "0"], ["role", "region"],
        ["aria-label", "Figure, wider than the screen: scrolls sideways"]])
        if (wide) box.setAttribute(name, value);
        else box.removeAttribute(name);
    };
    image.addEventListener("load", fit);
    new ResizeObserver(fit).observe(box);
  }
});
