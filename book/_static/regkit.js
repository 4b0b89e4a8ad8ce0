// Figures fit a phone, see stack.js of regkit/widgets; views have their own boxes.
document.addEventListener("DOMContentLoaded", () => {
  for (const image of document.querySelectorAll(".bd-article .cell_output img, .bd-article figure img")) {
    if (image.closest(".regkit-view, .widget-subarea, a")) continue;
    const box = document.createElement("div");
    box.className = "regkit-scroll";
    image.before(box);
    box.append(image);
    window.regkitStack(image, box);
  }
});
