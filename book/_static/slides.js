/* Starts a deck of book/slides: 16 by 9, local files only, speaker notes with the key S.

   Until then the page shows all slides, one below the other (class "unfolded"), so that formulas and
   code can be measured: what is wider or higher than its slide is made smaller. */

const SMALLEST = 13; // pixels of a slide 720 high

function shrink(part, ratio) {
  const size = parseFloat(getComputedStyle(part).fontSize);
  part.style.fontSize = `${Math.max(SMALLEST, Math.floor(9.7 * size * ratio) / 10)}px`;
}

function fit(section) {
  for (const formula of section.querySelectorAll(".formula")) {
    const drawn = formula.querySelector("svg");
    const ratio = drawn ? (formula.clientWidth - 40) / drawn.getBoundingClientRect().width : 1;
    if (ratio < 1) shrink(formula, ratio);
  }
  for (const code of section.querySelectorAll("pre"))
    if (code.scrollWidth > code.clientWidth) shrink(code, code.clientWidth / code.scrollWidth);
  for (const code of section.querySelectorAll("pre")) {
    const room = code.clientHeight - (section.scrollHeight - section.clientHeight);
    if (room < code.clientHeight) shrink(code, room / code.clientHeight);
  }
}

(async () => {
  if (window.MathJax?.startup?.promise) await window.MathJax.startup.promise;
  document.querySelectorAll(".slides section").forEach(fit);
  document.documentElement.classList.remove("unfolded");
  await Reveal.initialize({
    width: 1280,
    height: 720,
    margin: 0.02,
    display: "flex",
    center: false,
    hash: true,
    transition: "none",
    backgroundTransition: "none",
    scrollActivationWidth: null,
    pdfMaxPagesPerSlide: 1,
    plugins: [RevealNotes],
  });
  document.documentElement.dataset.ready = "yes";
})();
