// Makes the lists of a quiz questions that can be answered, and counts. Makes the guesses of a
// question buttons. Without this script the answers stand folded below their questions.
(() => {
  function add(parent, tag, properties = {}, text = "") {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) made.setAttribute(name, value);
    made.textContent = text;
    parent.append(made);
    return made;
  }

  // One question: `done(right)` is called once, when it has been answered.
  function ask(item, done) {
    const options = [...item.querySelectorAll(".regkit-options > li")];
    const answer = item.querySelector("details");
    const name = `regkit-${Math.random().toString(36).slice(2)}`;
    const several = item.hasAttribute("data-several");
    item.querySelector("p").id = name;
    item.setAttribute("role", several ? "group" : "radiogroup");
    item.setAttribute("aria-labelledby", name);
    answer.hidden = true;

    const inputs = options.map((option) => {
      const text = option.querySelector("p");
      const label = document.createElement("label");
      const input = add(label, "input", { type: several ? "checkbox" : "radio", name });
      add(label, "span").append(...text.childNodes);
      text.append(label);
      return input;
    });
    const button = document.createElement("button");
    Object.assign(button, { type: "button", textContent: "Check", disabled: true });
    answer.before(button);
    const result = document.createElement("p");
    result.className = "regkit-result";
    result.tabIndex = -1;
    result.setAttribute("role", "status");
    answer.before(result);

    item.addEventListener("change", () => {
      button.disabled = !inputs.some((input) => input.checked);
    });
    button.addEventListener("click", () => {
      const wanted = options.map((option) => option.hasAttribute("data-right"));
      const right = inputs.every((input, k) => input.checked === wanted[k]);
      options.forEach((option, k) => {
        if (wanted[k]) option.classList.add("regkit-yes");
        else if (inputs[k].checked) option.classList.add("regkit-no");
        inputs[k].disabled = true;
      });
      const letters = [..."ABCDE"].filter((_, k) => wanted[k]).join(" and ");
      result.textContent = right ? "Right." : `Not right: the answer is ${letters}.`;
      button.hidden = true;
      answer.hidden = false;
      answer.open = true;
      result.focus({ preventScroll: true }); // the button that had the focus is gone
      done(right);
    });
  }

  function start(quiz) {
    const untouched = quiz.innerHTML;
    const items = [...quiz.querySelectorAll(".regkit-item")];
    const score = add(quiz, "p", { class: "regkit-score", role: "status" });
    let answered = 0;
    let points = 0;
    for (const item of items)
      ask(item, (right) => {
        answered += 1;
        points += right ? 1 : 0;
        const left = items.length - answered;
        score.textContent = left
          ? `${points} of ${answered} right, ${left} to go.`
          : `${points} of ${items.length} right.`;
        if (left) return;
        const again = add(quiz, "button", { type: "button" }, "Start again");
        again.addEventListener("click", () => {
          quiz.innerHTML = untouched;
          start(quiz);
          quiz.querySelector("input").focus();
        });
      });
  }

  function guess(place) {
    const list = place.querySelector(":scope > ul");
    if (!list) return;
    const result = document.createElement("p");
    result.className = "regkit-result";
    result.setAttribute("role", "status");
    list.after(result);
    const buttons = [...list.children].map((option) => {
      const button = document.createElement("button");
      button.type = "button";
      button.setAttribute("aria-pressed", "false");
      button.append(...option.childNodes);
      option.append(button);
      return button;
    });
    for (const button of buttons)
      button.addEventListener("click", () => {
        for (const other of buttons) other.setAttribute("aria-pressed", String(other === button));
        result.textContent = `You guessed: ${button.textContent.trim()}`;
      });
  }

  // A notebook runs this script again for each cell that shows a quiz.
  for (const [kind, make] of [["quiz", start], ["predict", guess]])
    for (const place of document.querySelectorAll(`.regkit-${kind}:not([data-ready])`)) {
      place.setAttribute("data-ready", "");
      place.setAttribute("data-lm-suppress-shortcuts", "true"); // JupyterLab leaves us the keys
      make(place);
    }
})();
