"use strict";
// The first tab: keys, the next question held ready, and answers that are sent until the server has them.
(() => {
  const AHEAD = 2; // questions that this browser holds: the one on the screen, and the next
  const RENEW_EVERY = 60000; // milliseconds, so that a question is not lent to somebody else while it is read
  const GIVE_UP_AFTER = 10000; // milliseconds without an answer, and a request is sent again
  const one = (selector, inside = document) => inside.querySelector(selector);
  const place = one("#question");
  const csrf = place.dataset.csrf;
  const unsent = new Unsent(place.dataset.person);

  let current = null; // { id, html, seconds, since } of what is on the screen
  let ahead = []; // { id, html } of what comes next
  const done = new Set(); // ids that were answered or skipped here
  let busy = false; // while an undo is under way, nothing is answered
  let sending = false;
  let wake = () => {};
  const ranking = new Ranking(place, say);

  // ---- showing

  function show(question, empty = "[data-waiting-page]") {
    current = question ? { ...question, seconds: 0, since: performance.now() } : null;
    ranking.clear();
    const page = document.createElement("template");
    page.innerHTML = question ? question.html : one(empty).innerHTML;
    place.replaceChildren(page.content);
    place.removeAttribute("aria-busy");
    one("h1", place).focus({ preventScroll: true });
    scrollTo(0, 0);
  }

  function next() {
    show(ahead.shift(), "[data-loading-page]");
  }

  function take(data) {
    const known = new Set([current?.id, ...ahead.map((question) => question.id)]);
    for (const question of data.questions) {
      if (!known.has(question.id) && !done.has(question.id)) ahead.push(question);
    }
    if (!current && ahead.length) next();
    else if (!current && !unsent.all().length && !one(".waiting", place)) show(null);
  }

  function say(sentence) {
    one("[data-said]").textContent = sentence;
  }

  function warn(sentence, link) {
    const message = one("[data-message]");
    message.textContent = sentence;
    if (link) message.append(" ", Object.assign(document.createElement("a"), { href: link[0], textContent: link[1] }));
    message.hidden = !sentence;
  }

  function showUnsaved(late) {
    const count = unsent.all().length;
    place.dataset.unsent = count;
    const box = one("[data-unsaved]");
    box.hidden = !(late && count);
    const what = count === 1 ? "1 answer is" : `${count} answers are`;
    box.textContent = box.hidden ? "" : `${what} not saved yet: the server does not answer. Trying again …`;
  }

  // ---- sending

  function sendLast(path, fields) {
    const record = { path, fields: { ...fields, token: randomToken() } };
    if (!unsent.add(record)) addEventListener("beforeunload", (event) => unsent.all().length && event.preventDefault());
    place.dataset.unsent = unsent.all().length;
    send();
  }

  async function send() {
    if (sending) return;
    sending = true;
    let pause = 250;
    for (let record; (record = unsent.all()[0]); ) {
      const late = setTimeout(() => showUnsaved(true), 700);
      const result = await post(record);
      clearTimeout(late);
      if (result.again) {
        showUnsaved(true);
        await new Promise((resolve) => {
          wake = resolve;
          setTimeout(resolve, pause);
        });
        pause = Math.min(2 * pause, 4000);
      } else if (result.stop) {
        showUnsaved(false);
        const count = unsent.all().length;
        warn(`${count === 1 ? "1 answer is" : `${count} answers are`} not saved yet.`, result.stop);
        break;
      } else {
        unsent.remove(record.key);
        pause = 250;
        showUnsaved(true);
        settle(record, result);
      }
    }
    sending = false;
  }

  // Posts one record; what came of it: { data }, { refused }, { again: true } or { stop: link }.
  async function post({ path, fields }) {
    const waiting = unsent.all().length - 1; // leases of those are still counted
    const have = [current?.id, ...ahead.map((question) => question.id)].filter(Boolean);
    const want = path === "/undo" ? have.length + waiting + 1 : AHEAD + waiting;
    const body = new URLSearchParams({ ...fields, have: have.join(","), want: Math.min(want, 12) });
    let response;
    try {
      response = await fetch(path, {
        method: "POST",
        headers: { Accept: "application/json", "X-CSRF-Token": csrf },
        body,
        redirect: "error",
        signal: AbortSignal.timeout(GIVE_UP_AFTER),
      });
      if (response.status === 429 || response.status >= 500) return { again: true };
      const data = await response.json();
      if (response.ok) return { data };
      if (response.status === 401) return { stop: ["/login", "Log in to save it."] };
      if (response.status === 403) return { stop: ["/", "Load the page again to save it."] };
      return { refused: data.error };
    } catch {
      return { again: true };
    }
  }

  function settle({ path, fields }, { data, refused }) {
    if (path === "/undo") busy = false;
    place.removeAttribute("aria-busy");
    if (refused) {
      warn(refused);
      refill();
      return;
    }
    if (path === "/undo" && data.undone === null) {
      warn("There is no answer to take back.");
    } else if (path === "/undo") {
      done.delete(data.undone);
      const again = data.questions.find((question) => question.id === data.undone);
      if (again) {
        if (current) ahead.unshift({ id: current.id, html: current.html });
        show(again);
        say("Your last answer is taken back: answer again.");
      } else {
        refill();
      }
    }
    take(data);
    document.body.dispatchEvent(new CustomEvent("answered"));
  }

  // Asks what this browser holds, which also keeps it; what was lent to somebody else meanwhile goes.
  async function refill() {
    const have = [current?.id, ...ahead.map((question) => question.id)].filter(Boolean);
    const want = Math.min(Math.max(AHEAD, have.length) + unsent.all().length, 12);
    try {
      const response = await fetch(`/questions?have=${have.join(",")}&want=${want}`, {
        headers: { Accept: "application/json" },
        redirect: "error",
        signal: AbortSignal.timeout(GIVE_UP_AFTER),
      });
      if (response.status === 401) location.assign("/login");
      if (!response.ok) return;
      const data = await response.json();
      ahead = ahead.filter((question) => data.held.includes(question.id));
      if (current && !done.has(current.id) && have.includes(current.id) && !data.held.includes(current.id)) {
        warn("You looked at that question for so long that somebody else has it now.");
        next();
      }
      take(data);
    } catch {
      // the next event or renewal asks again
    }
  }

  // ---- answering

  function secondsOf(question) {
    return (question.seconds + (document.hidden ? 0 : performance.now() - question.since)) / 1000;
  }

  function finish(path, fields) {
    if (!current || busy) return;
    const said = { question: current.id, ...fields };
    if (path === "/answer") said.seconds = secondsOf(current).toFixed(2);
    done.add(current.id);
    warn("");
    const counter = one("[data-answered]");
    if (path === "/answer" && counter) counter.textContent = Number(counter.textContent) + 1;
    next();
    say(path === "/skip" ? "Skipped. Next question." : "Next question.");
    sendLast(path, said);
  }

  function undo() {
    if (busy) return;
    busy = true;
    place.setAttribute("aria-busy", "true");
    warn("");
    sendLast("/undo", {});
  }

  function choose(choice) {
    const strength = one("input[name=strength]:checked", place);
    finish("/answer", strength && choice.length === 1 ? { choice, strength: strength.value } : { choice });
  }

  function toggleStrength(value) {
    const radio = one(`input[name=strength][value="${value}"]`, place);
    radio.checked = !radio.checked;
    say(radio.checked ? `${radio.parentElement.textContent.trim()} better` : "Strength taken back");
  }

  function saveOrder() {
    const fields = ranking.fields(warn);
    if (fields) finish("/answer", fields);
  }

  // ---- keys and buttons

  const choiceOf = (side) => one(`.choices button.${side}`, place).value;

  function pressed(key) {
    const pair = one(".question.pair", place);
    const ranked = one(".question.ranking", place);
    if (key === "?") one("#help").showModal();
    else if (key === "u" || key === "U") undo();
    else if (busy || !current) return false;
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

  document.addEventListener("keydown", (event) => {
    if (event.repeat || event.ctrlKey || event.metaKey || event.altKey || one("dialog[open]")) return;
    const field = event.target.closest("input, select, textarea");
    // Within a row of radio buttons, arrows keep their own meaning; Enter must not press the form's first button.
    if (field && (field.type !== "radio" || event.key.startsWith("Arrow"))) return;
    if (event.key === "Enter" && event.target.closest("button, a")) return;
    if (pressed(event.key) || (field && event.key === "Enter")) event.preventDefault();
  });

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
    const count = unsent.all().length;
    if (!count) return;
    event.preventDefault(); // they could not be sent under another name
    warn(`${count === 1 ? "1 answer is" : `${count} answers are`} not saved yet: wait before you leave.`);
  });
  const help = one("[data-help]");
  help.hidden = false;
  help.addEventListener("click", () => one("#help").showModal());

  // ---- time, and what happens elsewhere

  document.addEventListener("visibilitychange", () => {
    if (!current) return;
    if (document.hidden) current.seconds += performance.now() - current.since;
    else {
      current.since = performance.now();
      refill();
    }
  });
  setInterval(() => document.hidden || unsent.all().length || refill(), RENEW_EVERY);
  for (const event of ["connected", "questions"]) {
    document.body.addEventListener(event, () => {
      wake();
      if (!current) refill();
    });
  }
  addEventListener("online", () => wake());

  // ---- begin

  const rendered = [...document.querySelectorAll("template[data-ahead]")].map((template) => template.innerHTML);
  if (one(".question", place)) rendered.unshift(place.innerHTML);
  for (const record of unsent.all()) {
    if (record.path === "/undo") busy = true;
    else done.add(Number(record.fields.question));
  }
  for (const html of rendered) {
    const id = Number(/data-question="(\d+)"/.exec(html)[1]);
    if (!done.has(id)) ahead.push({ id, html });
  }
  if (ahead.length && rendered.length && ahead[0].html === rendered[0]) {
    current = { ...ahead.shift(), seconds: 0, since: performance.now() }; // it is on the screen already
  } else if (rendered.length) next();
  showUnsaved(false);
  send();
})();
