"use strict";
// The question on the screen, and the next ones.
class Questions {
  // `unsent()` returns the number of labels that the server does not have yet.
  constructor(place, unsent) {
    this.place = place;
    this.unsent = unsent;
    this.ranking = new Ranking(place);
    this.current = null; // { id, html, seconds, since } of the question on the screen
    this.ahead = []; // { id, html } of the next questions
    this.done = new Set(); // ids that were labelled or skipped here
  }

  // Reads the questions that the server rendered; those in `done` are labelled, but the server does not know it yet.
  begin(done) {
    this.done = new Set(done);
    const rendered = [...document.querySelectorAll("template[data-ahead]")].map((template) => template.innerHTML);
    if (one(".question", this.place)) rendered.unshift(this.place.innerHTML);
    for (const html of rendered) {
      const id = Number(/data-question="(\d+)"/.exec(html)[1]);
      if (!this.done.has(id)) this.ahead.push({ id, html });
    }
    if (this.ahead.length && this.ahead[0].html === rendered[0]) {
      this.current = { ...this.ahead.shift(), seconds: 0, since: performance.now() }; // already on the screen
    } else if (rendered.length) this.next();
  }

  get ids() {
    return [this.current?.id, ...this.ahead.map((question) => question.id)].filter(Boolean);
  }

  // Seconds for which the question was visible.
  get seconds() {
    const { seconds, since } = this.current;
    return (seconds + (document.hidden ? 0 : performance.now() - since)) / 1000;
  }

  // The page was hidden or shown.
  visibilityChanged() {
    if (!this.current) return;
    if (document.hidden) this.current.seconds += performance.now() - this.current.since;
    else {
      this.current.since = performance.now();
      this.refill();
    }
  }

  show(question, empty = "[data-waiting-page]") {
    this.current = question ? { ...question, seconds: 0, since: performance.now() } : null;
    this.ranking.clear();
    const page = document.createElement("template");
    page.innerHTML = question ? question.html : one(empty).innerHTML;
    this.place.replaceChildren(page.content);
    this.place.removeAttribute("aria-busy");
    one("h1", this.place).focus({ preventScroll: true });
    scrollTo(0, 0);
  }

  // Shows a question before the one on the screen.
  putBefore(question) {
    if (this.current) this.ahead.unshift({ id: this.current.id, html: this.current.html });
    this.show(question);
  }

  next() {
    this.show(this.ahead.shift(), "[data-loading-page]");
  }

  take(data) {
    const known = new Set(this.ids);
    for (const question of data.questions) {
      if (!known.has(question.id) && !this.done.has(question.id)) this.ahead.push(question);
    }
    if (!this.current && this.ahead.length) this.next();
    else if (!this.current && !this.unsent() && !one(".waiting", this.place)) this.show(null);
  }

  // Fetches the questions leased to this browser, which renews the leases, and drops those now leased to others.
  async refill() {
    const have = this.ids;
    const want = Math.min(Math.max(AHEAD, have.length) + this.unsent(), MAX_HELD);
    const { storeId, csrf } = this.place.dataset;
    try {
      const asked = new URLSearchParams({ have: have.join(","), want, store_id: storeId });
      const response = await fetch(`/questions?${asked}`, {
        headers: { Accept: "application/json", "X-CSRF-Token": csrf },
        redirect: "error",
        signal: AbortSignal.timeout(REQUEST_TIMEOUT),
      });
      const isOutdated = response.headers.get("X-Page") === "outdated"; // of another user or another store
      // A hidden page stays: the user may be logging in again in another tab. It asks again when it is shown.
      if (document.hidden && (response.status === 401 || isOutdated)) return;
      // While labels are unsent, their sender says so, with the link to log in.
      if (response.status === 401 && !this.unsent()) location.assign("/login");
      if (isOutdated) location.reload();
      if (response.ok) this.keep(await response.json(), have);
    } catch {
      // the next event or renewal retries
    }
  }

  keep(data, asked) {
    this.ahead = this.ahead.filter((question) => data.held.includes(question.id));
    const id = this.current?.id;
    if (asked.includes(id) && !this.done.has(id) && !data.held.includes(id)) {
      warn("The lease of that question expired, and another annotator has it now.");
      this.next();
    }
    this.take(data);
  }
}
