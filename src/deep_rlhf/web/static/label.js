"use strict";
// The labelling tab: keys and buttons.
(() => {
  const RENEW_EVERY = 60000; // milliseconds; keeps the lease of a question that is being read
  const place = one("#question");
  const questions = new Questions(place, () => sender.count);
  const { ranking } = questions;
  const sender = new Sender(place, { ids: () => questions.ids, settle, rest });
  let busy = false; // during an undo nothing can be labelled

  // ---- labelling

  function finish(path, fields) {
    if (!questions.current || busy) return;
    const record = { question: questions.current.id, ...fields };
    if (path === "/answer") record.seconds = questions.seconds.toFixed(2);
    questions.done.add(record.question);
    warn("");
    const counter = one("[data-labelled]");
    if (path === "/answer" && counter) counter.textContent = Number(counter.textContent) + 1;
    questions.next();
    announce(path === "/skip" ? "Skipped. Next question." : "Next question.");
    sender.add(path, record);
  }

  function undo() {
    if (busy) return;
    busy = true;
    place.setAttribute("aria-busy", "true");
    warn("");
    sender.add("/undo", {});
  }

  // Handles the result of a record.
  function settle({ path, fields }, { data, refused }) {
    if (path === "/undo") busy = false;
    place.removeAttribute("aria-busy");
    if (refused) {
      warn(refused);
      questions.done.delete(Number(fields.question)); // it may be asked again
      questions.refill();
      return;
    }
    if (path === "/undo") askAgain(data);
    questions.take(data);
    document.body.dispatchEvent(new CustomEvent("labelled"));
  }

  function askAgain(data) {
    if (data.undone === null) {
      warn("There is nothing to undo.");
      return;
    }
    questions.done.delete(data.undone);
    const again = data.questions.find((question) => question.id === data.undone);
    if (again) {
      questions.putBefore(again);
      announce("Your last label or skip was undone; label the question again.");
    } else questions.refill();
  }

  // Nothing is unsent. An undo that another tab has sent is finished for this one, too.
  function rest() {
    if (!busy) return;
    busy = false;
    place.removeAttribute("aria-busy");
    questions.refill();
  }

  function choose(choice) {
    const strength = one("input[name=strength]:checked", place);
    finish("/answer", strength && choice.length === 1 ? { choice, strength: strength.value } : { choice });
  }

  function toggleStrength(value) {
    const radio = one(`input[name=strength][value="${value}"]`, place);
    radio.checked = !radio.checked;
    const word = one("span", radio.parentElement).firstChild.textContent; // without the key that follows it
    announce(radio.checked ? `${word.trim()} better` : "Strength cleared");
  }

  function saveOrder() {
    const fields = ranking.fields();
    if (fields) finish("/answer", fields);
  }

  // ---- keys

  const choiceOf = (side) => one(`.choices button.${side}`, place).value;

  function pressed(key) {
    const pair = one(".question.pair", place);
    const ranked = one(".question.ranking", place);
    if (key === "?") one("#help").showModal();
    else if (key === "u" || key === "U") undo();
    else if (busy || !questions.current) return false;
    else if (key === "s" || key === "S") finish("/skip", {});
    else if (key === "ArrowDown") choose("cant_tell");
    else if (pair && key === "ArrowLeft") choose(choiceOf("first"));
    else if (pair && key === "ArrowRight") choose(choiceOf("last"));
    else if (pair && key === "ArrowUp") choose("tie");
    else if (pair && /^[1-4]$/.test(key)) toggleStrength(key);
    else if (ranked && /^[1-9]$/.test(key)) ranking.rank(Number(key));
    else if (ranked && key === "=") ranking.tie();
    else if (ranked && key === "Backspace") ranking.takeBack();
    else if (ranked && key === "Enter") saveOrder();
    else return false;
    return true;
  }

  function isInScroller(element) {
    for (let at = element; at && at !== document.body; at = at.parentElement) {
      const isLarger = at.scrollWidth > at.clientWidth || at.scrollHeight > at.clientHeight;
      if (isLarger && /auto|scroll/.test(getComputedStyle(at).overflow)) return true;
    }
    return false;
  }

  // Whether a key is a command of this page, not of the browser or of the focused element.
  function isOurs(event) {
    if (event.repeat || event.isComposing || one("dialog[open]")) return false;
    if (event.ctrlKey || event.metaKey || event.altKey || event.getModifierState("AltGraph")) return false;
    const isArrow = event.key.startsWith("Arrow");
    if (isArrow && (event.shiftKey || isInScroller(event.target))) return false; // with Shift they select text
    const field = event.target.closest("input, select, textarea");
    if (field && (field.type !== "radio" || isArrow)) return false; // arrow keys move within a row of radio buttons
    return !(event.key === "Enter" && event.target.closest("button, a"));
  }

  document.addEventListener("keydown", (event) => {
    // Enter in a radio button must not press the form's first button.
    if (isOurs(event) && (pressed(event.key) || (event.key === "Enter" && event.target.closest("input")))) {
      event.preventDefault();
    }
  });

  // ---- buttons

  place.addEventListener("submit", (event) => {
    event.preventDefault();
    const button = event.submitter;
    if (button?.classList.contains("skip")) finish("/skip", {});
    else if (button?.name === "choice") choose(button.value);
    else if (one(".question.ranking", place)) saveOrder();
  });
  one("[data-undo]").addEventListener("submit", (event) => {
    event.preventDefault();
    undo();
  });
  one("form.who").addEventListener("submit", (event) => {
    if (!sender.count) return;
    event.preventDefault(); // they can be sent only under this name
    warn(`${notSaved(sender.count)}: wait before you leave.`);
  });
  const help = one("[data-help]");
  help.hidden = false;
  help.addEventListener("click", () => one("#help").showModal());

  // ---- visibility, timers and server events

  document.addEventListener("visibilitychange", () => {
    questions.visibilityChanged();
    if (!document.hidden) document.body.dispatchEvent(new CustomEvent("people"));
  });
  // A hidden page ignores responses: they may report a logout that has ended by the time the page is shown.
  // While labels are unsent, only the sender reports the end of the login: the page must not leave for /login.
  document.body.addEventListener("htmx:beforeOnLoad", (event) => {
    if (document.hidden || sender.count) event.preventDefault();
  });
  setInterval(() => document.hidden || sender.count || questions.refill(), RENEW_EVERY);
  for (const event of ["connected", "questions"]) {
    document.body.addEventListener(event, () => {
      sender.wake();
      if (!questions.current) questions.refill();
    });
  }
  addEventListener("online", () => sender.wake());

  // ---- start

  const unsent = sender.unsent.all();
  busy = unsent.some((record) => record.path === "/undo");
  questions.begin(unsent.filter((record) => record.path !== "/undo").map((record) => Number(record.fields.question)));
  sender.send();
})();
