"use strict";
// The ranks of three or more responses, set by keys or radio buttons; `place` contains the question.
class Ranking {
  constructor(place) {
    this.place = place;
    this.clear();
    place.addEventListener("change", () => this.fieldsets.length && this.read());
  }

  clear() {
    this.given = []; // numbers of the responses, in the order in which they were ranked
    this.ties = false; // the next one is as good as the previous one
  }

  get fieldsets() {
    return [...this.place.querySelectorAll(".ranks")];
  }

  rankOf(number) {
    return Number(this.fieldsets[number - 1].querySelector("input:checked")?.value ?? 0);
  }

  setRank(number, rank) {
    for (const radio of this.fieldsets[number - 1].elements) radio.checked = Number(radio.value) === rank;
  }

  get numbers() {
    return this.fieldsets.map((_, i) => i + 1);
  }

  // Reads the radio buttons after one of them was pressed.
  read() {
    this.given = this.numbers.filter((number) => this.rankOf(number)).sort((a, b) => this.rankOf(a) - this.rankOf(b));
    this.ties = false;
    this.report();
  }

  rank(number) {
    if (number > this.fieldsets.length || this.rankOf(number)) return undefined;
    const last = this.given.length ? this.rankOf(this.given.at(-1)) : 0;
    const rank = this.ties && last ? last : last + 1;
    if (rank > this.fieldsets.length) return this.warnOfLast(); // the mouse assigned the last rank already
    this.setRank(number, rank);
    this.given.push(number);
    this.ties = false;
    return this.report();
  }

  tie() {
    this.ties = this.given.length > 0;
    this.report();
  }

  takeBack() {
    if (this.given.length) this.setRank(this.given.pop(), 0);
    this.ties = false;
    this.report();
  }

  report() {
    const words = this.given.map((number, i) => {
      if (i === 0) return `${number}`;
      return this.rankOf(number) === this.rankOf(this.given[i - 1]) ? ` = ${number}` : ` > ${number}`;
    });
    const order = words.length ? `Best first: ${words.join("")}${this.ties ? " =" : ""}` : "1 is the best.";
    this.place.querySelector("[data-advice]").textContent = order;
    announce(order.replaceAll("=", "as good as").replaceAll(">", "then"));
  }

  warnOfLast() {
    warn(`There is no rank after ${this.fieldsets.length}: remove one, or select the rank with the mouse.`);
  }

  // The form fields; a single remaining response is ranked last. Null if ranks are missing or ambiguous.
  fields() {
    const left = this.numbers.filter((number) => !this.rankOf(number));
    if (left.length > 1) {
      warn(`${left.length} responses have no rank yet.`);
      return null;
    }
    const lowest = Math.max(...this.numbers.map((number) => this.rankOf(number)));
    if (left.length && lowest === this.fieldsets.length) {
      warn(`Response ${left[0]} has no rank yet.`);
      return null;
    }
    for (const number of left) this.setRank(number, lowest + 1);
    const chosen = this.fieldsets.map((fieldset) => fieldset.querySelector("input:checked"));
    return Object.fromEntries(chosen.map((radio) => [radio.name, radio.value]));
  }
}
