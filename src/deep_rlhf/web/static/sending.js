"use strict";
// Sends labels, skips and undos in order, and retries each until the server has it.
const AHEAD = 2; // questions leased to this browser: the one on the screen, and the next
const MAX_HELD = 12;
const REQUEST_TIMEOUT = 10000; // milliseconds, after which a request is sent again

class Sender {
  // `ids()` returns the ids of the browser's questions; `settle(record, result)` receives the result of each record;
  // `rest()` is called once none is left.
  constructor(place, { ids, settle, rest }) {
    Object.assign(this, { place, ids, settle, rest });
    this.unsent = new Unsent(place.dataset.storeId, place.dataset.person);
    this.sending = false;
    this.wake = () => {}; // retries at once
    this.show(false);
  }

  get count() {
    return this.unsent.all().length;
  }

  // Shows how many records are unsent, if the server is `late`.
  show(late) {
    const count = this.count;
    this.place.dataset.unsent = count;
    const box = one("[data-unsaved]");
    box.hidden = !(late && count);
    box.textContent = box.hidden ? "" : `${notSaved(count)}: the server does not respond. Retrying …`;
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
    this.show(false); // another tab of this user may have sent them
    this.rest();
  }

  // Posts one record; returns { data }, { refused }, { again: true } or { stop: link }.
  async post({ path, fields }) {
    const waiting = this.count - 1; // their leases still count
    const have = this.ids();
    const want = path === "/undo" ? have.length + waiting + 1 : AHEAD + waiting;
    const { storeId, csrf } = this.place.dataset;
    const asked = { store_id: storeId, have: have.join(","), want: Math.min(want, MAX_HELD) };
    try {
      const response = await fetch(path, {
        method: "POST",
        headers: { Accept: "application/json", "X-CSRF-Token": csrf },
        body: new URLSearchParams({ ...fields, ...asked }),
        redirect: "error",
        keepalive: true, // a label is sent even if the page is closed at once
        signal: AbortSignal.timeout(REQUEST_TIMEOUT),
      });
      if (response.status === 429 || response.status >= 500) return { again: true };
      const data = await response.json();
      if (response.ok) return { data };
      if (response.status === 401) return { stop: ["/login", "Log in to save."] };
      if (response.status === 403) return { stop: ["/", "Reload the page to save."] };
      // Kept under its store's id, and sent once that store is served again.
      if (response.headers.get("X-Page") === "outdated") return { stop: ["/", "Reload the page."], sentence: data.error };
      return { refused: data.error };
    } catch {
      return { again: true };
    }
  }
}
