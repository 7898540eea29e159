"use strict";
// Sends what a person says, one after the other and each until the server has it.
const AHEAD = 2; // questions that this browser holds: the one on the screen, and the next
const MOST_HELD = 12;
const GIVE_UP_AFTER = 10000; // milliseconds without an answer, and a request is sent again

class Sender {
  // `ids()` are the questions that the browser has; `settle(record, result)` is told what came of each record, `rest()`
  // that none is left.
  constructor(place, { ids, settle, rest }) {
    Object.assign(this, { place, ids, settle, rest });
    this.unsent = new Unsent(place.dataset.storeId, place.dataset.person);
    this.sending = false;
    this.wake = () => {}; // tries again at once
    this.show(false);
  }

  get count() {
    return this.unsent.all().length;
  }

  // Says how many answers wait, if the server is `late`.
  show(late) {
    const count = this.count;
    this.place.dataset.unsent = count;
    const box = one("[data-unsaved]");
    box.hidden = !(late && count);
    box.textContent = box.hidden ? "" : `${notSaved(count)}: the server does not answer. Trying again …`;
  }

  add(path, fields) {
    const record = { path, fields: { ...fields, token: randomToken() } };
    if (!this.unsent.add(record)) addEventListener("beforeunload", (event) => this.count && event.preventDefault());
    this.place.dataset.unsent = this.count;
    this.send();
  }

  async send() {
    if (this.sending) return;
    this.sending = true;
    let pause = 250;
    for (let record; (record = this.unsent.all()[0]); ) {
      const late = setTimeout(() => this.show(true), 700);
      const result = await this.post(record);
      clearTimeout(late);
      if (result.again) {
        this.show(true);
        await new Promise((resolve) => {
          this.wake = resolve;
          setTimeout(resolve, pause);
        });
        pause = Math.min(2 * pause, 4000);
      } else if (result.stop) {
        this.show(false);
        warn(result.sentence ?? `${notSaved(this.count)}.`, result.stop);
        break;
      } else {
        this.unsent.remove(record.key);
        pause = 250;
        this.show(true);
        this.settle(record, result);
      }
    }
    this.sending = false;
    if (this.count) return;
    this.show(false); // another tab of this person may have sent them
    this.rest();
  }

  // Posts one record; what came of it: { data }, { refused }, { again: true } or { stop: link }.
  async post({ path, fields }) {
    const waiting = this.count - 1; // leases of those are still counted
    const have = this.ids();
    const want = path === "/undo" ? have.length + waiting + 1 : AHEAD + waiting;
    const { storeId, csrf } = this.place.dataset;
    const asked = { store_id: storeId, have: have.join(","), want: Math.min(want, MOST_HELD) };
    try {
      const response = await fetch(path, {
        method: "POST",
        headers: { Accept: "application/json", "X-CSRF-Token": csrf },
        body: new URLSearchParams({ ...fields, ...asked }),
        redirect: "error",
        keepalive: true, // whoever answers and leaves at once has answered
        signal: AbortSignal.timeout(GIVE_UP_AFTER),
      });
      if (response.status === 429 || response.status >= 500) return { again: true };
      const data = await response.json();
      if (response.ok) return { data };
      if (response.status === 401) return { stop: ["/login", "Log in to save it."] };
      if (response.status === 403) return { stop: ["/", "Load the page again to save it."] };
      // Kept under its store's id: it is sent if that store is served again.
      if (response.headers.get("X-Page") === "outdated") return { stop: ["/", "Load it again."], sentence: data.error };
      return { refused: data.error };
    } catch {
      return { again: true };
    }
  }
}
