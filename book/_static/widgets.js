// Loaded after require.js and before the widget manager, only on pages with stored widgets.
// Everything the widgets ask for lies in the folder html-manager/ beside this file.
const widgetFolder = new URL("html-manager", document.currentScript.src).href;
requirejs.config({
  paths: { "@jupyter-widgets": widgetFolder, "@jupyter-widgets/html-manager/dist": widgetFolder },
});
// The widgets speak to MathJax 2; the book has MathJax 3, and only on pages with formulas.
window.addEventListener("load", () => {
  if (!window.MathJax) return;
  MathJax.Hub = {
    Queue([, , node]) {
      MathJax.startup.promise = MathJax.startup.promise.then(() => MathJax.typesetPromise([node]));
    },
  };
});
